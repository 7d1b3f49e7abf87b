"""Figure 2, drawn and as a table."""

from __future__ import annotations

from itertools import cycle

import pandas as pd
from matplotlib.figure import Figure
from rich.table import Table

from pscope.experiments.next_token import LOGIT_LENS, TOKEN_IDENTITY
from pscope.show.common import MEASURES, drawable, titled
from pscope.show.tables import literal, narrow_table, with_band
from pscope.show.theme import (
    BLUE,
    BROWN,
    GREEN,
    ORANGE,
    PAGE,
    PINK,
    SKY,
    VERMILION,
    Look,
    drawing,
    fill,
    label_layers,
    plot,
)

BANDED = 3
"""So many lenses have room for their bands in 80 columns."""

_LOOKS = {LOGIT_LENS: Look(VERMILION, "--", "v"), TOKEN_IDENTITY: Look(BLUE, "-", "o")}
"""Of the lenses that every figure has: the same in all."""

_OTHER_LOOKS = [
    Look(GREEN, "-.", "D"),
    Look(ORANGE, "-", "s"),
    Look(PINK, "--", "^"),
    Look(BROWN, "-.", "P"),
    Look(SKY, ":", "X"),
]


def next_token_figure(summary: pd.DataFrame, on: str = "") -> Figure:
    """Figure 2 from `next_token.summarise`: precision@1 and surprisal over the layers, one line and band per lens."""
    lenses, others = summary.groupby("lens", sort=False), cycle(_OTHER_LOOKS)
    looks = {lens: _LOOKS.get(lens) or next(others) for lens in dict.fromkeys(summary["lens"])}
    with drawing(PAGE, 2.6 + 0.14 * (len(lenses) // 4)) as figure:
        for axes, (measure, label) in zip(figure.subplots(1, 2), MEASURES.items(), strict=True):
            for lens, rows in lenses:
                plot(axes, rows["layer"], rows[measure], looks[lens], drawable(lens))
                fill(axes, rows["layer"], rows[f"{measure}_low"], rows[f"{measure}_high"], looks[lens])
            axes.set(ylabel=label, ylim=(0, None))
            label_layers(axes, "Layer of the hidden state")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4)
        figure.suptitle(titled("How early the next token can be read", on))
    return figure


def next_token_tables(summary: pd.DataFrame) -> list[Table]:
    """For each measure, layers down and the lenses side by side, each with its band where there is room for it."""
    lenses = list(dict.fromkeys(summary["lens"]))
    banded = len(lenses) <= BANDED
    caption = "mean (95 % band from resampling texts)" if banded else "mean; bands are in summary.csv"
    tables = []
    for measure, label, digits in (("precision_at_1", "precision@1", 2), ("surprisal", "surprisal in nats", 1)):
        table = narrow_table(f"{label}: {caption}")
        table.add_column("layer", justify="right", no_wrap=True)
        for lens in lenses:
            table.add_column(literal(lens), justify="right")
        columns = [f"{measure}{bound}" for bound in ("", "_low", "_high")]
        for layer, row in summary.pivot(index="layer", columns="lens", values=columns).iterrows():
            cells = []
            for lens in lenses:
                mean, low, high = (row[column, lens] for column in columns)
                cell = with_band(mean, low if banded else float("nan"), high, digits)
                # A lens need not read all layers.
                cells.append(cell if mean == mean else "")
            table.add_row(str(layer), *cells)
        tables.append(table)
    return tables
