"""What figures share: bands, heatmaps over layers, text that is drawn as it stands."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pscope.characters import visible


def fill(axes: Axes, x: pd.Series, low: pd.Series, high: pd.Series, colour: str | tuple) -> None:
    """The band around a line."""
    axes.fill_between(x, low.astype(float), high.astype(float), color=colour, alpha=0.2, linewidth=0)


def label_layers(axes: Axes, label: str) -> None:
    """Layers on x, of which there are whole ones only."""
    axes.set_xlabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def layer_heatmaps(cells: Mapping[str, pd.Series], label: str, title: str, columns: int = 5) -> Figure:
    """One heatmap per panel, all of one scale: source layers on x, target layers on y, upwards.

    `cells` are, by the title of the panel, values indexed by `layer` and `target_layer`.
    """
    rows = -(-len(cells) // columns)
    columns = min(columns, len(cells))
    highest = max(values.max() for values in cells.values())
    with sns.axes_style("white"), sns.plotting_context("notebook"):
        figure = Figure(figsize=(1.5 + 3.4 * columns, 0.6 + 3.2 * rows), layout="constrained")
        panels = figure.subplots(rows, columns, squeeze=False).flatten()
        for axes, (name, values) in zip(panels, cells.items(), strict=False):
            grid = values.astype(float).unstack("layer").sort_index(ascending=False)
            sns.heatmap(grid, cmap="crest", vmin=0, vmax=highest, cbar=False, ax=axes)
            axes.set(title=drawable(name), xlabel="Source layer", ylabel="Target layer")
            axes.tick_params(axis="y", rotation=0)
        for axes in panels[len(cells) :]:
            axes.remove()
        figure.colorbar(panels[0].collections[0], ax=panels[: len(cells)].tolist(), label=label, aspect=40, shrink=0.8)
        figure.suptitle(drawable(title))
    return figure


def drawable(text: str) -> str:
    """Text that matplotlib draws as it stands, and that every reader of an SVG can parse.

    A dollar sign would start a formula, and a label that begins with an underscore is left out of legends.
    """
    text = visible(text).replace("$", r"\$")
    return f"\u200b{text}" if text.startswith("_") else text
