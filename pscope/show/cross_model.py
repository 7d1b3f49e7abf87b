"""Figures 10 and 11: one model read by another, drawn and as a table."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure
from rich.table import Table

from pscope.show.common import layer_heatmaps
from pscope.show.tables import literal, narrow_table, number, with_band

_MEASURES = {"precision_at_1": "Precision@1", "surprisal": "Surprisal (nats)"}


def cross_model_figure(summary: pd.DataFrame, reader: str, measure: str, title: str) -> Figure:
    """Heatmaps of a measure of `cross_model.summarise` over (ℓ, ℓ*): one panel for each condition that has it."""
    rows = summary[(summary["reader"] == reader) & summary[measure].notna()]
    cells = {
        condition: each.set_index(["layer", "target_layer"])[measure]
        for condition, each in rows.groupby("condition", sort=False)
    }
    return layer_heatmaps(cells, _MEASURES[measure], title, columns=4)


def best_pairs_table(best: pd.DataFrame) -> Table:
    """`cross_model.best_pairs`: who reads whom how well, and the controls."""
    shown = narrow_table("precision@1 on the half of the texts that did not choose the pair (95 % band)")
    for column in ("reader", "condition"):
        shown.add_column(column, overflow="fold")
    for column in ("layer", "to layer", "held out", "oracle"):
        shown.add_column(column, justify="right", no_wrap=True)
    for row in best.itertuples():
        told = with_band(row.held_out, row.low, row.high)
        pair = (str(row.layer), str(row.target_layer))
        shown.add_row(literal(row.reader), literal(row.condition), *pair, told, number(row.maximum))
    return shown
