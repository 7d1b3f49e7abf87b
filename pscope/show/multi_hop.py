"""Figure 4: how often each way of asking a multi-hop query gives the answer, and where patching does."""

from __future__ import annotations

from collections.abc import Iterator

import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from rich.table import Table

from pscope.experiments.multi_hop import WIRINGS
from pscope.experiments.sweep import CLEAN, PATCHED
from pscope.inputs.queries import Query
from pscope.show.common import drawable, layer_heatmaps
from pscope.show.tables import literal, narrow_table, one_line, with_band


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
    """From the table of `multi_hop`: the share of queries answered at every (ℓ, ℓ*), per wiring."""
    patched = table[(table["condition"] == PATCHED) & table["method"].isin(WIRINGS)].astype({"found": float})
    means = {
        wiring: rows.groupby(["layer", "target_layer"])["found"].mean()
        for wiring, rows in patched.groupby("method", sort=False)
    }
    return layer_heatmaps(means, "Share of queries answered", title)


def answers_table(summary: pd.DataFrame, lengths: str) -> Table:
    """The same for a terminal: a line for every measure of every method; `lengths` says how long each may speak."""
    shown = narrow_table(
        "share of queries answered (95 % band from resampling bridges, each with all its queries; exact where all "
        "agree); oracle: any pair of layers gives the answer; held-out pair: the one that was best for queries of "
        f"other bridges, averaged over those that tie; {lengths}"
    )
    for heading in ("method", "measure", "answered", "layers"):
        shown.add_column(heading, justify="right" if heading == "answered" else "left")
    previous = None
    for row in summary.itertuples():
        layers = "" if row.pairs is pd.NA else f"{row.pairs} pairs"
        if row.layer is not pd.NA:
            layers = f"{row.layer} → {row.target_layer}"
        answered = with_band(row.found, row.low, row.high)
        shown.add_row("" if row.method == previous else row.method, row.measure, answered, layers)
        previous = row.method
    return shown


def walk_through(query: Query, table: pd.DataFrame, most: int = 8) -> Iterator[str | Table]:
    """What each method says; of a grid, continuations that coincide share a line, right ones come first."""
    yield f"[bold]{literal(query.text)}[/bold]"
    if query.answers:
        yield f"answer: {literal(' / '.join(query.answers))}"
    for method, chunk in table.groupby("method", sort=False):
        shown = Table(title=literal(method), title_justify="left")
        shown.add_column("layers")
        shown.add_column("continuation", overflow="fold")
        own = chunk[chunk["condition"] == PATCHED]
        groups = sorted(own.groupby("continuation"), key=lambda group: (not group[1]["found"].any(), -len(group[1])))
        for text, rows in groups[:most]:
            first = rows.iloc[0]
            more = f" and {len(rows) - 1} more" if len(rows) > 1 else ""
            found = "green" if first["found"] else None
            shown.add_row(f"{first['layer']} → {first['target_layer']}{more}", one_line(text), style=found)
        if len(groups) > most:
            shown.add_row(f"… {len(groups) - most} others", "")
        clean = chunk[chunk["condition"] == CLEAN]
        for text in clean["continuation"]:
            shown.add_row("unpatched", one_line(text), style="green" if clean["found"].any() else "dim")
        yield shown
