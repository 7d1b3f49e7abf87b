"""Figure 2, drawn and as a table."""

from __future__ import annotations

import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from rich.table import Table

from pscope.show.common import drawable, fill, label_layers
from pscope.show.tables import narrow_table, with_band

_MEASURES = {"precision_at_1": "Precision@1", "surprisal": "Surprisal (nats)"}


def next_token_figure(summary: pd.DataFrame, title: str) -> Figure:
    """Figure 2 from `next_token.summarise`: precision@1 and surprisal over the layers, one line and band per lens."""
    with sns.axes_style("whitegrid"), sns.plotting_context("notebook"):
        figure = Figure(figsize=(11, 4.2), layout="constrained")
        for axes, (measure, label) in zip(figure.subplots(1, 2), _MEASURES.items(), strict=True):
            sns.lineplot(summary, x="layer", y=measure, hue="lens", style="lens", errorbar=None, ax=axes)
            for line, (_, band) in zip(axes.get_lines(), summary.groupby("lens", sort=False), strict=False):
                fill(axes, band["layer"], band[f"{measure}_low"], band[f"{measure}_high"], line.get_color())
            axes.set(ylabel=label, ylim=(0, None))
            label_layers(axes, "Layer of the hidden state")
            axes.legend(title=None)
        figure.suptitle(drawable(title))
    return figure


def next_token_table(summary: pd.DataFrame) -> Table:
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
                cells.append(with_band(*(row[f"{measure}{bound}", lens] for bound in ("", "_low", "_high")), digits))
        shown.add_row(str(layer), *cells)
    return shown
