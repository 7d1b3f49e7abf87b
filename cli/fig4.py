"""`pscope fig4`: questions of two hops, corrected by patching."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from pscope.cli.common import (
    DeviceMapOption,
    DeviceOption,
    Dtype,
    DtypeOption,
    MemoryOption,
    ModelOption,
    OutOption,
    RevisionOption,
    collect,
    digest,
    err,
    literal,
    load_model,
    narrow_table,
    out,
    parse_memory,
    run_folder,
    seed_option,
    started,
    tell,
)
from pscope.cli.grids import (
    FullOption,
    NewTokensOption,
    QuickOption,
    SourceLayersOption,
    TargetLayersOption,
    check_grid,
    chosen_pairs,
    tell_price,
    warn_few,
)
from rich.table import Table

from pscope.errors import PscopeError

if TYPE_CHECKING:
    import pandas as pd

    from pscope.inputs.relations import Query

GRID = (2 / 15, 1 / 3, 8 / 15, 2 / 3, 23 / 30), (1 / 30, 2 / 15, 7 / 30, 1 / 3)


class Keep(str, Enum):
    """Which queries are asked."""

    solvable = "solvable"
    all = "all"


def fig4(
    queries: Annotated[
        Path | None,
        typer.Argument(
            help='A .json list of "first", "second", "answer" and perhaps "bridge", or a folder of relations to '
            "compose.",
            show_default="those that ship, composed",
        ),
    ] = None,
    keep: Annotated[
        Keep, typer.Option(help="Ask only queries of which the model answers both hops alone, or all.")
    ] = Keep.solvable,
    samples: Annotated[
        int | None, typer.Option(min=1, help="Queries to ask.", show_default="60; 15 with --quick")
    ] = None,
    layers: SourceLayersOption = None,
    target_layers: TargetLayersOption = None,
    full: FullOption = False,
    quick: QuickOption = False,
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
    memory: MemoryOption = 1.0,
    model: ModelOption = "smollm2",
    revision: RevisionOption = None,
    dtype: DtypeOption = Dtype.auto,
    device: DeviceOption = None,
    device_map: DeviceMapOption = None,
    out_folder: OutOption = None,
) -> None:
    """Figure 4: questions of two hops, asked plainly, step by step, and by Patchscopes of three wirings.

    cot: the state of "the company that created X" over the last token of "The current CEO of"; placeholder: the same
    over the x of "The current CEO of x is"; backpatch: a later layer of the whole question over an earlier one.
    """
    check_grid(layers, target_layers, full)
    budget = parse_memory(memory)
    if query is not None and (queries is not None or example is not None):
        raise PscopeError("--query stands by itself; leave out QUERIES and --example")
    walking = query is not None or example is not None
    folder = run_folder("fig4", out_folder)

    from pscope.inputs.relations import Query, compose, read_queries, shipped_relations

    if query is not None:
        composed = [Query(first=query[1], second=query[0], answers=())]
    else:
        composed, skipped = (compose(shipped_relations()), []) if queries is None else read_queries(queries)
        for line in skipped:
            tell(line)
    lm = load_model(model, dtype, device, device_map, revision)

    import numpy as np

    import pscope
    from pscope.experiments import multi_hop

    if chat and not lm.tokenizer.chat_template:
        raise PscopeError(f"the tokenizer of {lm.name} has no chat template; use --no-chat")
    chat = bool(lm.tokenizer.chat_template) if chat is None else chat
    pairs = chosen_pairs(lm, layers, target_layers, full=full, quick=quick, default=GRID)
    decoding, reasoning = pscope.Decoding(new_tokens), pscope.Decoding(cot_tokens)
    check = pscope.Patchscope(lm, lm.prompt(composed[0].text)).check
    counts = {"composed": len(composed)}
    kept = composed
    if keep is Keep.solvable and query is None:
        with err.status("Asking the model each hop alone …"):
            hops = multi_hop.answer_hops(lm, composed, decoding, memory=budget, path=check.path)
        counts["hop one answered"] = sum(answered.one_found for answered in hops)
        counts["hop two answered"] = sum(answered.two_found for answered in hops)
        kept = [answered.query for answered in hops if answered.solvable]
        counts["both answered"] = len(kept)
    if not kept:
        raise PscopeError("no query is left: the model answers both hops of none; --keep all asks them anyway")
    if example is not None and example > len(kept):
        raise PscopeError(f"--example {example}: {len(kept)} queries are kept; give a number from 1 to {len(kept)}")
    if walking:
        asked = [kept[(example or 1) - 1]]
    else:
        order = np.random.default_rng(seed).permutation(len(kept))
        asked = [kept[index] for index in sorted(order[: samples or (15 if quick else 60)].tolist())]
    counts["asked"] = len(asked)
    rows = multi_hop.rows_to_decode(len(asked), pairs)
    tell("queries: " + ", ".join(f"{count} {what}" for what, count in counts.items()))
    if not walking:
        warn_few({"queries": len(asked), "bridges": len({multi_hop.shared_bridge(one) for one in asked})})
    tell(str(check))
    tell_price(rows, new_tokens)
    settings = {
        "queries": " ".join(query) if query else str(queries or "composed of the relations shipped with pscope"),
        "queries_sha256": digest(repr(one) for one in composed),
        "keep": keep.value,
        "counts": counts,
        "pairs": pairs,
        "new_tokens": new_tokens,
        "cot_tokens": cot_tokens,
        "chat": chat,
        "folds": multi_hop.FOLDS,
        "seed": seed,
        "memory": budget,
        "revision": revision,
        "path": str(check),
    }
    from pscope.show.multi_hop import answers_figure, answers_heatmaps

    chunks = multi_hop.correct(lm, asked, pairs, decoding, chat=chat, reasoning=reasoning, seed=seed, memory=budget)
    with started(folder, "fig4", lm, settings) as run:
        table = collect(run, chunks, rows, lambda chunk: int(chunk["layer"].notna().sum()))
        run.note("queries", multi_hop.transcripts(table, asked))
        if not walking:
            summary = multi_hop.summarise(table, seed)
            run.note("summary", summary)
            steps = f"step by step: {cot_tokens} tokens{', in the chat template' if chat else ''}"
            lengths = f"{steps}; all others: {new_tokens} tokens{', without it' if chat else ''}"
            figure = run.draw(answers_figure(summary, f"{lm.name}, {len(asked)} queries\n{lengths}"))
            heatmaps = run.draw(answers_heatmaps(table, lm.name), "heatmaps")
    if walking:
        _walk_through(asked[0], table)
        tell(f"table: {run.folder / 'table.parquet'}")
        return
    out.print(_as_table(summary, lengths))
    tell(f"table: {run.folder / 'table.parquet'}\nfigures: {figure} {heatmaps}")


def _as_table(summary: pd.DataFrame, lengths: str) -> Table:
    import pandas as pd

    shown = narrow_table(
        "share of queries answered (95 % band from resampling bridges, each with all its queries; exact where all "
        "agree); oracle: any pair of layers gives the answer; held-out pair: the one that was best for queries of "
        f"other bridges, averaged over those that tie; {lengths}"
    )
    for heading in ("method", "measure", "answered", "layers"):
        shown.add_column(heading, justify="right" if heading == "answered" else "left")
    previous = None
    for row in summary.itertuples():
        layers = "" if row.pairs is pd.NA else f"{row.pairs} pairs"
        if row.layer is not pd.NA:
            layers = f"{row.layer} → {row.target_layer}"
        band = "" if row.low != row.low else f" ({row.low:.2f}–{row.high:.2f})"
        answered = f"{row.found:.2f}{band}"
        shown.add_row("" if row.method == previous else row.method, row.measure, answered, layers)
        previous = row.method
    return shown


def _walk_through(query: Query, table: pd.DataFrame, most: int = 8) -> None:
    """What each method says; of a grid, continuations that coincide share a line, right ones come first."""
    out.print(f"[bold]{literal(query.text)}[/bold]", soft_wrap=True)
    if query.answers:
        out.print(f"answer: {literal(' / '.join(query.answers))}", soft_wrap=True)
    for method, chunk in table.groupby("method", sort=False):
        shown = Table(title=literal(method), title_justify="left")
        shown.add_column("layers")
        shown.add_column("continuation", overflow="fold")
        own = chunk[chunk["condition"] == "patched"]
        groups = sorted(own.groupby("continuation"), key=lambda group: (not group[1]["found"].any(), -len(group[1])))
        for text, rows in groups[:most]:
            first = rows.iloc[0]
            more = f" and {len(rows) - 1} more" if len(rows) > 1 else ""
            found = "green" if first["found"] else None
            shown.add_row(
                f"{first['layer']} → {first['target_layer']}{more}", literal(" ".join(text.split())), style=found
            )
        if len(groups) > most:
            shown.add_row(f"… {len(groups) - most} others", "")
        clean = chunk[chunk["condition"] == "clean target"]
        for text in clean["continuation"]:
            shown.add_row(
                "unpatched", literal(" ".join(text.split())), style="green" if clean["found"].any() else "dim"
            )
        out.print(shown)
