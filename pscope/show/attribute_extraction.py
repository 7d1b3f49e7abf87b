"""Table 2: accuracy over the source layers, over source and target layers, and as a table."""

from __future__ import annotations

import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from rich.table import Table

from pscope.experiments.attribute_extraction import ANOTHER, PROBE
from pscope.experiments.sweep import PATCHED, RANDOM
from pscope.show.common import drawable, fill, label_layers, layer_heatmaps
from pscope.show.tables import literal, narrow_table, number

_LABELS = {
    PATCHED: "patched, any target layer (oracle)",
    PROBE: "probe",
    ANOTHER: "another subject (oracle)",
    RANDOM: "random vector (oracle)",
}


def accuracy_figure(accuracy: pd.DataFrame, title: str, columns: int = 5) -> Figure:
    """From `attribute_extraction.over_layers`: a panel for each relation, a line and band for each condition."""
    relations = list(dict.fromkeys(accuracy["relation"]))
    rows = -(-len(relations) // columns)
    columns = min(columns, len(relations))
    with sns.axes_style("whitegrid"), sns.plotting_context("notebook"):
        figure = Figure(figsize=(1 + 3.2 * columns, 1.4 + 2.7 * rows), layout="constrained")
        panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flatten()
        for axes, relation in zip(panels, relations, strict=False):
            here = accuracy[accuracy["relation"] == relation]
            for (condition, label), colour in zip(_LABELS.items(), sns.color_palette("deep"), strict=False):
                line = here[here["condition"] == condition].astype({"layer": int})
                axes.plot(line["layer"], line["found"], color=colour, label=label)
                fill(axes, line["layer"], line["low"], line["high"], colour)
            axes.set(title=drawable(relation), ylim=(0, 1.02))
            label_layers(axes, "Source layer")
            axes.label_outer()
        for axes in panels[len(relations) :]:
            axes.remove()
        figure.supylabel("Accuracy")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
        figure.suptitle(drawable(title))
    return figure


def accuracy_heatmaps(table: pd.DataFrame, title: str) -> Figure:
    """From the table of `attribute_extraction`: the share of samples answered at every (ℓ, ℓ*)."""
    patched = table[table["condition"] == PATCHED].astype({"found": float})
    means = {
        relation: rows.groupby(["layer", "target_layer"])["found"].mean()
        for relation, rows in patched.groupby("relation", sort=False)
    }
    return layer_heatmaps(means, "Accuracy", title)


def accuracy_table(summary: pd.DataFrame) -> Table:
    """The same for a terminal: a line for each relation."""
    shown = narrow_table(
        "oracle: any target layer gives the answer, mean ± std over source layers (the paper's number); held out: at "
        "the pair of layers that was best for other subjects, averaged over those that tie; p: of held out against the "
        "probe at the layer that was best for other subjects, times the number of relations (Bonferroni), over the "
        "subjects whose answer others have too, since a probe can name no other; blank where those are too few for .05",
        tight=True,
    )
    headings = ("n", "oracle", "random\noracle", "another\noracle", "held\nout", "probe", "majo-\nrity", "clean", "p")
    shown.add_column("relation", no_wrap=True)
    for heading in headings:
        shown.add_column(heading, justify="right", no_wrap=True)
    for row in summary.itertuples():
        shown.add_row(
            literal(row.relation),
            str(row.samples),
            f"{row.oracle:.2f}±{row.oracle_std:.2f}",
            number(row.random_oracle),
            number(row.another_oracle),
            number(row.held_out),
            number(row.probe),
            number(row.majority),
            number(row.clean),
            "" if row.p != row.p else "<.001" if row.p < 0.001 else f"{row.p:.2g}",
        )
    return shown
