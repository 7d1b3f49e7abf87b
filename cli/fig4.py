"""`pscope fig4`: questions of two hops, corrected by patching."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from pscope.cli.console import out, tell
from pscope.cli.frame import Frame, command
from pscope.cli.grids import GridOptions, tell_price, warn_few
from pscope.cli.options import NewTokensOption, seed_option

from pscope.errors import PscopeError

GRID = (2 / 15, 1 / 3, 8 / 15, 2 / 3, 23 / 30), (1 / 30, 2 / 15, 7 / 30, 1 / 3)


@command
def fig4(
    frame: Frame,
    *,
    queries: Annotated[
        Path | None,
        typer.Argument(
            help='A .json list of "first", "second", "answer" and perhaps "bridge", or a folder of relations to '
            "compose.",
            show_default="those that ship, composed",
        ),
    ] = None,
    keep: Annotated[
        Literal["solvable", "all"],
        typer.Option(help="Ask only queries of which the model answers both hops alone, or all."),
    ] = "solvable",
    samples: Annotated[
        int | None, typer.Option(min=1, help="Queries to ask.", show_default="60; 10 with --quick")
    ] = None,
    grid: GridOptions,
    new_tokens: NewTokensOption = 20,
    cot_tokens: Annotated[int, typer.Option(min=1, help='Tokens to think for, "step by step".')] = 60,
    chat: Annotated[
        bool | None,
        typer.Option("--chat/--no-chat", help="Ask for steps in the chat template.", show_default="where there is one"),
    ] = None,
    example: Annotated[
        int | None, typer.Option(min=1, help="Walk through one of the kept queries, by its number.")
    ] = None,
    query: Annotated[
        tuple[str, str] | None,
        typer.Option(
            metavar='"π2" "π1"', help='Walk through a query of your own: "The CEO of" "the company that made X".'
        ),
    ] = None,
    seed: Annotated[int, seed_option("queries, folds, random vectors and bands")] = 0,
) -> None:
    """Figure 4: questions of two hops, asked plainly, step by step, and by patching in three ways.

    cot: the state of "the company that created X" over the last token of "The current CEO of"; placeholder: the same
    over the x of "The current CEO of x is"; backpatch: a later layer of the whole question over an earlier one. An
    answer is right where it is the most probable of those to the same second hop, at every pair of layers, and, at
    some, where the row says it; beside that stands how much more probable patching makes it.
    """
    if query is not None and (queries is not None or example is not None):
        raise PscopeError("--query stands by itself; leave out QUERIES and --example")
    walking = query is not None or example is not None
    samples = samples or (10 if grid.quick else 60)

    from pscope.inputs.queries import Query, compose, read_queries
    from pscope.inputs.relations import shipped_relations

    if query is not None:
        composed = [Query(first=query[1], second=query[0], answers=())]
    else:
        composed, skipped = (compose(shipped_relations()), []) if queries is None else read_queries(queries)
        for line in skipped:
            tell(line)
    model = frame.load()

    import pscope
    from pscope.experiments.experiment import permuted
    from pscope.experiments.held_out import FOLDS
    from pscope.experiments.known import PlainWords
    from pscope.experiments.multi_hop import MultiHop, MultiHopScores, answered_hops, plain_hops, shared_bridge
    from pscope.experiments.multi_hop_summary import gains, summarise, transcripts
    from pscope.experiments.scored_sweep import best_pairs
    from pscope.show.agreement import agreement_table
    from pscope.show.multi_hop import answers_figure, answers_heatmaps, answers_table, gains_table, walk_through

    if chat and not model.tokenizer.chat_template:
        raise PscopeError(f"the tokenizer of {model.name} has no chat template; use --no-chat")
    chat = bool(model.tokenizer.chat_template) if chat is None else chat
    pairs = grid.pairs(model)
    decoding, reasoning = pscope.Decoding(new_tokens), pscope.Decoding(cot_tokens)
    frame.read(repr(one) for one in composed)
    counts, pool = {"composed": len(composed)}, composed
    if keep == "solvable" and query is None:
        drawn = [composed[number] for number in grid.asked(samples, len(composed), seed)]
        texts = frame.known(PlainWords(model, plain_hops(drawn), decoding, memory=frame.memory))
        hops = answered_hops(drawn, texts)
        if grid.quick:
            counts["drawn"] = len(drawn)
        counts["hop one answered"] = sum(hop.one_found for hop in hops)
        counts["hop two answered"] = sum(hop.two_found for hop in hops)
        pool = [hop.query for hop in hops if hop.solvable]
        counts["both answered"] = len(pool)
    if not pool:
        raise PscopeError("no query is left: the model answers both hops of none; --keep all asks them anyway")
    if example is not None and example > len(pool):
        raise PscopeError(f"--example {example}: {len(pool)} queries are kept; give a number from 1 to {len(pool)}")
    indices = sorted(permuted(seed, len(pool))[:samples])
    sample = [pool[index] for index in ([(example or 1) - 1] if walking else indices)]
    counts["asked"] = len(sample)
    options: dict[str, Any] = {"seed": seed, "memory": frame.memory}
    methods: dict[str, Any] = {"chat": chat, "reasoning": reasoning, **options}
    origin = str(queries or "composed of the relations shipped with pscope") if query is None else " ".join(query)
    settings = {"queries": origin, "counts": counts, "chat": chat, "folds": FOLDS, "seed": seed}
    if walking:
        coarse = grid.coarse(model, GRID)
        continuations = frame.carry_out(MultiHop(model, sample, coarse, decoding, **methods), **settings, pairs=coarse)
        frame.run.note("queries", transcripts(continuations, sample))
        frame.finish()
        for part in walk_through(sample[0], continuations):
            out.print(part, soft_wrap=isinstance(part, str))
        tell(f"table: {frame.run.folder / 'table.parquet'}")
        return
    experiment = MultiHopScores(model, sample, pairs, among=composed, by=grid.score, **options)
    tell("queries: " + ", ".join(f"{count} {name}" for name, count in counts.items()))
    warn_few({"queries": len(sample), "bridges": len({shared_bridge(one) for one in sample})})
    tell_price(experiment)
    scores = frame.score(experiment, **settings, **grid.settings(pairs))
    best = None if scores is None else best_pairs(scores, "method", ["query"])
    said_at = grid.said_pairs(model, GRID, best)
    continuations = frame.say(MultiHop(model, sample, said_at, decoding, **methods), best_pairs=best)
    frame.run.note("queries", transcripts(continuations, sample))
    summary, gain_table = summarise(scores, continuations, seed), gains(scores, seed)
    frame.run.note("summary", summary)
    frame.run.note("gains", gain_table)
    agreement = grid.agreement(scores, continuations, "method", ["query"], "bridge", seed)
    if len(agreement):
        frame.run.note("agreement", agreement)
    steps = f"step by step: {cot_tokens} tokens{', in the chat template' if chat else ''}"
    lengths = f"{steps}; all others: {new_tokens} tokens{', without it' if chat else ''}"
    figure = frame.run.draw(answers_figure(summary, f"{model.name}, {len(sample)} queries\n{lengths}"))
    heatmaps = frame.run.draw(answers_heatmaps(scores, model.name), "heatmaps")
    frame.finish()
    out.print(answers_table(summary, lengths))
    if len(gain_table):
        out.print(gains_table(gain_table))
    if len(agreement):
        out.print(agreement_table(agreement))
    folder = frame.run.folder
    tell(f"tables: {folder / 'table.parquet'} {folder / 'said.parquet'}\nfigures: {figure} {heatmaps}")
