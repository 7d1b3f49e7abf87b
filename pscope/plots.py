"""Figures from tidy tables: table in, matplotlib figure out."""

from __future__ import annotations

import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from pscope.experiments.layer_readout import CLEAN, LOGIT_LENS, PATCHSCOPE

_MEASURES = {"precision_at_1": "Precision@1", "surprisal": "Surprisal (nats)"}


def next_token_figure(summary: pd.DataFrame, title: str) -> Figure:
    """Figure 2 from `next_token.summarise`: precision@1 and surprisal over the layers, one line and band per lens."""
    with sns.axes_style("whitegrid"), sns.plotting_context("notebook"):
        figure = Figure(figsize=(11, 4.2), layout="constrained")
        for axes, (measure, label) in zip(figure.subplots(1, 2), _MEASURES.items(), strict=True):
            sns.lineplot(summary, x="layer", y=measure, hue="lens", style="lens", errorbar=None, ax=axes)
            for line, (_, band) in zip(axes.get_lines(), summary.groupby("lens", sort=False), strict=False):
                low, high = band[f"{measure}_low"], band[f"{measure}_high"]
                axes.fill_between(band["layer"], low, high, color=line.get_color(), alpha=0.2, linewidth=0)
            axes.set(xlabel="Layer of the hidden state", ylabel=label, ylim=(0, None))
            axes.legend(title=None)
        figure.suptitle(_drawable(title))
    return figure


def layer_readout_figure(table: pd.DataFrame, title: str) -> Figure:
    """Figure 1 from `layer_readout.read_layers`: the most probable token of each layer, shaded by its probability."""
    best = table[table["rank"] == 1].assign(
        layer=lambda frame: frame["layer"].astype("string").fillna(CLEAN),
        reading=lambda frame: frame["reading"].replace(CLEAN, PATCHSCOPE),
    )
    order = list(dict.fromkeys(best["layer"]))
    shade, spoken = (best.pivot(index="layer", columns="reading", values=value) for value in ("probability", "token"))
    columns = [PATCHSCOPE, LOGIT_LENS]
    labels = spoken.loc[order, columns].map(lambda token: "" if pd.isna(token) else _drawable(repr(token)[1:-1]))
    continuations = best[best["reading"] == PATCHSCOPE].set_index("layer").loc[order, "continuation"]
    with sns.axes_style("white"), sns.plotting_context("notebook"):
        figure = Figure(figsize=(9, 1.4 + 0.3 * len(order)), layout="constrained")
        axes = figure.subplots()
        sns.heatmap(
            shade.loc[order, columns].astype(float),
            annot=labels,
            fmt="",
            cmap="crest",
            vmin=0,
            vmax=1,
            cbar_kws={"label": "Probability", "pad": 0.32},
            ax=axes,
        )
        for place, text in enumerate(continuations):
            axes.text(2.04, place + 0.5, _drawable(repr(text)[1:-1]), va="center", fontsize="small")
        axes.text(2.04, -0.25, "patchscope goes on", fontsize="medium")
        axes.tick_params(axis="y", rotation=0)
        axes.xaxis.tick_top()
        axes.set(xlabel=None, ylabel="Layer")
        figure.suptitle(_drawable(title))
    return figure


def _drawable(text: str) -> str:
    """Text that matplotlib draws as it stands: a dollar sign would start a formula."""
    return text.replace("$", r"\$")
