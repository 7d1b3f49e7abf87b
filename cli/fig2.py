"""`pscope fig2`: how early the next token can be read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from pscope.cli import signals
from pscope.cli.common import (
    DeviceMapOption,
    DeviceOption,
    Dtype,
    DtypeOption,
    LayersOption,
    MemoryOption,
    ModelOption,
    OutOption,
    RevisionOption,
    digest,
    load_model,
    narrow_table,
    out,
    parse_layers,
    parse_memory,
    progress_bar,
    run_folder,
    seed_option,
    started,
    tell,
)
from rich.table import Table

from pscope.errors import PscopeError

if TYPE_CHECKING:
    import pandas as pd


def fig2(
    samples: Annotated[int, typer.Option(min=1, help="Positions to read, spread evenly over the texts.")] = 200,
    texts: Annotated[
        Path | None, typer.Option(help='A file of texts: .jsonl with a "text" per line, or .txt with one per line.')
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(
            metavar="ID[:CONFIG][:SPLIT]",
            help="Texts from a dataset, such as Salesforce/wikitext:wikitext-2-raw-v1.",
        ),
    ] = None,
    layers: LayersOption = None,
    seed: Annotated[int, seed_option("the positions and the bands")] = 0,
    batch_tokens: Annotated[int, typer.Option(min=1, help="Tokens of text in one pass.")] = 1024,
    memory: MemoryOption = 1.0,
    model: ModelOption = "smollm2",
    revision: RevisionOption = None,
    dtype: DtypeOption = Dtype.auto,
    device: DeviceOption = None,
    device_map: DeviceMapOption = None,
    out_folder: OutOption = None,
) -> None:
    """Figure 2: how early a model's next token can be read, by logit lens and token identity.

    At a random position of each text, every layer's hidden state is decoded both ways and held against the model's
    own prediction. Without --texts and --dataset, the passages that come with pscope are read.
    """
    chosen, budget = parse_layers(layers), parse_memory(memory)
    if texts is not None and dataset is not None:
        raise PscopeError("--texts and --dataset were both given; choose one")
    folder = run_folder("fig2", out_folder)

    from pscope.inputs.texts import read_dataset, read_texts, shipped_texts

    if texts is not None:
        passages = read_texts(texts)
    else:
        passages = shipped_texts() if dataset is None else read_dataset(dataset, most=samples)
    lm = load_model(model, dtype, device, device_map, revision)

    import pscope
    from pscope.experiments.next_token import decode_next_tokens, draw_positions, summarise
    from pscope.models.residual import check_layers
    from pscope.show.next_token import next_token_figure

    chosen = list(range(lm.n_layers + 1)) if chosen is None else chosen
    check_layers(lm, chosen)
    sampled = draw_positions(lm, passages, samples, seed)
    scope = pscope.Patchscope(lm, lm.prompt(pscope.TOKEN_IDENTITY), memory=budget)
    settings = {
        "texts": str(texts or dataset or "shipped with pscope"),
        "texts_sha256": digest(passages),
        "samples": samples,
        "seed": seed,
        "layers": chosen,
        "revision": revision,
        "target": scope.target.text,
        "batch_tokens": batch_tokens,
        "memory": budget,
        "path": str(scope.check),
    }
    tell(str(scope.check))
    with started(folder, "fig2", lm, settings) as run:
        chunks = []
        with progress_bar() as progress:
            task = progress.add_task("samples", total=samples)
            for chunk in decode_next_tokens(scope, sampled, chosen, batch_tokens):
                run.add(chunk)
                signals.raise_if_stopped()
                chunks.append(chunk)
                progress.advance(task, len(chunk) // (2 * len(chosen)))
        import pandas as pd

        summary = summarise(pd.concat(chunks), seed)
        run.note("summary", summary)
        figure = run.draw(next_token_figure(summary, f"{lm.name}, {samples} samples"))
    out.print(_as_table(summary))
    tell(f"table: {run.folder / 'table.parquet'}\nfigure: {figure}")


def _as_table(summary: pd.DataFrame) -> Table:
    """Layers down, for each measure the two lenses side by side, each with its band."""
    by_layer = summary.pivot(index="layer", columns="lens")
    lenses = list(dict.fromkeys(summary["lens"]))
    measures = {"precision_at_1": ("precision@1", 2), "surprisal": ("surprisal", 1)}
    shown = narrow_table("mean (95 % band from resampling texts); surprisal in nats")
    shown.add_column("layer", justify="right", no_wrap=True)
    for label, _ in measures.values():
        for lens in lenses:
            shown.add_column(f"{label}\n{lens}", justify="right", no_wrap=True)
    for layer, row in by_layer.iterrows():
        cells = []
        for measure, (_, digits) in measures.items():
            for lens in lenses:
                mean, low, high = (row[f"{measure}{bound}", lens] for bound in ("", "_low", "_high"))
                cells.append(f"{mean:.{digits}f} ({low:.{digits}f}–{high:.{digits}f})")
        shown.add_row(str(layer), *cells)
    return shown
