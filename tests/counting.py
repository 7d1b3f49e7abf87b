"""An experiment without a model: units that are numbers, and rows that say what was read."""

import pandas as pd

from pscope.engine.selfcheck import SelfCheck
from pscope.experiments.experiment import Experiment, Unit

ROW_BYTES = 100


class Counting(Experiment):
    """Reads `units` numbers, two rows each; a pass holds ten rows. `fault(units)` is called before anything is read."""

    def __init__(self, units=10, fault=lambda units: None):
        self.memory = 10 * ROW_BYTES
        self.units = [Unit(f"{number}", 2, "all") for number in range(units)]
        self.fault, self.seen = fault, []

    @property
    def check(self):
        return SelfCheck("plain", "counted")

    def rows_per_pass(self):
        return max(1, self.memory // ROW_BYTES)

    def rows_per_part(self, rows_per_pass):
        return 4

    def work(self, unit):
        raise NotImplementedError

    def read(self, units):
        self.fault(units)
        self.seen += [unit.name for unit in units]
        return pd.DataFrame({"unit": [unit.name for unit in units], "square": [int(unit.name) ** 2 for unit in units]})

    def join(self, table):
        return table.assign(before=table["square"].shift(fill_value=-1))
