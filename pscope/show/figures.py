"""The figure of any table: an experiment's, or one that a run has kept."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from pscope.arguments import excerpt
from pscope.errors import DataError
from pscope.experiments import attribute_summary, cross_model, entity_resolution, multi_hop_summary, next_token
from pscope.show.attribute_extraction import accuracy_figure
from pscope.show.cross_model import cross_model_figure
from pscope.show.entity_resolution import entity_figure
from pscope.show.layer_readout import layer_readout_figure
from pscope.show.multi_hop import answers_figure
from pscope.show.next_token import next_token_figure

_KINDS = (
    ({"reading", "rank", "continuation"}, lambda table, seed: table, layer_readout_figure),
    ({"lens", "correct"}, next_token.summarise, next_token_figure),
    ({"reader", "decoded"}, cross_model.summarise, cross_model_figure),
    ({"entity", "rouge_l"}, entity_resolution.summarise, entity_figure),
    ({"relation", "nameable"}, attribute_summary.over_layers, accuracy_figure),
    (
        {"query", "method", "log_probability"},
        lambda table, seed: multi_hop_summary.summarise(table, seed=seed),
        answers_figure,
    ),
)
"""For each figure the columns that tell its table from all others, what is made of that, and what draws it."""


def figure(table: pd.DataFrame, on: str = "", *, seed: int = 0) -> Figure:
    """The figure of the table of an experiment: Figure 1, 2, 3, 4 or 10, or Table 2, whichever its columns are of.

    `on` says in the title what it is of, as the model; `seed` is that of the bands. A run's table is
    `pandas.read_parquet("RUN/table.parquet")`. Raises DataError for a table that no figure belongs to.
    """
    if not isinstance(table, pd.DataFrame):
        raise DataError(f"a figure is drawn of a table, a pandas.DataFrame, not of {excerpt(table)}")
    if table.empty:
        raise DataError("a table without rows has no figure")
    for columns, summarise, draw in _KINDS:
        if columns <= set(table.columns):
            try:
                return draw(summarise(table, seed), on)
            except KeyError as error:
                raise DataError(f"the table has no column {error}, which its figure needs; give all of it") from error
    raise DataError(f"no figure belongs to a table of the columns {', '.join(map(str, table.columns))}")
