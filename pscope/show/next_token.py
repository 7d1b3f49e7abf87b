"""Figure 2, drawn and as a table."""

from __future__ import annotations

import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from rich.table import Table

from pscope.show.common import drawable, fill, label_layers
from pscope.show.tables import literal, narrow_table, with_band

BANDED = 3
"""So many lenses have room for their bands in 80 columns."""

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


def next_token_tables(summary: pd.DataFrame) -> list[Table]:
    """For each measure, layers down and the lenses side by side, each with its band where there is room for it."""
    lenses = list(dict.fromkeys(summary["lens"]))
    banded = len(lenses) <= BANDED
    told = "mean (95 % band from resampling texts)" if banded else "mean; bands are in summary.csv"
    tables = []
    for measure, label, digits in (("precision_at_1", "precision@1", 2), ("surprisal", "surprisal in nats", 1)):
        shown = narrow_table(f"{label}: {told}")
        shown.add_column("layer", justify="right", no_wrap=True)
        for lens in lenses:
            shown.add_column(literal(lens), justify="right")
        columns = [f"{measure}{bound}" for bound in ("", "_low", "_high")]
        for layer, row in summary.pivot(index="layer", columns="lens", values=columns).iterrows():
            cells = []
            for lens in lenses:
                mean, *band = (row[column, lens] for column in columns)
                cell = with_band(mean, *(band if banded else (float("nan"),) * 2), digits)
                # A lens need not read all layers.
                cells.append(cell if mean == mean else "")
            shown.add_row(str(layer), *cells)
        tables.append(shown)
    return tables
