"""`pscope table2`: what subjects' hidden states tell of them."""

from __future__ import annotations

from collections.abc import Sequence
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

    from pscope.inputs.relations import Relation
    from pscope.models.model import LanguageModel

GRID = (1 / 15, 1 / 5, 1 / 3, 1 / 2, 2 / 3), (1 / 30, 2 / 15, 4 / 15, 2 / 5, 8 / 15)


def table2(
    relations: Annotated[
        Path | None,
        typer.Argument(
            help="A relation (.json, or .tsv as the paper's), or a folder of them.",
            show_default="those that ship",
        ),
    ] = None,
    samples: Annotated[
        int | None, typer.Option(min=3, help="Subjects of each relation.", show_default="12; 6 with --quick")
    ] = None,
    contexts: Annotated[
        int | None, typer.Option(min=1, help="Sentences to read each subject in.", show_default="2; 1 with --quick")
    ] = None,
    layers: SourceLayersOption = None,
    target_layers: TargetLayersOption = None,
    full: FullOption = False,
    quick: QuickOption = False,
    new_tokens: NewTokensOption = 20,
    seed: Annotated[int, seed_option("subjects, folds, random vectors and bands")] = 0,
    memory: MemoryOption = 1.0,
    model: ModelOption = "smollm2",
    revision: RevisionOption = None,
    dtype: DtypeOption = Dtype.auto,
    device: DeviceOption = None,
    device_map: DeviceMapOption = None,
    out_folder: OutOption = None,
) -> None:
    """Table 2: attributes of subjects, extracted by Patchscopes and by a logistic-regression probe.

    A subject's state, read in a sentence that mentions it, is patched over the placeholder of "The official currency of
    x is". Of the subjects whose answer the model knows, some of each relation are read. Beside the accuracy stand
    those of a probe per layer, the majority class, another subject's state, a random vector and the target unpatched.
    """
    check_grid(layers, target_layers, full)
    budget = parse_memory(memory)
    folder = run_folder("table2", out_folder)
    samples, contexts = samples or (6 if quick else 12), contexts or (1 if quick else 2)

    from pscope.inputs.relations import read_relations, shipped_relations

    read, skipped = (shipped_relations(), []) if relations is None else read_relations(relations)
    for line in skipped:
        tell(line)
    lm = load_model(model, dtype, device, device_map, revision)

    import pscope
    from pscope.experiments.attribute_extraction import (
        FOLDS,
        PATCHED,
        RANDOM,
        ask_plainly,
        extract,
        over_layers,
        rows_to_decode,
        summarise,
    )
    from pscope.show.attribute_extraction import accuracy_figure, accuracy_heatmaps

    pairs = chosen_pairs(lm, layers, target_layers, full=full, quick=quick, default=GRID)
    decoding = pscope.Decoding(new_tokens)
    read = _with_readable_target(lm, read)
    check = pscope.Patchscope(lm, lm.prompt(read[0].target.text, read[0].target.at)).check
    with err.status("Asking the model in plain words what it knows …"):
        asked = ask_plainly(
            lm,
            read,
            samples=samples,
            contexts=contexts,
            decoding=decoding,
            seed=seed,
            memory=budget,
            path=check.path,
        )
    for question in asked:
        if question.unread:
            lost = f"{question.relation.name}: source prompts left out: {len(question.unread)}"
            tell(f"{lost}, the first because {question.unread[0]}")
        known = f"{question.relation.name}: {question.answered} of {question.subjects} subjects are known"
        fate = f"{len(question.samples)} are read" if question.enough else f"skipped, fewer than the {FOLDS} folds"
        tell(f"{known}, {fate}")
    questions = [question for question in asked if question.enough]
    if not questions:
        raise PscopeError("no relation is left: the model knows too few subjects of each")
    warn_few({f"subjects of {question.relation.name}": len(question.samples) for question in questions})
    rows = rows_to_decode(questions, pairs)
    tell(str(check))
    tell_price(rows, new_tokens)
    settings = {
        "relations": str(relations or "shipped with pscope"),
        "relations_sha256": digest(repr(relation) for relation in read),
        "counts": {
            question.relation.name: [question.subjects, question.answered, len(question.samples)] for question in asked
        },
        "samples": samples,
        "contexts": contexts,
        "pairs": pairs,
        "new_tokens": new_tokens,
        "folds": FOLDS,
        "seed": seed,
        "memory": budget,
        "revision": revision,
        "path": str(check),
    }
    chunks = (
        chunk
        for question in questions
        for chunk in extract(pscope.Patchscope(lm, question.target, memory=budget), question, pairs, decoding, seed)
    )
    with started(folder, "table2", lm, settings) as run:
        table = collect(run, chunks, rows, lambda chunk: int(chunk["condition"].isin([PATCHED, RANDOM]).sum()))
        summary, accuracy = summarise(table, seed), over_layers(table, seed)
        run.note("summary", summary)
        run.note("accuracy", accuracy)
        figure = run.draw(accuracy_figure(accuracy, lm.name))
        heatmaps = run.draw(accuracy_heatmaps(table, lm.name), "heatmaps")
    out.print(_as_table(summary))
    tell(f"table: {run.folder / 'table.parquet'}\nfigures: {figure} {heatmaps}")


def _with_readable_target(model: LanguageModel, relations: Sequence[Relation]) -> list[Relation]:
    """The relations whose question can be asked of the model; the others are told. Raises PscopeError if all are."""
    kept = []
    for relation in relations:
        try:
            model.prompt(relation.target.text, relation.target.at)
        except PscopeError as error:
            tell(f"{relation.name}: skipped, its target prompt cannot be read: {error}")
        else:
            kept.append(relation)
    if not kept:
        raise PscopeError("no relation is left: the target prompt of none can be read")
    return kept


def _as_table(summary: pd.DataFrame) -> Table:
    shown = narrow_table(
        "oracle: any target layer gives the answer, mean ± std over source layers (the paper's number); held out: at "
        "the pair of layers that was best for other subjects, averaged over those that tie; p: of held out against the "
        "probe at the layer that was best for other subjects, times the number of relations (Bonferroni), over the "
        "subjects whose answer others have too, since a probe can name no other; blank where those are too few for .05"
    )
    # One blank between columns is all that fits.
    shown.padding = 0
    headings = ("n", "oracle", "random\noracle", "another\noracle", "held\nout", "probe", "majo-\nrity", "clean", "p")
    shown.add_column("relation", no_wrap=True)
    for heading in headings:
        shown.add_column(heading, justify="right", no_wrap=True)
    for row in summary.itertuples():
        shown.add_row(
            literal(row.relation),
            str(row.samples),
            f"{row.oracle:.2f}±{row.oracle_std:.2f}",
            _number(row.random_oracle),
            _number(row.another_oracle),
            _number(row.held_out),
            _number(row.probe),
            _number(row.majority),
            _number(row.clean),
            "" if row.p != row.p else "<.001" if row.p < 0.001 else f"{row.p:.2g}",
        )
    return shown


def _number(value: float) -> str:
    return "" if value != value else f"{value:.2f}"
