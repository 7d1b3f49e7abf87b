"""Several experiments as one run: with one folder, one table, and one progress bar."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from pscope.engine.patchscope import Patchscope
from pscope.experiments.experiment import Experiment, Unit, Work
from pscope.models.prompts import Prompt


@dataclass(frozen=True)
class Part(Unit):
    """A unit of one of them."""

    of: str
    unit: Unit


class Together(Experiment[Part]):
    """Experiments by name, whose rows stand in one table; the column `reader` is the name of each one's.

    Passes are planned by the first. Each may have a model of its own.
    """

    def __init__(self, experiments: Mapping[str, Experiment[Any]]) -> None:
        self._experiments = dict(experiments)
        self._first = first = next(iter(self._experiments.values()))
        super().__init__(first.model, first.target, first.memory)
        self.units = [
            Part(f"{unit.name}, {name}", unit.rows, (name, unit.target), name, unit)
            for name, experiment in self._experiments.items()
            for unit in experiment.units
        ]

    def scope(self, target: Prompt) -> Patchscope:
        self._first.memory = self.memory
        return self._first.scope(target)

    def work(self, unit: Part) -> Work:
        return self._experiments[unit.of].work(unit.unit)

    def read(self, units: Sequence[Part]) -> pd.DataFrame:
        name = units[0].of
        experiment = self._experiments[name]
        experiment.memory = self.memory
        return experiment.read([each.unit for each in units]).assign(reader=name).astype({"reader": "string"})

    def join(self, table: pd.DataFrame) -> pd.DataFrame:
        """Each one's rows, joined by itself."""
        tables = [
            experiment.join(table[table["reader"] == name].drop(columns="reader")).assign(reader=name)
            for name, experiment in self._experiments.items()
        ]
        return pd.concat(tables, ignore_index=True).astype({"reader": "string"})
