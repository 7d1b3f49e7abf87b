"""How alike scores and words rank, as a table."""

from __future__ import annotations

import pandas as pd
from rich.table import Table

from pscope.experiments.agreement import FEWEST
from pscope.show.tables import literal, narrow_table, with_band


def agreement_table(agreement: pd.DataFrame) -> Table:
    """For a terminal: a line for each row of `agreement.rank_agreement`."""
    key = agreement.columns[0]
    table = narrow_table(
        "rank correlation (Spearman) of the shares answered by score and by word, over the pairs of layers where rows "
        f"spoke (95 % band from resampling); blank where all shares are alike, or fewer than {FEWEST} are ranked"
    )
    for heading in (key, "ranked", "count", "ρ"):
        table.add_column(heading, justify="right" if heading in ("count", "ρ") else "left")
    for row in agreement.itertuples():
        rho = "" if row.rho != row.rho else with_band(row.rho, row.low, row.high)
        table.add_row(literal(getattr(row, key)), row.ranked, str(row.count), rho)
    return table
