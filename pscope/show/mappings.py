"""Mappings, as a table."""

from __future__ import annotations

import pandas as pd
from rich.table import Table

from pscope.mappings.mapping_set import MappingSet
from pscope.show.tables import narrow_table


def mappings_table(mappings: MappingSet, kl: pd.DataFrame | None = None) -> Table:
    """A row for each pair of layers: R² and the ridge, where they were fitted so, and the KL of a tuned lens."""
    origin = mappings.origin
    table = narrow_table(
        f"{origin.kind}: {origin.source.name} to {origin.target.name}, {origin.positions} positions of "
        f"{origin.texts} texts{'; R² on texts held out' if origin.r2 else ''}{'; KL in nats' if kl is not None else ''}"
    )
    by_layer = {} if kl is None else {row.layer: (row.kl_before, row.kl_after) for row in kl.itertuples()}
    columns = [
        "layer",
        "to layer",
        *(["R²", "ridge"] if origin.r2 else []),
        *(["KL before", "after"] if by_layer else []),
    ]
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for pair in sorted(mappings.maps):
        cells = [str(pair[0]), str(pair[1])]
        if origin.r2:
            cells += [f"{origin.r2[pair]:.3f}", f"{origin.ridge[pair]:g}"] if pair in origin.r2 else ["1", ""]
        if by_layer:
            cells += [f"{value:.3f}" for value in by_layer.get(pair[0], ())]
        table.add_row(*cells)
    return table
