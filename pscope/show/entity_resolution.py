"""Figure 3."""

from __future__ import annotations

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from pscope.experiments.entity_resolution import ANOTHER, CLEAN, PATCHED, RANDOM, WRITTEN_OUT
from pscope.inputs.entities import ALL
from pscope.show.common import drawable, fill, label_layers, layer_heatmaps


def entity_figure(summary: pd.DataFrame, title: str) -> Figure:
    """Figure 3 from `entity_resolution.summarise`: mean ROUGE-L of the descriptions over the source layers.

    On the left each group of entities, with its ceiling, the name written out, and the bands of up to ten of them; on
    the right all entities beside the controls. With several target layers for a source layer it is a heatmap for each
    group: source on x, target on y.
    """
    patched = summary[summary["condition"] == PATCHED]
    if patched.duplicated(["group", "layer"]).any():
        return _heatmaps(patched, title)
    with sns.axes_style("whitegrid"), sns.plotting_context("notebook"):
        groups = [group for group in dict.fromkeys(summary["group"]) if group != ALL] or [ALL]
        # Two entries in a line of the legend: those of all groups and the ceiling, or the five of the controls.
        figure = Figure(figsize=(11, 4.5 + 0.25 * max(3, len(groups) // 2 + 1)), layout="constrained")
        by_group, by_condition = figure.subplots(1, 2, sharey=True)
        colours = sns.color_palette("deep")
        crowded = len(groups) > len(colours)
        for group, colour in zip(groups, sns.color_palette("husl" if crowded else "deep", len(groups)), strict=True):
            # Of so many bands none could be told from the others.
            rows = summary[summary["group"] == group].assign(
                **dict.fromkeys(("low", "high"), np.nan) if crowded else {}
            )
            name = group if len(group) <= 24 else f"{group[:23]}…"
            _line(by_group, rows, PATCHED, colour, name)
            _line(by_group, rows, WRITTEN_OUT, colour, f"{name}, {WRITTEN_OUT}", linestyle="--")
        everything = summary[summary["group"] == ALL]
        for condition, colour, style in (
            (PATCHED, colours[2], "-"),
            (WRITTEN_OUT, colours[2], "--"),
            (ANOTHER, colours[3], "-"),
            (RANDOM, colours[4], "-"),
            (CLEAN, colours[7], ":"),
        ):
            _line(by_condition, everything, condition, colour, condition, linestyle=style)
        by_group.set(title="groups", ylabel="ROUGE-L")
        by_condition.set(title="all entities and controls")
        entries = [line for line in by_group.get_lines() if line.get_linestyle() == "-"]
        entries.append(Line2D([], [], color="grey", linestyle="--", label=WRITTEN_OUT))
        for axes, handles in ((by_group, entries), (by_condition, by_condition.get_lines())):
            axes.set(ylim=(0, None))
            label_layers(axes, "Layer of the hidden state")
            options = {"fontsize": "small", "ncols": 2, "loc": "upper center", "bbox_to_anchor": (0.5, -0.15)}
            axes.legend(handles=handles, **options)
        figure.suptitle(drawable(title))
    return figure


def _heatmaps(patched: pd.DataFrame, title: str) -> Figure:
    by_group = {
        group: rows.set_index(["layer", "target_layer"])["rouge_l"]
        for group, rows in patched.groupby("group", sort=False)
    }
    return layer_heatmaps(by_group, "ROUGE-L", title)


def _line(axes: Axes, summary: pd.DataFrame, condition: str, colour: tuple, label: str, linestyle: str = "-") -> None:
    """One condition over the layers with its band; level where it belongs to no layer."""
    rows = summary[summary["condition"] == condition]
    if rows.empty:
        return
    if rows["layer"].isna().all():
        layers = summary["layer"].dropna()
        rows = pd.concat([rows.assign(layer=layers.min()), rows.assign(layer=layers.max())])
    layers = rows["layer"].astype(int)
    axes.plot(layers, rows["rouge_l"], color=colour, linestyle=linestyle, label=drawable(label))
    fill(axes, layers, rows["low"], rows["high"], colour)
