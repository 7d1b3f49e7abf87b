"""The parts of a table, each a file from the moment it is finished: what survives, and what processes share."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from pscope.errors import RunError
from pscope.experiments.experiment import Unit
from pscope.files import written_whole

_UNITS, _ROWS = b"pscope.units", b"pscope.rows"


class Parts:
    """Files `NNNNN.parquet` in a folder, one for each group of units in `plan`, whoever reads it.

    Each holds digests of its units and of its rows. A file is written beside and renamed, so that nobody sees
    half of one.
    """

    def __init__(self, folder: Path, plan: Sequence[Sequence[Unit]]) -> None:
        self.folder, self.plan = folder, plan

    def finished(self) -> list[int]:
        """The numbers of the parts that are there."""
        names = set(os.listdir(self.folder)) if self.folder.is_dir() else set()
        return [number for number in range(len(self.plan)) if self._path(number).name in names]

    def missing(self) -> list[int]:
        """The numbers of those that are not."""
        return sorted({*range(len(self.plan))} - {*self.finished()})

    @property
    def rows(self) -> int:
        """How many rows are decoded for all parts."""
        return sum(unit.rows for part in self.plan for unit in part)

    def rows_finished(self) -> int:
        """How many rows were decoded for those that are there."""
        return sum(unit.rows for number in self.finished() for unit in self.plan[number])

    def discard_damaged(self) -> list[int]:
        """Delete the parts that cannot be read whole, or are not of these units, and what nobody finished.

        Returns the numbers of the damaged ones.
        """
        damaged = []
        for number in self.finished():
            try:
                self._read(number)
            except RunError:
                damaged.append(number)
                self._path(number).unlink()
        for unfinished in self.folder.glob(".*"):
            unfinished.unlink()
        return damaged

    def write(self, number: int, rows: pd.DataFrame) -> None:
        """Keep the rows of one part. Raises RunError where it does not fit."""
        table = pa.Table.from_pandas(rows, preserve_index=False)
        digests = {_UNITS: self._of(number), _ROWS: _digest(table.to_pandas())}
        table = table.replace_schema_metadata({**table.schema.metadata, **digests})
        path = self._path(number)
        try:
            self.folder.mkdir(exist_ok=True)
            with written_whole(path) as unfinished:
                pq.write_table(table, unfinished)
        except OSError as error:
            raise RunError(f"cannot write {path}: {os.strerror(error.errno) if error.errno else error}") from error

    def table(self) -> pd.DataFrame:
        """The rows of all parts, in the order of the units. Raises RunError if one is missing or damaged."""
        return pd.concat([self._read(number) for number in range(len(self.plan))], ignore_index=True)

    def _read(self, number: int) -> pd.DataFrame:
        path = self._path(number)
        try:
            table = pq.read_table(path)
            digests, rows = table.schema.metadata or {}, table.to_pandas()
            is_whole = (digests.get(_UNITS), digests.get(_ROWS)) == (self._of(number), _digest(rows))
        except Exception as error:
            # Damaged bytes make errors of any kind.
            raise RunError(f"{path} cannot be read: {' '.join(str(error).split())}; resume the run") from error
        if not is_whole:
            raise RunError(f"{path} does not hold what was written; resume the run")
        return rows

    def _of(self, number: int) -> bytes:
        units = "\0".join(map(repr, self.plan[number]))
        return hashlib.sha256(units.encode("utf-8", "backslashreplace")).hexdigest().encode()

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:05d}.parquet"


def _digest(rows: pd.DataFrame) -> bytes:
    values = pd.util.hash_pandas_object(rows, index=False).to_numpy().tobytes()
    return hashlib.sha256("\0".join(rows.columns).encode() + values).hexdigest().encode()
