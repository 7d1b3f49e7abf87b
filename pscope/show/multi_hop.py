"""Figure 4: how often each way of asking a multi-hop query gives the answer, and where patching does."""

from __future__ import annotations

from collections.abc import Iterator

import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from rich.table import Table

from pscope.experiments.attribute_summary import SAID, SCORED
from pscope.experiments.multi_hop import STEP_BY_STEP, VANILLA, WIRINGS
from pscope.experiments.sweep import CLEAN, PATCHED
from pscope.inputs.queries import Query
from pscope.show.common import drawable, layer_heatmaps
from pscope.show.tables import literal, narrow_table, one_line, with_band

_ORDER = {method: place for place, method in enumerate((VANILLA, STEP_BY_STEP, *WIRINGS))}


def answers_figure(summary: pd.DataFrame, title: str) -> Figure:
    """From `multi_hop_summary.summarise`: a bar with its 95 % band for every measure of every method.

    A panel for each way an answer is judged, side by side.
    """
    labels = list(dict.fromkeys(summary["measure"]))
    colours = dict(zip(labels, sns.color_palette("colorblind"), strict=False))
    panels = list(dict.fromkeys(summary["judged"]))
    rows = summary.drop_duplicates(["method", "measure"])[["method", "measure"]].sort_values(
        ["method", "measure"], key=lambda column: column.map({**_ORDER, **{label: n for n, label in enumerate(labels)}})
    )
    places = {row: len(rows) - 1 - place for place, row in enumerate(rows.itertuples(index=False, name=None))}
    with sns.axes_style("whitegrid"), sns.plotting_context("notebook"):
        figure = Figure(figsize=(2.5 + 5 * len(panels), 1.6 + 0.36 * len(rows)), layout="constrained")
        drawn = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axes, judged in zip(drawn, panels, strict=True):
            bars = summary[summary["judged"] == judged]
            bars = bars.assign(place=[places[pair] for pair in zip(bars["method"], bars["measure"], strict=True)])
            for measure in labels:
                here = bars[bars["measure"] == measure]
                # Where a band has no width, rounding may put it beside its mean.
                error = [(here["found"] - here["low"]).clip(lower=0), (here["high"] - here["found"]).clip(lower=0)]
                options = {"label": drawable(measure), "color": colours[measure], "capsize": 3}
                axes.barh(here["place"], here["found"], xerr=error, **options)
            axes.set_yticks([*places.values()], [drawable(method) for method, _ in places])
            axes.set(title=drawable(f"answer {judged}"), xlabel="Share of queries answered", xlim=(0, 1))
        # The first has bars of every measure.
        figure.legend(*drawn[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
        figure.suptitle(drawable(title))
    return figure


def answers_heatmaps(table: pd.DataFrame, title: str) -> Figure:
    """From the table of `MultiHopScores`: the share of queries answered at every (ℓ, ℓ*), per wiring."""
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
        "agree); scored: the right answer is the most probable of those to the same second hop, right after the prompt "
        "as it stands; said: it stands in the continuation; oracle: any pair of layers gives the answer; held-out "
        f"pair: the one that was best for queries of other bridges; {lengths}"
    )
    for heading in ("method", "measure", SCORED, SAID, "layers\n(scored)"):
        shown.add_column(heading, justify="right" if heading in (SCORED, SAID) else "left")
    previous = None
    by = summary.set_index(["method", "measure", "judged"])
    for (method, measure), rows in summary.groupby(["method", "measure"], sort=False):
        answered = [
            with_band(*by.loc[(method, measure, judged), ["found", "low", "high"]])
            if judged in set(rows["judged"])
            else ""
            for judged in (SCORED, SAID)
        ]
        shown.add_row("" if method == previous else method, measure, *answered, _layers(rows.iloc[0]))
        previous = method
    return shown


def gains_table(gains: pd.DataFrame) -> Table:
    """What patching adds to the log-probability of the answer, for a terminal."""
    shown = narrow_table(
        "log-probability of the answer (its first token, unless --score says otherwise) gained over the query as it "
        "stands, in nats, and the share of queries that gain; clean target: what the target gains unpatched; at the "
        "pair of layers where those of other bridges gain most (95 % band from resampling bridges)"
    )
    for heading in ("method", "condition", "gain", "share", "layers"):
        shown.add_column(heading, justify="right" if heading in ("gain", "share") else "left")
    for row in gains.itertuples():
        gain = with_band(row.gain, row.low, row.high)
        shown.add_row(row.method, row.condition, gain, f"{row.share:.2f}", _layers(row))
    return shown


def _layers(row: object) -> str:
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
