"""Table 2: accuracy over the source layers, over source and target layers, and as a table."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure
from rich.table import Table

from pscope.experiments.attribute_extraction import ANOTHER, PROBE
from pscope.experiments.attribute_summary import BEST, HELD_OUT, MEAN, SCORED
from pscope.experiments.sweep import PATCHED, RANDOM
from pscope.show.common import drawable, layer_heatmaps, titled
from pscope.show.tables import literal, narrow_table, number
from pscope.show.theme import BLUE, GREEN, GREY, ORANGE, SKY, VERMILION, Look, drawing, fill, label_layers, plot

_WITH_BANDS = [(PATCHED, HELD_OUT), (PROBE, None)]
"""Of six bands that overlap nobody would see one."""

_LINES = {
    (PATCHED, HELD_OUT): ("patched, target layer best for others", Look(BLUE, "-", "o")),
    (PATCHED, BEST): ("patched, any target layer (oracle)", Look(ORANGE, "-", "^")),
    (PATCHED, MEAN): ("patched, mean over target layers", Look(SKY, "--")),
    (PROBE, None): ("probe", Look(GREEN, "-.", "D")),
    (ANOTHER, BEST): ("another subject (oracle)", Look(VERMILION, ":", "v")),
    (RANDOM, BEST): ("random vector (oracle)", Look(GREY, ":", "s")),
}


def accuracy_figure(accuracy: pd.DataFrame, on: str = "", columns: int = 5) -> Figure:
    """From `attribute_summary.over_layers`: a panel for each relation, a line for each way of reading.

    Those that are held against each other, the target layer held out and the probe, have bands.
    """
    relations = list(dict.fromkeys(accuracy["relation"]))
    rows = -(-len(relations) // columns)
    columns = min(columns, len(relations))
    with drawing(max(4, 0.5 + 1.5 * columns), 1.4 + 1.25 * rows) as figure:
        panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flatten()
        for axes, relation in zip(panels, relations, strict=False):
            of_relation = accuracy[accuracy["relation"] == relation]
            for (condition, taken), (label, look) in _LINES.items():
                matches = of_relation["taken"].isna() if taken is None else of_relation["taken"] == taken
                line = of_relation[(of_relation["condition"] == condition) & matches].astype({"layer": int})
                plot(axes, line["layer"], line["found"], look, label, width=1)
                if (condition, taken) in _WITH_BANDS:
                    fill(axes, line["layer"], line["low"], line["high"], look, faint=condition == PROBE)
            # Lines at zero and at one stand clear of the frame.
            axes.set(title=drawable(relation), ylim=(-0.05, 1.05), yticks=(0, 0.5, 1))
            label_layers(axes, "Source layer")
            axes.label_outer()
        for axes in panels[len(relations) :]:
            axes.remove()
        figure.supylabel("The right object is the most probable")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3 if columns > 2 else 2)
        figure.suptitle(titled("How often an attribute of a subject is read from its state", on))
    return figure


def accuracy_heatmaps(table: pd.DataFrame, on: str = "") -> Figure:
    """From the table of `AttributeScores`: the share of samples answered at every (ℓ, ℓ*)."""
    return layer_heatmaps(table[table["condition"] == PATCHED], "relation", "found", "Accuracy", on)


def accuracy_table(summary: pd.DataFrame) -> Table:
    """The same for a terminal: for each relation a line of scores, and one of what was said."""
    table = narrow_table(
        "scored: the right object is the most probable of those of the subjects read; said: it is in the continuation; "
        "oracle: any target layer gives the answer, mean over source layers (the paper's number); held out: at the "
        "pair of layers that was best for other subjects; p: of held out against the probe at the layer that was best "
        "for other subjects, times the number of relations (Bonferroni), over the subjects whose answer others have "
        f"too, since a probe can name no other; {_smallest_p(summary)}",
        tight=True,
    )
    headings = ("n", "oracle", "random\noracle", "held\nout", "random", "other", "probe", "majo-\nrity", "clean", "p")
    table.add_column("relation", no_wrap=True)
    table.add_column("", no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in summary.itertuples():
        scored = row.judged == SCORED
        table.add_row(
            literal(row.relation) if scored else "",
            row.judged,
            str(row.samples) if scored else "",
            *map(number, (row.oracle, row.random_oracle, row.held_out, row.random_held_out, row.another_held_out)),
            *map(number, (row.probe_held_out, row.majority) if scored else (float("nan"),) * 2),
            number(row.clean),
            "" if row.p != row.p else "<.001" if row.p < 0.001 else f"{row.p:.2g}",
        )
    return table


def _smallest_p(summary: pd.DataFrame) -> str:
    """What is said of the p that the numbers of subjects allow."""
    least = " to ".join(dict.fromkeys(f"{bound:.2g}" for bound in (summary["least_p"].min(), summary["least_p"].max())))
    return f"the smallest that so many can give is {least}, blank where that is above .05"
