"""`pscope table3`: one entity, resolved layer by layer."""

from __future__ import annotations

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
    literal,
    load_model,
    out,
    parse_layers,
    parse_memory,
    parse_target_layers,
    print_json,
    run_folder,
    started,
    tell,
)
from pscope.cli.entities import (
    BeforeOption,
    LowerLayersOption,
    NewTokensOption,
    StopAtCommaOption,
    TargetLayersOption,
    one_target,
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


def table3(
    entity: Annotated[str, typer.Argument(help="The name of somebody or something.", show_default=False)],
    layers: LowerLayersOption = None,
    target_layers: TargetLayersOption = "same",
    target: TargetOption = None,
    target_at: TargetAtOption = None,
    target_at_index: TargetAtIndexOption = None,
    at: Annotated[
        str | None,
        typer.Option(help="Which token of the name is read: its text, an index, or last.", show_default="last"),
    ] = None,
    at_index: AtIndexOption = None,
    before: BeforeOption = None,
    new_tokens: NewTokensOption = 20,
    stop_at_comma: StopAtCommaOption = False,
    reference: Annotated[
        str | None, typer.Option(help="A description to score the continuations against, by ROUGE-L.")
    ] = None,
    memory: MemoryOption = 1.0,
    model: ModelOption = "smollm2",
    revision: RevisionOption = None,
    dtype: DtypeOption = Dtype.auto,
    device: DeviceOption = None,
    device_map: DeviceMapOption = None,
    out_folder: OutOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the table as JSON.")] = False,
) -> None:
    """Table 3: how the name of one entity is resolved, layer by layer, in the model's own words.

    The state of the name's last token is patched over the placeholder of a prompt that describes entities. The last
    row is the control: the placeholder alone.
    """
    chosen, to, budget = parse_layers(layers), parse_target_layers(target_layers), parse_memory(memory)
    read, text = parse_one_position(at, at_index, entity), target_text(target)
    folder = run_folder("table3", out_folder)
    lm = load_model(model, dtype, device, device_map, revision)

    import pscope
    from pscope.experiments.entity_resolution import describe_layers, name_prompt
    from pscope.experiments.grid import layer_pairs

    pairs = layer_pairs(lm, chosen, to)
    source_prompt = name_prompt(lm, entity, before, read)
    patched = target_prompt(lm, text, pscope.ENTITY_DESCRIPTION, target_at, target_at_index)
    scope = pscope.Patchscope(lm, patched, memory=budget)
    decoding = pscope.Decoding(new_tokens, stop=(",",) if stop_at_comma else ())
    table = describe_layers(scope, source_prompt, pairs, decoding, reference)
    settings = {
        "entity": entity,
        "source": source_prompt.text,
        "source_position": source_prompt.position,
        "reference": reference,
        "target": scope.target.text,
        "target_positions": scope.target.positions,
        "pairs": pairs,
        "new_tokens": new_tokens,
        "stop": decoding.stop,
        "memory": budget,
        "revision": revision,
        "path": str(scope.check),
    }
    with started(folder, "table3", lm, settings) as run:
        run.add(table)
    if as_json:
        print_json(table)
    else:
        out.print(_as_table(table, entity, one_target=one_target(pairs), scored=reference is not None))
    tell_sink(source_prompt)
    tell(f"{scope.check}\ntable: {folder / 'table.parquet'}")


def _as_table(table: pd.DataFrame, entity: str, *, one_target: bool, scored: bool) -> Table:
    shown = Table(title=literal(entity), title_justify="left")
    shown.add_column("layer", justify="right")
    if not one_target:
        shown.add_column("target layer", justify="right")
    shown.add_column("continuation", overflow="fold")
    if scored:
        shown.add_column("ROUGE-L", justify="right")
    for row in table.itertuples():
        control = row.condition != "patched"
        cells = ["clean" if control else str(row.layer)]
        cells += [] if one_target else ["" if control else str(row.target_layer)]
        cells += [literal(" ".join(row.continuation.split()))]
        cells += [f"{row.rouge_l:.2f}"] if scored else []
        shown.add_row(*cells, style="dim" if control else None)
    return shown
