"""`pscope fig3`: how well entities are described from each layer."""

from __future__ import annotations

from dataclasses import asdict
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
    literal,
    load_model,
    narrow_table,
    out,
    parse_layers,
    parse_memory,
    parse_target_layers,
    run_folder,
    seed_option,
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
from pscope.cli.prompts import TargetAtIndexOption, TargetAtOption, TargetOption, target_prompt, target_text
from rich.table import Table

from pscope.errors import PscopeError

if TYPE_CHECKING:
    import pandas as pd


def fig3(
    entities: Annotated[
        Path | None,
        typer.Argument(
            help='A .json, .jsonl or .csv file of "entity", "reference" and perhaps "group".',
            show_default="those that ship",
        ),
    ] = None,
    layers: LowerLayersOption = None,
    target_layers: TargetLayersOption = "same",
    target: TargetOption = None,
    target_at: TargetAtOption = None,
    target_at_index: TargetAtIndexOption = None,
    before: BeforeOption = None,
    new_tokens: NewTokensOption = 20,
    stop_at_comma: StopAtCommaOption = True,
    seed: Annotated[int, seed_option("the order, the random vectors, the halves and the bands")] = 0,
    memory: MemoryOption = 1.0,
    model: ModelOption = "smollm2",
    revision: RevisionOption = None,
    dtype: DtypeOption = Dtype.auto,
    device: DeviceOption = None,
    device_map: DeviceMapOption = None,
    out_folder: OutOption = None,
) -> None:
    """Figure 3: how well entities are described from each layer, by ROUGE-L against references.

    Every entity's state is patched over the placeholder of a prompt that describes entities. Beside it stand the
    controls: another entity's state, a random vector of the same norm, the placeholder alone, and, as the ceiling,
    the name written out in its place.
    """
    chosen, to, budget = parse_layers(layers), parse_target_layers(target_layers), parse_memory(memory)
    text = target_text(target)
    folder = run_folder("fig3", out_folder)

    from pscope.inputs.entities import read_entities, shipped_entities, without_demonstrated

    listed = shipped_entities() if entities is None else read_entities(entities)
    lm = load_model(model, dtype, device, device_map, revision)

    import pscope
    from pscope.experiments.entity_resolution import best_layers, describe_entities, name_prompt, rows_of, summarise
    from pscope.experiments.grid import layer_pairs
    from pscope.show.entity_resolution import entity_figure

    pairs = layer_pairs(lm, chosen, to)
    patched = target_prompt(lm, text, pscope.ENTITY_DESCRIPTION, target_at, target_at_index)
    kept, demonstrated = without_demonstrated(listed, patched)
    if not kept:
        raise PscopeError("no entity is left: the target prompt speaks of all of them")
    scope = pscope.Patchscope(lm, patched, memory=budget)
    decoding = pscope.Decoding(new_tokens, stop=(",",) if stop_at_comma else ())
    described = describe_entities(scope, kept, pairs, decoding, before=before, seed=seed)
    at_sink = sum(name_prompt(lm, entity.name, before).at_sink for entity in kept)
    settings = {
        "entities": str(entities or "shipped with pscope"),
        "entities_sha256": digest(repr(asdict(entity)) for entity in kept),
        "left_out": [entity.name for entity in demonstrated],
        "pairs": pairs,
        "target": patched.text,
        "target_positions": patched.positions,
        "before": before,
        "new_tokens": new_tokens,
        "stop": decoding.stop,
        "seed": seed,
        "memory": budget,
        "revision": revision,
        "path": str(scope.check),
    }
    if demonstrated:
        names = ", ".join(entity.name for entity in demonstrated)
        tell(f"left out, since the target prompt speaks of them: {names}")
    if at_sink:
        tell(f"{at_sink} of {len(kept)} names are read at the very first token, where models keep an attention sink")
    tell(str(scope.check))
    with started(folder, "fig3", lm, settings) as run:
        # Those that belong to no layer are few, and most of the controls are free.
        rows = rows_of(kept, pairs) - 2 * len(kept)
        table = collect(run, described, rows, lambda chunk: int(chunk["layer"].notna().sum()))
        summary, best = summarise(table, seed), best_layers(table, seed)
        run.note("summary", summary)
        run.note("best_layers", best)
        figure = run.draw(entity_figure(summary, f"{lm.name}, {len(kept)} entities"))
    if one_target(pairs):
        out.print(*_layers_tables(summary))
    if len(best):
        out.print(_best_table(best))
    tell(f"table: {run.folder / 'table.parquet'}\nfigure: {figure}")


def _layers_tables(summary: pd.DataFrame) -> list[Table]:
    """Layers down; the groups with their bands side by side. Last what belongs to no layer.

    Three of them fit in 80 columns, and in the last table the controls beside them.
    """
    from pscope.experiments.entity_resolution import ANOTHER, CLEAN, PATCHED, RANDOM, WRITTEN_OUT
    from pscope.inputs.entities import ALL

    groups = list(dict.fromkeys(summary["group"]))
    rows = summary.set_index(["condition", "group", "layer"])[["rouge_l", "low", "high"]].to_dict("index")
    level = summary[summary["layer"].isna()].set_index(["condition", "group"]).to_dict("index")
    tables = []
    for first in range(0, len(groups), 3):
        part = groups[first : first + 3]
        last = part[-1] == groups[-1]
        controls = (ANOTHER, RANDOM) if last else ()
        shown = narrow_table(
            "mean ROUGE-L (95 % band from resampling entities); controls: of all entities" if last else ""
        )
        # One blank between columns is all that fits.
        shown.padding = 0
        shown.add_column("layer", justify="right", no_wrap=True)
        for group in part:
            shown.add_column(literal(group), justify="right", overflow="fold", max_width=16)
        for control in controls:
            shown.add_column(control.replace(" ", "\n"), justify="right")
        for layer in sorted(summary["layer"].dropna().unique()):
            means = [_with_band(rows[PATCHED, group, layer]) for group in part]
            others = [rows.get((control, ALL, layer)) for control in controls]
            shown.add_row(str(layer), *means, *("" if cell is None else f"{cell['rouge_l']:.2f}" for cell in others))
        for condition, label in ((CLEAN, "clean"), (WRITTEN_OUT, "written out")):
            shown.add_row(label, *(_with_band(level[condition, group]) for group in part), style="dim")
        tables.append(shown)
    return tables


def _with_band(mean: dict[str, float]) -> str:
    band = "" if mean["low"] != mean["low"] else f" ({mean['low']:.2f}–{mean['high']:.2f})"
    return f"{mean['rouge_l']:.2f}{band}"


def _best_table(best: pd.DataFrame) -> Table:
    shown = narrow_table("the maximum is an oracle: chosen on the entities that it is reported on")
    for column in ("entities", "best layer\non one half", "ROUGE-L on\nthe other half", "maximum", "at layer"):
        shown.add_column(column, justify="left" if column == "entities" else "right", overflow="fold")
    for row in best.itertuples():
        shown.add_row(
            literal(row.group),
            _pair(row.layer, row.target_layer),
            f"{row.held_out:.3f}",
            f"{row.maximum:.3f}",
            _pair(row.maximum_layer, row.maximum_target_layer),
        )
    return shown


def _pair(layer: int, target: int) -> str:
    return str(layer) if layer == target else f"{layer} → {target}"
