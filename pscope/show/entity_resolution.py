"""Figure 3 and Table 3, drawn and as tables."""

from __future__ import annotations

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from rich.table import Table

from pscope.experiments.cross_model import MEAN, SHUFFLED
from pscope.experiments.entity_resolution import ANOTHER, WRITTEN_OUT
from pscope.experiments.entity_resolution_across import SOURCE_ITSELF, TARGET_ITSELF
from pscope.experiments.sweep import CLEAN, PATCHED, RANDOM
from pscope.inputs.entities import ALL
from pscope.show.common import drawable, layer_heatmaps, titled
from pscope.show.tables import literal, narrow_table, one_line, with_band
from pscope.show.theme import (
    BLUE,
    BROWN,
    GREEN,
    GREY,
    INK,
    ORANGE,
    PAGE,
    PALE_PINK,
    PINK,
    SKY,
    VERMILION,
    Look,
    drawing,
    fill,
    label_layers,
    plot,
)

_GROUPS = [Look(ORANGE, "-", "^"), Look(GREEN, "-", "D"), Look(BROWN, "-", "P"), Look(PINK, "-", "X")]
"""Groups of entities: none of these colours is that of a condition of the same figure."""

_LOOKS = {
    PATCHED: Look(BLUE, "-", "o"),
    WRITTEN_OUT: Look(BLUE, "--"),
    ANOTHER: Look(VERMILION, "-", "v"),
    RANDOM: Look(GREY, "-", "s"),
    CLEAN: Look(INK, ":"),
    SOURCE_ITSELF: Look(SKY, "-.", "<"),
    TARGET_ITSELF: Look(PALE_PINK, "-.", ">"),
    MEAN: Look((0.45, 0.25, 0.6), "--", "d"),
    SHUFFLED: Look((0.5, 0.5, 0), "--", "x"),
}


def entity_figure(summary: pd.DataFrame, on: str = "") -> Figure:
    """Figure 3 from `entity_resolution.summarise`: mean ROUGE-L of the descriptions over the source layers.

    On the left each group of entities, with its ceiling, the name written out, and the bands of up to four of them; on
    the right all entities beside the controls. With several target layers for a source layer it is a heatmap for each
    group: source on x, target on y.
    """
    patched = summary[summary["condition"] == PATCHED]
    if patched.duplicated(["group", "layer"]).any():
        return layer_heatmaps(patched, "group", "rouge_l", "ROUGE-L", on)
    groups = [group for group in dict.fromkeys(summary["group"]) if group != ALL] or [ALL]
    crowded = len(groups) > len(_GROUPS)
    looks = sns.color_palette("husl", len(groups)) if crowded else _GROUPS
    everything = summary[summary["group"] == ALL]
    controls = [condition for condition in _LOOKS if (everything["condition"] == condition).any()]
    # Two entries stand in a line of each legend.
    with drawing(PAGE, 2.6 + 0.16 * max(-(-(1 + len(groups)) // 2), -(-len(controls) // 2))) as figure:
        by_group, by_condition = figure.subplots(1, 2, sharey=True)
        for group, look in zip(groups, looks, strict=False):
            rows = summary[summary["group"] == group]
            if crowded:
                # Of so many bands none could be told from the others.
                look, rows = Look(look), rows.assign(low=np.nan, high=np.nan)
            name = group if len(group) <= 24 else f"{group[:23]}…"
            _line(by_group, rows, PATCHED, look, name)
            _line(by_group, rows, WRITTEN_OUT, Look(look.colour, "--"), f"{name}, {WRITTEN_OUT}")
        for condition in controls:
            _line(by_condition, everything, condition, _LOOKS[condition], condition)
        by_group.set(title="each group", ylabel="ROUGE-L")
        by_condition.set(title="all entities, and the controls")
        entries = [line for line in by_group.get_lines() if line.get_linestyle() == "-"]
        entries.append(Line2D([], [], color="grey", linestyle="--", label=WRITTEN_OUT))
        for axes, handles in ((by_group, entries), (by_condition, by_condition.get_lines())):
            axes.set(ylim=(0, None))
            label_layers(axes, "Layer of the hidden state")
            axes.legend(handles=handles, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.2))
        figure.suptitle(titled("How well entities are described from the states of their names", on))
    return figure


def _line(axes: Axes, summary: pd.DataFrame, condition: str, look: Look, label: str) -> None:
    """One condition over the layers with its band; level where it belongs to no layer."""
    rows = summary[summary["condition"] == condition]
    if rows.empty:
        return
    if rows["layer"].isna().all():
        layers = summary["layer"].dropna()
        rows = pd.concat([rows.assign(layer=layers.min()), rows.assign(layer=layers.max())])
    layers = rows["layer"].astype(int)
    plot(axes, layers, rows["rouge_l"], look, drawable(label))
    fill(axes, layers, rows["low"], rows["high"], look)


def resolution_table(table: pd.DataFrame, entity: str, *, scored: bool) -> Table:
    """Table 3: what each layer says of one entity, the control last."""
    several = not _one_target(table.dropna(subset=["layer"]))
    view = Table(title=literal(entity), title_justify="left")
    view.add_column("layer", justify="right")
    if several:
        view.add_column("target layer", justify="right")
    view.add_column("continuation", overflow="fold")
    if scored:
        view.add_column("ROUGE-L", justify="right")
    for row in table.itertuples():
        control = row.condition != PATCHED
        cells = ["clean" if control else str(row.layer)]
        cells += ["" if control else str(row.target_layer)] if several else []
        cells += [one_line(row.continuation)]
        cells += [f"{row.rouge_l:.2f}"] if scored else []
        view.add_row(*cells, style="dim" if control else None)
    return view


def layers_tables(summary: pd.DataFrame) -> list[Table]:
    """Layers down; the groups with their bands side by side. Last what belongs to no layer. None of several targets.

    Three of them fit in 80 columns, and in the last table the controls beside them.
    """
    if not _one_target(summary[summary["condition"] == PATCHED]):
        return []
    groups = list(dict.fromkeys(summary["group"]))
    rows = summary.set_index(["condition", "group", "layer"])[["rouge_l", "low", "high"]].to_dict("index")
    level = summary[summary["layer"].isna()].set_index(["condition", "group"]).to_dict("index")
    tables = []
    for first in range(0, len(groups), 3):
        part = groups[first : first + 3]
        last = part[-1] == groups[-1]
        controls = (ANOTHER, RANDOM) if last else ()
        table = narrow_table(
            "mean ROUGE-L (95 % band from resampling entities); controls: of all entities" if last else "", tight=True
        )
        table.add_column("layer", justify="right", no_wrap=True)
        for group in part:
            table.add_column(literal(group), justify="right", overflow="fold", max_width=16)
        for control in controls:
            table.add_column(control.replace(" ", "\n"), justify="right")
        for layer in sorted(summary["layer"].dropna().unique()):
            means = [_banded(rows[PATCHED, group, layer]) for group in part]
            others = [rows.get((control, ALL, layer)) for control in controls]
            table.add_row(str(layer), *means, *("" if cell is None else f"{cell['rouge_l']:.2f}" for cell in others))
        for condition, label in ((CLEAN, "clean"), (WRITTEN_OUT, "written out")):
            table.add_row(label, *(_banded(level[condition, group]) for group in part), style="dim")
        tables.append(table)
    return tables


def across_table(summary: pd.DataFrame) -> Table:
    """Layers down; one model that describes from states of another, beside each by itself, and its own controls."""
    everything = summary[(summary["group"] == ALL) & summary["layer"].notna()]
    conditions = [PATCHED, SOURCE_ITSELF, TARGET_ITSELF, MEAN, SHUFFLED]
    means = {
        condition: rows.set_index(["layer", "target_layer"])["rouge_l"].to_dict()
        for condition, rows in everything.groupby("condition")
    }
    table = narrow_table("mean ROUGE-L of all entities")
    table.add_column("layer", justify="right", no_wrap=True)
    for condition in conditions:
        table.add_column(condition.replace(" ", "\n", 1), justify="right")
    patched = everything[everything["condition"] == PATCHED]
    for layer, target in sorted(set(zip(patched["layer"], patched["target_layer"], strict=True))):
        at = {SOURCE_ITSELF: (layer, layer), TARGET_ITSELF: (target, target)}
        cells = [means[condition][at.get(condition, (layer, target))] for condition in conditions]
        table.add_row(_pair(layer, target), *(f"{mean:.3f}" for mean in cells))
    return table


def best_table(best: pd.DataFrame) -> Table:
    """Where each group is described best, chosen on one half of it and reported on the other."""
    table = narrow_table("the maximum is an oracle: chosen on the entities that it is reported on")
    for column in ("entities", "best layer\non one half", "ROUGE-L on\nthe other half", "maximum", "at layer"):
        table.add_column(column, justify="left" if column == "entities" else "right", overflow="fold")
    for row in best.itertuples():
        table.add_row(
            literal(row.group),
            _pair(row.layer, row.target_layer),
            f"{row.held_out:.3f}",
            f"{row.maximum:.3f}",
            _pair(row.maximum_layer, row.maximum_target_layer),
        )
    return table


def _pair(layer: int, target: int) -> str:
    return str(layer) if layer == target else f"{layer} → {target}"


def _one_target(rows: pd.DataFrame) -> bool:
    """Whether each layer is patched into one layer only, so that it need not be told which."""
    return len(rows[["layer", "target_layer"]].drop_duplicates()) == rows["layer"].nunique()


def _banded(mean: dict[str, float]) -> str:
    return with_band(mean["rouge_l"], mean["low"], mean["high"])
