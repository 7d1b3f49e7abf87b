"""Figure 4: how often each way of asking a multi-hop query gives the answer, and where patching does."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import pandas as pd
from matplotlib.figure import Figure
from rich.table import Table

from pscope.experiments.attribute_summary import SAID, SCORED
from pscope.experiments.multi_hop import STEP_BY_STEP, VANILLA, WIRINGS
from pscope.experiments.sweep import CLEAN, PATCHED
from pscope.inputs.queries import Query
from pscope.show.common import layer_heatmaps, titled
from pscope.show.tables import literal, narrow_table, one_line, with_band
from pscope.show.theme import BLUE, INK, ORANGE, PAGE, drawing


class _Mark(NamedTuple):
    """How a measure is drawn: in which colour and shape, filled or hollow, and how far above the middle of its row."""

    colour: tuple[float, float, float]
    shape: str
    filled: bool
    above: float


_MARKS = {
    "accuracy": _Mark(INK, "s", True, 0),
    "held-out pair": _Mark(BLUE, "o", True, 0.22),
    "held-out pair, random vector": _Mark(BLUE, "o", False, 0.08),
    "oracle": _Mark(ORANGE, "D", True, -0.08),
    "oracle, random vector": _Mark(ORANGE, "D", False, -0.22),
}

_JUDGED = {SCORED: "the most probable", SAID: "in what is said"}

_ORDER = {method: place for place, method in enumerate((VANILLA, STEP_BY_STEP, *WIRINGS))}


def answers_figure(summary: pd.DataFrame, on: str = "") -> Figure:
    """From `multi_hop_summary.summarise`: a row for each method, with a mark and its 95 % band for each measure.

    A panel for each way an answer is judged, side by side; the dotted line is the query asked as it stands.
    """
    panels = list(dict.fromkeys(summary["judged"]))
    methods = sorted(set(summary["method"]), key=_ORDER.__getitem__, reverse=True)
    with drawing(PAGE, 1.3 + 0.36 * len(methods)) as figure:
        row_of_axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axes, judged in zip(row_of_axes, panels, strict=True):
            of_panel = summary[summary["judged"] == judged]
            for measure, mark in _MARKS.items():
                rows = of_panel[of_panel["measure"] == measure]
                # Where a band has no width, rounding may put it beside its mean.
                band = [(rows["found"] - rows["low"]).clip(lower=0), (rows["high"] - rows["found"]).clip(lower=0)]
                heights = [methods.index(method) + mark.above for method in rows["method"]]
                style = {"color": mark.colour, "fmt": mark.shape, "label": measure}
                hollow = {} if mark.filled else {"markerfacecolor": "white", "elinewidth": 0.7}
                axes.errorbar(rows["found"], heights, xerr=band, **style, **hollow)
            for share in of_panel.loc[of_panel["method"] == VANILLA, "found"]:
                axes.axvline(share, color=INK, linestyle=":", linewidth=0.8, zorder=1)
            axes.set_yticks(range(len(methods)), methods)
            axes.grid(visible=False, axis="y")
            axes.set(title=f"the right answer is {_JUDGED[judged]}", xlabel="Share of queries")
            axes.set(xlim=(-0.02, 1.02), ylim=(-0.6, len(methods) - 0.4))
        # The first has marks of every measure.
        handles, labels = row_of_axes[0].get_legend_handles_labels()
        numbers = [number for number, label in enumerate(labels) if label in set(summary["measure"])]
        legend = [handles[number] for number in numbers], [labels[number] for number in numbers]
        figure.legend(*legend, loc="outside lower center", ncols=3)
        figure.suptitle(titled("Questions of two hops, asked plainly and by patching", on))
    return figure


def answers_heatmaps(table: pd.DataFrame, on: str = "") -> Figure:
    """From the table of `MultiHopScores`: the share of queries answered at every (ℓ, ℓ*), per wiring."""
    patched = table[(table["condition"] == PATCHED) & table["method"].isin(WIRINGS)]
    return layer_heatmaps(patched, "method", "found", "Share of queries answered", on)


def answers_table(summary: pd.DataFrame, lengths: str) -> Table:
    """The same for a terminal: a line for every measure of every method; `lengths` says how long each may speak."""
    table = narrow_table(
        "share of queries answered (95 % band from resampling bridges, each with all its queries; exact where all "
        "agree); scored: the right answer is the most probable of those to the same second hop, right after the prompt "
        "as it stands; said: it stands in the continuation; oracle: any pair of layers gives the answer; held-out "
        f"pair: the one that was best for queries of other bridges; {lengths}"
    )
    for heading in ("method", "measure", SCORED, SAID, "layers\n(scored)"):
        table.add_column(heading, justify="right" if heading in (SCORED, SAID) else "left")
    previous = None
    by = summary.set_index(["method", "measure", "judged"])
    for (method, measure), rows in summary.groupby(["method", "measure"], sort=False):
        cells = [
            with_band(*by.loc[(method, measure, judged), ["found", "low", "high"]])
            if judged in set(rows["judged"])
            else ""
            for judged in (SCORED, SAID)
        ]
        table.add_row("" if method == previous else method, measure, *cells, _layers(rows.iloc[0]))
        previous = method
    return table


def gains_table(gains: pd.DataFrame) -> Table:
    """What patching adds to the log-probability of the answer, for a terminal."""
    table = narrow_table(
        "log-probability of the answer (its first token, unless --score says otherwise) gained over the query as it "
        "stands, in nats, and the share of queries that gain; clean target: what the target gains unpatched; at the "
        "pair of layers where those of other bridges gain most (95 % band from resampling bridges)"
    )
    for heading in ("method", "condition", "gain", "share", "layers"):
        table.add_column(heading, justify="right" if heading in ("gain", "share") else "left")
    for row in gains.itertuples():
        gain = with_band(row.gain, row.low, row.high)
        table.add_row(row.method, row.condition, gain, f"{row.share:.2f}", _layers(row))
    return table


def _layers(row: Any) -> str:
    """The pair of layers that was chosen, or how many were."""
    if row.layer is not pd.NA:
        return f"{row.layer} → {row.target_layer}"
    return "" if row.pairs is pd.NA else f"{row.pairs} pairs"


def walk_through(query: Query, table: pd.DataFrame, most: int = 8) -> Iterator[str | Table]:
    """What each method says; of a grid, continuations that coincide share a line, right ones come first."""
    yield f"[bold]{literal(query.text)}[/bold]"
    if query.answers:
        yield f"answer: {literal(' / '.join(query.answers))}"
    for method, chunk in table.groupby("method", sort=False):
        view = Table(title=literal(method), title_justify="left")
        view.add_column("layers")
        view.add_column("continuation", overflow="fold")
        own = chunk[chunk["condition"] == PATCHED]
        groups = sorted(own.groupby("continuation"), key=lambda group: (not group[1]["found"].any(), -len(group[1])))
        for text, rows in groups[:most]:
            first = rows.iloc[0]
            more = f" and {len(rows) - 1} more" if len(rows) > 1 else ""
            style = "green" if first["found"] else None
            view.add_row(f"{first['layer']} → {first['target_layer']}{more}", one_line(text), style=style)
        if len(groups) > most:
            view.add_row(f"… {len(groups) - most} others", "")
        clean = chunk[chunk["condition"] == CLEAN]
        for text in clean["continuation"]:
            view.add_row("unpatched", one_line(text), style="green" if clean["found"].any() else "dim")
        yield view
