"""What figures share: heatmaps over layers, and text that is drawn as it stands."""

from __future__ import annotations

import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pscope.characters import visible
from pscope.show.theme import PAGE, SHADES, drawing

MEASURES = {"precision_at_1": "Precision@1", "surprisal": "Surprisal (nats)"}
"""What is told of decoded tokens, as axes name it."""


def layer_heatmaps(table: pd.DataFrame, by: str, value: str, label: str, on: str, columns: int = 5) -> Figure:
    """One heatmap for each value of the column `by`, all of one scale: source layers on x, target layers on y, upwards.

    They show the mean of the column `value`, of which `label` says what it is.
    """
    grids = {
        name: rows.astype({value: float}).pivot_table(value, "target_layer", "layer").sort_index(ascending=False)
        for name, rows in table.groupby(by, sort=False)
    }
    rows = -(-len(grids) // columns)
    columns = min(columns, len(grids))
    highest = max(grid.max().max() for grid in grids.values())
    side = min(2.4, PAGE / columns)
    first, *others = grids.values()
    every = all(len(axis) == axis.max() - axis.min() + 1 for grid in grids.values() for axis in grid.axes)
    alike = all(all(map(pd.Index.equals, grid.axes, first.axes)) for grid in others)
    with drawing(0.7 + side * columns, 0.7 + side * rows, "white") as figure:
        panels = figure.subplots(rows, columns, squeeze=False).flatten()
        for axes, (name, grid) in zip(panels, grids.items(), strict=False):
            sns.heatmap(grid, cmap=SHADES, vmin=0, vmax=highest, cbar=False, ax=axes, xticklabels=1, yticklabels=1)
            axes.set(title=drawable(name), xlabel="Source layer", ylabel="Target layer")
            _round_ticks(axes, list(grid.columns), list(grid.index))
            if alike:
                axes.label_outer()
        for axes in panels[len(grids) :]:
            axes.remove()
        figure.colorbar(panels[0].collections[0], ax=panels[: len(grids)].tolist(), label=label, aspect=40, shrink=0.8)
        figure.suptitle(titled(f"{label}, at {'every pair' if every else 'pairs'} of layers", on))
    return figure


def _round_ticks(axes: Axes, columns: list[int], rows: list[int]) -> None:
    """From the lowest layer on so many that each can be read."""
    for axis, layers in ((axes.xaxis, columns), (axes.yaxis, rows)):
        step = -(-len(layers) // 7)
        places = [place for place, layer in enumerate(layers) if sorted(layers).index(layer) % step == 0]
        axis.set_ticks([place + 0.5 for place in places], [str(layers[place]) for place in places], rotation=0)


def titled(subject: str, on: str) -> str:
    """A title: the subject, and below it on what it was seen, where that is known."""
    return drawable(f"{subject}\n{on}" if on else subject)


def drawable(text: str) -> str:
    """Text that matplotlib draws as it stands, and that every reader of an SVG can parse.

    A dollar sign would start a formula, and a label that begins with an underscore is left out of legends.
    """
    text = visible(text).replace("$", r"\$")
    return f"\u200b{text}" if text.startswith("_") else text
