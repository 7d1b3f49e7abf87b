"""Reading units in the memory that there is: with fewer rows in a pass where it runs out."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence

import pandas as pd
import torch

from pscope.experiments.experiment import Experiment, U
from pscope.memory import out_of_memory


def read_in_memory(experiment: Experiment[U], units: Sequence[U], tell: Callable[[str], None]) -> pd.DataFrame:
    """The rows of some units. Where memory runs out, half as many share a pass from then on, and `tell` is called.

    Raises what the allocator raised if there is none for a single row.
    """
    while True:
        try:
            return experiment.read(units)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            rows_per_pass = experiment.rows_per_pass()
            half = min(rows_per_pass, max(1, sum(unit.rows for unit in units))) // 2
            if half == 0:
                raise
        # The error and all that it held is gone here.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        experiment.memory = experiment.memory * half // rows_per_pass
        tell(f"out of memory: going on with {half} rows in a pass")
