"""Figure 1, drawn and as a table."""

from __future__ import annotations

from itertools import pairwise

import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from rich.table import Table

from pscope.experiments.layer_readout import PATCHSCOPE
from pscope.experiments.next_token import LOGIT_LENS
from pscope.experiments.sweep import CLEAN
from pscope.show.common import drawable, titled
from pscope.show.tables import literal
from pscope.show.theme import INK, PAGE, SHADES, drawing

ROOM = 64
"""Characters of a continuation that are drawn."""


def layer_readout_figure(table: pd.DataFrame, on: str = "") -> Figure:
    """Figure 1 from the table of `layer_readout`: the most probable token of each layer, shaded by its probability."""
    best = table[table["rank"] == 1].assign(
        layer=lambda frame: frame["layer"].astype("string").fillna(CLEAN),
        reading=lambda frame: frame["reading"].replace(CLEAN, PATCHSCOPE),
    )
    order = list(dict.fromkeys(best["layer"]))
    shade, tokens = (best.pivot(index="layer", columns="reading", values=value) for value in ("probability", "token"))
    columns = [reading for reading in (PATCHSCOPE, LOGIT_LENS) if reading in tokens]
    labels = tokens.loc[order, columns].map(lambda token: "" if pd.isna(token) else drawable(repr(token)[1:-1]))
    continuations = best[best["reading"] == PATCHSCOPE].set_index("layer")["continuation"].reindex(order, fill_value="")
    with drawing(PAGE, 1.1 + 0.17 * len(order), "white") as figure:
        axes, text_axes = figure.subplots(1, 2, sharey=True, width_ratios=(1, 1.6))
        values = shade.loc[order, columns].astype(float)
        sns.heatmap(values, annot=labels, fmt="", cmap=SHADES, vmin=0, vmax=1, cbar=False, ax=axes, yticklabels=1)
        for place, text in enumerate(continuations):
            text_axes.text(0, place + 0.5, _excerpt(text), va="center", fontsize=7, clip_on=True)
        for place, (above, below) in enumerate(pairwise(labels[columns[0]]), 1):
            if above != below:
                axes.axhline(place, xmax=1 / len(columns), color="white", linewidth=1.5)
                text_axes.axhline(place, color=INK, linewidth=0.5)
        axes.tick_params(axis="y", rotation=0)
        for each in (axes, text_axes):
            each.xaxis.tick_top()
            each.tick_params(length=0)
        text_axes.tick_params(labelleft=False)
        text_axes.set_xticks([0], ["the patchscope goes on"], ha="left")
        sns.despine(ax=text_axes, left=True, bottom=True)
        axes.set(xlabel=None, ylabel="Layer")
        bar = figure.colorbar(axes.collections[0], ax=axes, location="bottom", aspect=30, pad=0.01)
        bar.set_label("Probability of the token")
        figure.suptitle(titled("What a state says, layer by layer", on))
    return figure


def _excerpt(text: str) -> str:
    """So much of a continuation as there is room for."""
    line = repr(text)[1:-1]
    return drawable(line if len(line) <= ROOM else f"{line[: ROOM - 1]}…")


def readout_table(table: pd.DataFrame, title: str) -> Table:
    """The same for a terminal: what each layer says, by Patchscope and by logit lens, the control last."""
    view = Table(title=literal(title), title_justify="left")
    for column in ("layer", PATCHSCOPE, "goes on", LOGIT_LENS):
        view.add_column(column, justify="right" if column == "layer" else "left", overflow="fold")
    patched, lens = (
        table[table["reading"].isin(readings)].groupby(table["layer"].fillna(-1), sort=False)
        for readings in ((PATCHSCOPE, CLEAN), (LOGIT_LENS,))
    )
    lens_cells = {layer: _cell(rows) for layer, rows in lens}
    for layer, rows in patched:
        control = layer < 0
        view.add_row(
            "clean" if control else str(layer),
            _cell(rows),
            _quoted(rows["continuation"].iloc[0]),
            lens_cells.get(layer, ""),
            style="dim" if control else None,
        )
    return view


def _cell(rows: pd.DataFrame) -> str:
    return "  ".join(f"{_quoted(token)} {p:.2f}" for token, p in zip(rows["token"], rows["probability"], strict=True))


def _quoted(text: str) -> str:
    return literal(repr(text))
