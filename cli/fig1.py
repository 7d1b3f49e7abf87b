"""`pscope fig1`: one token's hidden state, layer by layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
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
    literal,
    load_model,
    out,
    parse_layers,
    parse_memory,
    print_json,
    run_folder,
    started,
    tell,
)
from pscope.cli.prompts import (
    AtIndexOption,
    TargetAtIndexOption,
    TargetAtOption,
    TargetOption,
    parse_one_position,
    target_prompt,
    target_text,
    tell_sink,
)
from rich.table import Table

if TYPE_CHECKING:
    import pandas as pd


def fig1(
    source: Annotated[
        str, typer.Option(help="The prompt whose hidden state is read.")
    ] = "Amazon's former CEO attended the Oscars",
    at: Annotated[
        str | None, typer.Option(help="Which token of it: its text, an index, or last.", show_default="CEO")
    ] = None,
    at_index: AtIndexOption = None,
    target: TargetOption = None,
    target_at: TargetAtOption = None,
    target_at_index: TargetAtIndexOption = None,
    layers: LayersOption = None,
    top_k: Annotated[int, typer.Option(min=1, help="Tokens to show for each layer.")] = 1,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens the patched prompt goes on for.")] = 4,
    memory: MemoryOption = 1.0,
    model: ModelOption = "smollm2",
    revision: RevisionOption = None,
    dtype: DtypeOption = Dtype.auto,
    device: DeviceOption = None,
    device_map: DeviceMapOption = None,
    out_folder: OutOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the table as JSON.")] = False,
) -> None:
    """Figure 1: what one token's hidden state says, layer by layer.

    The state of each layer is patched into the target prompt at the same layer; beside it stands what the logit lens
    makes of it. The last row is the control: the target prompt unpatched.
    """
    chosen, budget = parse_layers(layers), parse_memory(memory)
    read = parse_one_position(at, at_index, source, default="CEO")
    text = target_text(target)
    folder = run_folder("fig1", out_folder)
    lm = load_model(model, dtype, device, device_map, revision)

    import pscope
    from pscope.experiments.grid import source_prompt
    from pscope.experiments.layer_readout import read_layers
    from pscope.show.layer_readout import layer_readout_figure

    marked = source_prompt(lm, source, read)
    patched = target_prompt(lm, text, pscope.TOKEN_IDENTITY, target_at, target_at_index)
    scope = pscope.Patchscope(lm, patched, memory=budget)
    chosen = list(range(lm.n_layers + 1)) if chosen is None else chosen
    table = read_layers(scope, marked, chosen, top_k=top_k, new_tokens=new_tokens)
    settings = {
        "source": marked.text,
        "source_position": marked.position,
        "target": patched.text,
        "target_positions": patched.positions,
        "layers": chosen,
        "top_k": top_k,
        "new_tokens": new_tokens,
        "memory": budget,
        "revision": revision,
        "path": str(scope.check),
    }
    title = f"{marked.token.strip()!r} in {source!r}"
    with started(folder, "fig1", lm, settings) as run:
        run.add(table)
        figure = run.draw(layer_readout_figure(table, f"{title}\n{lm.name}"))
    if as_json:
        print_json(table)
    else:
        out.print(_as_table(table, title))
    tell_sink(marked)
    tell(f"{scope.check}\nfigure: {figure}")


def _as_table(table: pd.DataFrame, title: str) -> Table:
    from pscope.experiments.layer_readout import CLEAN, LOGIT_LENS, PATCHSCOPE

    shown = Table(title=literal(title), title_justify="left")
    for column in ("layer", PATCHSCOPE, "goes on", LOGIT_LENS):
        shown.add_column(column, justify="right" if column == "layer" else "left", overflow="fold")
    patched, lens = (
        table[table["reading"].isin(readings)].groupby(table["layer"].fillna(-1), sort=False)
        for readings in ((PATCHSCOPE, CLEAN), (LOGIT_LENS,))
    )
    lens_cells = {layer: _cell(rows) for layer, rows in lens}
    for layer, rows in patched:
        control = layer < 0
        shown.add_row(
            "clean" if control else str(layer),
            _cell(rows),
            _quoted(rows["continuation"].iloc[0]),
            lens_cells.get(layer, ""),
            style="dim" if control else None,
        )
    return shown


def _cell(rows: pd.DataFrame) -> str:
    return "  ".join(f"{_quoted(token)} {p:.2f}" for token, p in zip(rows["token"], rows["probability"], strict=True))


def _quoted(text: str) -> str:
    return literal(repr(text))
