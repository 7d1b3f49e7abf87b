"""What an experiment is: units, each of which can be read alone, and the table of what they yield.

A unit is a text's sampled positions, an entity, a subject of a relation, a query in one wiring. It has a name, and may
be read by any process, in any order, beside any others: nothing that it yields depends on its neighbours. An experiment
says how units become rows, and nothing about progress, files, processes, or how much memory there is.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import pandas as pd

from pscope.arguments import as_int
from pscope.engine.patchscope import MEMORY, Patchscope
from pscope.engine.selfcheck import SelfCheck
from pscope.errors import PscopeError, RowError
from pscope.models.model import LanguageModel, as_prompt
from pscope.models.prompts import Prompt
from pscope.notebook import progress

FEWEST_ROWS = 256
"""A part has as many, if its units have: below, passes begin to cost in which few rows are left to speak."""

PASSES = 4
"""A part has no more than go in so many passes, of which the last rows of one can go on with those of the next."""

MOST_PARTS = 16
"""Into so many parts a run falls where passes would hold more: what is lost with one is little, and many can share."""


@dataclass(frozen=True)
class Unit:
    """What can be read alone. `name` tells it from all others of its experiment.

    `rows` of its are patched or asked. Its `target` is one prompt, or one way of asking.
    """

    name: str
    rows: int
    target: object

    @property
    def shares(self) -> object:
        """Units of which this is the same can share passes, and parts."""
        return self.target


@dataclass(frozen=True)
class Work:
    """The least that a unit asks of a model.

    `read` tokens of prompts go through all layers. Rows patched at `target_layers` take `suffix` tokens each, from the
    patched position to the end of the target, through the layers above their own. All of them, and `spoken` rows of
    prompts that are not patched, are answered by the unembedding, and go on for `new_tokens` at most.
    """

    read: int
    suffix: int = 0
    target_layers: tuple[int, ...] = ()
    spoken: int = 0
    new_tokens: int = 0


U = TypeVar("U", bound=Unit)


def check_names(units: Iterable[Unit]) -> None:
    """Raise PscopeError for two units of one name: what is drawn for the one would be the other's too."""
    names: set[str] = set()
    for unit in units:
        if unit.name in names:
            raise PscopeError(f"{unit.name} is read twice; give each a name of its own")
        names.add(unit.name)


def of_kind(units: Iterable[Unit], kind: type[U]) -> list[U]:
    """The units of one kind: of those that share passes all are, or none."""
    return [unit for unit in units if isinstance(unit, kind)]


class Experiment(ABC, Generic[U]):
    """Units in, tidy rows out.

    `memory`, in bytes, is for the rows of one pass; it may be changed between calls of `read`. Of several targets,
    `target` is the one by which passes are planned, and of which the check is told. Units that share passes stand side
    by side in `units`.
    """

    units: Sequence[U]

    def __init__(self, model: LanguageModel, target: Prompt, memory: int = MEMORY) -> None:
        self.model, self.target = model, as_prompt(model, target)
        self.memory = as_int(memory, "the memory in bytes")
        self._scopes: dict[Prompt, Patchscope] = {}
        self._checks: dict[tuple[int, tuple[int, ...]], SelfCheck] = {}

    @abstractmethod
    def read(self, units: Sequence[U]) -> pd.DataFrame:
        """The rows of the table for some units that share passes, those of one unit together.

        Raises PscopeError, naming the unit, for a row that fails.
        """

    @abstractmethod
    def work(self, unit: U) -> Work:
        """The least that a unit asks of the model."""

    def join(self, table: pd.DataFrame) -> pd.DataFrame:
        """The whole table from the rows of all units, in their order: what one unit lends to another is added here."""
        return table

    @property
    def check(self) -> SelfCheck:
        """What the self-check says of the target."""
        return self.scope(self.target).check

    def rows_per_pass(self) -> int:
        """How many rows of the target fit in the memory."""
        return self.scope(self.target).rows_per_pass(self.work(self.units[0]).new_tokens)

    def scope(self, target: Prompt) -> Patchscope:
        """A Patchscope of the target. One of each length is checked: masks and caches do not tell the others apart."""
        if target not in self._scopes:
            alike = (len(target), target.positions)
            scope = self._scopes[target] = Patchscope(self.model, target, path=self._checks.get(alike, "auto"))
            self._checks[alike] = scope.check
        self._scopes[target].memory = self.memory
        return self._scopes[target]

    def trust(self, other: Experiment[Any]) -> None:
        """Take over what another experiment has just found of the same model: its targets are not checked again."""
        self._checks.update(other._checks)

    def rows_per_part(self, rows_per_pass: int) -> int:
        """How many rows are read together: what a few passes hold, and no more than a small share of a long run."""
        return min(PASSES * rows_per_pass, max(FEWEST_ROWS, -(-sum(unit.rows for unit in self.units) // MOST_PARTS)))

    def parts(self, rows: int) -> list[list[U]]:
        """The units in groups that share passes and have about so many rows together, or one unit with more.

        Raises PscopeError for two units of one name.
        """
        check_names(self.units)
        parts: list[list[U]] = []
        room = 0
        for unit in self.units:
            if not parts or unit.shares != parts[-1][-1].shares or unit.rows > room:
                parts.append([])
                room = rows
            parts[-1].append(unit)
            room -= unit.rows
        return parts

    def table(self) -> pd.DataFrame:
        """The whole table, read here and now. In a notebook a bar tells how far it is."""
        tables = []
        with progress(sum(unit.rows for unit in self.units), "rows") as meter:
            for part in self.parts(self.rows_per_part(self.rows_per_pass())):
                tables.append(self.read(part))
                meter(sum(unit.rows for unit in part))
        return self.join(pd.concat(tables, ignore_index=True))


def tidy(rows: Iterable[Mapping[str, object]] | pd.DataFrame, types: Mapping[str, str]) -> pd.DataFrame:
    """A table with the columns of `types`, of these types whatever is missing: so that all parts have the same.

    Raises PscopeError where a column of type bool says nothing of a row.
    """
    frame = rows if isinstance(rows, pd.DataFrame) else pd.DataFrame(list(rows))
    frame = frame.reindex(columns=list(types))
    for column, of in types.items():
        # What is missing would count as true.
        if of == "bool" and frame[column].isna().any():
            raise PscopeError(f"a row says neither true nor false of {column!r}")
    return frame.astype(dict(types)).reset_index(drop=True)


@contextmanager
def naming_rows(rows: Sequence[object]) -> Iterator[None]:
    """A block in which the error of one of these rows, by number, becomes a PscopeError that begins with it as text."""
    try:
        yield
    except RowError as error:
        if error.row < 0:
            raise
        raise PscopeError(f"{rows[error.row]}: {error.reason}") from error


def seed_of(*key: object) -> int:
    """A seed that is the key's own, as that of a run and a unit's name; `hash` would differ from process to process."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "big")


def permuted(seed: int, size: int) -> list[int]:
    """The numbers below `size` in an order drawn by the seed."""
    return np.random.default_rng(seed).permutation(size).tolist()
