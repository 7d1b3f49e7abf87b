"""Figures 10 and 11: one model read by another, drawn and as a table."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure
from rich.table import Table

from pscope.experiments.cross_model import MAPPED
from pscope.show.common import MEASURES, layer_heatmaps
from pscope.show.tables import literal, narrow_table, number, with_band


def cross_model_figure(
    summary: pd.DataFrame, on: str = "", reader: str | None = None, measure: str = "precision_at_1"
) -> Figure:
    """Heatmaps of a measure of `cross_model.summarise` over (ℓ, ℓ*): one panel for each condition that has it.

    Of the `reader` that is named, or the first.
    """
    reader = summary["reader"].iloc[0] if reader is None else reader
    rows = summary[(summary["reader"] == reader) & summary[measure].notna()]
    on = ", ".join(filter(None, (reader, on)))
    return layer_heatmaps(rows, "condition", measure, MEASURES[measure], on, columns=4)


def best_pairs_table(best: pd.DataFrame, summary: pd.DataFrame, reader: str) -> Table:
    """How well a reader reads another model at its best pair of layers, beside the controls at theirs.

    `best` is of `cross_model.best_pairs`, `summary` of `cross_model.summarise`: from it come the last rows, in which
    each of the two models reads itself, at the layers of the first row.
    """
    table = narrow_table(
        f"{literal(reader)}: precision@1 on the half of the texts that did not choose the pair (95 % band); where a "
        "model reads itself, on all texts, at the layers of the first row"
    )
    table.add_column("", overflow="fold")
    for column in ("layer", "to layer", "precision@1", "oracle"):
        table.add_column(column, justify="right", no_wrap=True)
    mine = best[best["reader"] == reader]
    for row in mine.itertuples():
        cell = with_band(row.held_out, row.low, row.high)
        table.add_row(literal(row.condition), str(row.layer), str(row.target_layer), cell, number(row.maximum))
    if mine.empty:
        return table
    layers = (mine.iloc[0]["layer"], mine.iloc[0]["target_layer"])
    others = summary[(summary["reader"] != reader) & (summary["condition"] == MAPPED)]
    for (name, rows), layer in zip(others.groupby("reader", sort=False), layers, strict=True):
        (row,) = rows[rows["layer"] == layer].itertuples()
        cell = with_band(row.precision_at_1, row.precision_at_1_low, row.precision_at_1_high)
        table.add_row(literal(name), str(layer), str(layer), cell, "", style="dim")
    return table
