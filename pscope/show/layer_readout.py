"""Figure 1, drawn and as a table."""

from __future__ import annotations

import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from rich.table import Table

from pscope.experiments.layer_readout import LOGIT_LENS, PATCHSCOPE
from pscope.experiments.sweep import CLEAN
from pscope.show.common import drawable
from pscope.show.tables import literal


def layer_readout_figure(table: pd.DataFrame, title: str) -> Figure:
    """Figure 1 from the table of `layer_readout`: the most probable token of each layer, shaded by its probability."""
    best = table[table["rank"] == 1].assign(
        layer=lambda frame: frame["layer"].astype("string").fillna(CLEAN),
        reading=lambda frame: frame["reading"].replace(CLEAN, PATCHSCOPE),
    )
    order = list(dict.fromkeys(best["layer"]))
    shade, spoken = (best.pivot(index="layer", columns="reading", values=value) for value in ("probability", "token"))
    columns = [PATCHSCOPE, LOGIT_LENS]
    labels = spoken.loc[order, columns].map(lambda token: "" if pd.isna(token) else drawable(repr(token)[1:-1]))
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
            axes.text(2.04, place + 0.5, drawable(repr(text)[1:-1]), va="center", fontsize="small")
        axes.text(2.04, -0.25, "patchscope goes on", fontsize="medium")
        axes.tick_params(axis="y", rotation=0)
        axes.xaxis.tick_top()
        axes.set(xlabel=None, ylabel="Layer")
        figure.suptitle(drawable(title))
    return figure


def readout_table(table: pd.DataFrame, title: str) -> Table:
    """The same for a terminal: what each layer says, by Patchscope and by logit lens, the control last."""
    shown = Table(title=literal(title), title_justify="left")
    for column in ("layer", PATCHSCOPE, "goes on", LOGIT_LENS):
        shown.add_column(column, justify="right" if column == "layer" else "left", overflow="fold")
    patched, lens = (
        table[table["reading"].isin(readings)].groupby(table["layer"].fillna(-1), sort=False)
        for readings in ((PATCHSCOPE, CLEAN), (LOGIT_LENS,))
    )
    lens_cells = {layer: _cell(rows) for layer, rows in lens}
    for layer, rows in patched:
        control = layer < 0
        shown.add_row(
            "clean" if control else str(layer),
            _cell(rows),
            _quoted(rows["continuation"].iloc[0]),
            lens_cells.get(layer, ""),
            style="dim" if control else None,
        )
    return shown


def _cell(rows: pd.DataFrame) -> str:
    return "  ".join(f"{_quoted(token)} {p:.2f}" for token, p in zip(rows["token"], rows["probability"], strict=True))


def _quoted(text: str) -> str:
    return literal(repr(text))
