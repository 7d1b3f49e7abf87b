"""Figure 4: how often each way of asking a multi-hop query gives the answer, and where patching does."""

from __future__ import annotations

import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from pscope.experiments.multi_hop import PATCHED, WIRINGS
from pscope.show.common import drawable, layer_heatmaps


def answers_figure(summary: pd.DataFrame, title: str) -> Figure:
    """From `multi_hop.summarise`: a bar with its 95 % band for every measure of every method."""
    labels = list(dict.fromkeys(summary["measure"]))
    with sns.axes_style("whitegrid"), sns.plotting_context("notebook"):
        figure = Figure(figsize=(8.5, 1.6 + 0.36 * len(summary)), layout="constrained")
        axes = figure.subplots()
        places = range(len(summary))[::-1]
        colours = dict(zip(labels, sns.color_palette("deep"), strict=False))
        bars = summary.assign(place=places)
        for measure in labels:
            here = bars[bars["measure"] == measure]
            # Where a band has no width, rounding may put it beside its mean.
            error = [(here["found"] - here["low"]).clip(lower=0), (here["high"] - here["found"]).clip(lower=0)]
            options = {"label": drawable(measure), "color": colours[measure], "capsize": 3}
            axes.barh(here["place"], here["found"], xerr=error, **options)
        axes.set_yticks(places, [drawable(method) for method in summary["method"]])
        axes.set(xlabel="Share of queries answered", xlim=(0, 1))
        figure.legend(loc="outside lower center", ncols=2)
        figure.suptitle(drawable(title))
    return figure


def answers_heatmaps(table: pd.DataFrame, title: str) -> Figure:
    """From the table of `multi_hop.correct`: the share of queries answered at every (ℓ, ℓ*), per wiring."""
    patched = table[(table["condition"] == PATCHED) & table["method"].isin(WIRINGS)].astype({"found": float})
    means = {
        wiring: rows.groupby(["layer", "target_layer"])["found"].mean()
        for wiring, rows in patched.groupby("method", sort=False)
    }
    return layer_heatmaps(means, "Share of queries answered", title)
