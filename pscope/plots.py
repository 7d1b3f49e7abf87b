"""Figures from tidy tables: table in, matplotlib figure out."""

from __future__ import annotations

import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pscope.entities import ALL
from pscope.experiments.entity_resolution import ANOTHER, PATCHED, RANDOM, WRITTEN_OUT
from pscope.experiments.entity_resolution import CLEAN as CLEAN_TARGET
from pscope.experiments.layer_readout import CLEAN, LOGIT_LENS, PATCHSCOPE

_MEASURES = {"precision_at_1": "Precision@1", "surprisal": "Surprisal (nats)"}


def next_token_figure(summary: pd.DataFrame, title: str) -> Figure:
    """Figure 2 from `next_token.summarise`: precision@1 and surprisal over the layers, one line and band per lens."""
    with sns.axes_style("whitegrid"), sns.plotting_context("notebook"):
        figure = Figure(figsize=(11, 4.2), layout="constrained")
        for axes, (measure, label) in zip(figure.subplots(1, 2), _MEASURES.items(), strict=True):
            sns.lineplot(summary, x="layer", y=measure, hue="lens", style="lens", errorbar=None, ax=axes)
            for line, (_, band) in zip(axes.get_lines(), summary.groupby("lens", sort=False), strict=False):
                _fill(axes, band["layer"], band[f"{measure}_low"], band[f"{measure}_high"], line.get_color())
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


def entity_figure(summary: pd.DataFrame, title: str) -> Figure:
    """Figure 3 from `entity_resolution.summarise`: mean ROUGE-L of the descriptions over the source layers.

    On the left each group of entities, with its ceiling, the name written out; on the right all entities beside the
    controls. With several target layers for a source layer it is a heatmap for each group: source on x, target on y.
    """
    patched = summary[summary["condition"] == PATCHED]
    if patched.duplicated(["group", "layer"]).any():
        return _entity_heatmaps(patched, title)
    with sns.axes_style("whitegrid"), sns.plotting_context("notebook"):
        figure = Figure(figsize=(11, 5.2), layout="constrained")
        by_group, by_condition = figure.subplots(1, 2, sharey=True)
        colours = sns.color_palette("deep")
        groups = [group for group in dict.fromkeys(summary["group"]) if group != ALL] or [ALL]
        for group, colour in zip(groups, sns.color_palette("deep", len(groups)), strict=True):
            rows = summary[summary["group"] == group]
            _line(by_group, rows, PATCHED, colour, group)
            _line(by_group, rows, WRITTEN_OUT, colour, f"{group}, {WRITTEN_OUT}", linestyle="--")
        everything = summary[summary["group"] == ALL]
        for condition, colour, style in (
            (PATCHED, colours[2], "-"),
            (WRITTEN_OUT, colours[2], "--"),
            (ANOTHER, colours[3], "-"),
            (RANDOM, colours[4], "-"),
            (CLEAN_TARGET, colours[7], ":"),
        ):
            _line(by_condition, everything, condition, colour, condition, linestyle=style)
        by_group.set(title="groups", ylabel="ROUGE-L")
        by_condition.set(title="all entities and controls")
        for axes in (by_group, by_condition):
            axes.set(xlabel="Layer of the hidden state", ylim=(0, None))
            axes.legend(title=None, fontsize="small", ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.15))
        figure.suptitle(_drawable(title))
    return figure


def _entity_heatmaps(patched: pd.DataFrame, title: str) -> Figure:
    groups = list(dict.fromkeys(patched["group"]))
    highest = patched["rouge_l"].max()
    with sns.axes_style("white"), sns.plotting_context("notebook"):
        figure = Figure(figsize=(1 + 4.5 * len(groups), 5), layout="constrained")
        for axes, group in zip(figure.subplots(1, len(groups), squeeze=False)[0], groups, strict=True):
            cells = patched[patched["group"] == group].pivot(index="target_layer", columns="layer", values="rouge_l")
            cells = cells.astype(float).sort_index(ascending=False)
            sns.heatmap(cells, cmap="crest", vmin=0, vmax=highest, cbar_kws={"label": "ROUGE-L"}, ax=axes)
            axes.set(title=_drawable(group), xlabel="Source layer", ylabel="Target layer")
        figure.suptitle(_drawable(title))
    return figure


def _line(axes: Axes, summary: pd.DataFrame, condition: str, colour: tuple, label: str, linestyle: str = "-") -> None:
    """One condition over the layers with its band; level where it belongs to no layer."""
    rows = summary[summary["condition"] == condition]
    if rows.empty:
        return
    if rows["layer"].isna().all():
        layers = summary["layer"].dropna()
        rows = pd.concat([rows.assign(layer=layers.min()), rows.assign(layer=layers.max())])
    layers = rows["layer"].astype(int)
    axes.plot(layers, rows["rouge_l"], color=colour, linestyle=linestyle, label=_drawable(label))
    _fill(axes, layers, rows["low"], rows["high"], colour)


def _fill(axes: Axes, x: pd.Series, low: pd.Series, high: pd.Series, colour: str | tuple) -> None:
    axes.fill_between(x, low.astype(float), high.astype(float), color=colour, alpha=0.2, linewidth=0)


def _drawable(text: str) -> str:
    """Text that matplotlib draws as it stands: a dollar sign would start a formula."""
    return text.replace("$", r"\$")
