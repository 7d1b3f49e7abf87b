"""Figure 2."""

from __future__ import annotations

import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from pscope.show.common import drawable, fill, label_layers

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
