"""A run at work: begun or gone on with, its stages done part by part by all processes, and ended one way or another."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pandas as pd

from pscope.errors import PscopeError, RunError
from pscope.experiments.experiment import Experiment, Unit
from pscope.memory import out_of_memory
from pscope.runs.folder import STAGES, TABLE, Run
from pscope.runs.memory import read_in_memory
from pscope.runs.parts import Parts
from pscope.runs.processes import Processes
from pscope.runs.provenance import DATA, differences

Progress = Callable[[int, int], AbstractContextManager[Callable[[int], None]]]
"""From how many rows there are, and how many are done, a block with a function that is told how many are done since."""


def _unseen(total: int, done: int) -> AbstractContextManager[Callable[[int], None]]:
    return nullcontext(lambda done: None)


class Session:
    """What one process does for a run: alone, with companions, or for one `share` of it, as (3, 16).

    `tell` is called with a line for the user now and then, by the first process. Raises RunError where a folder cannot
    be written, is held by another process, or was begun with something else; with `force` that is only noted.
    """

    def __init__(
        self,
        folder: Path,
        processes: Processes,
        *,
        share: tuple[int, int] | None = None,
        resume: bool = False,
        force: bool = False,
        tell: Callable[[str], None] = lambda text: None,
        progress: Progress = _unseen,
    ) -> None:
        self.run = Run(processes.from_main(folder))
        self._processes, self._share = processes, share
        self._resume, self._force = resume, force
        self._tell = tell if processes.main else lambda text: None
        self._progress = progress if processes.main else _unseen
        self._locks = ExitStack()
        self._began = time.monotonic()
        self._stage = ""
        self._parts: Parts | None = None
        self._lock = "share-{}-of-{}".format(*share) if share else "run"

    def open(self, settings: Mapping[str, object], identity: Mapping[str, object]) -> None:
        """Begin the run with its first settings, or go on with one that has the same `identity`."""
        if self._processes.main:
            started = datetime.now(timezone.utc).isoformat()
            first = {**settings, **identity, "status": "running", "started": started}
            is_new = not self._resume and self.run.begin(first)
            try:
                self._hold(is_new)
                if not is_new:
                    self._refuse_another({**identity} if self._resume else {**identity, "options": settings["options"]})
            except BaseException:
                if is_new:
                    self.run.leave_nothing()
                raise
        self._processes.wait()
        if not self._processes.main and not self.run.there:
            number = self._processes.index
            raise RunError(f"process {number} does not see {self.run.folder}; give --out in a folder that all share")

    def _hold(self, is_new: bool) -> None:
        if not is_new and not self._resume and not self._share:
            raise RunError(f"{self.run.folder} was taken by another run just now; name another with --out")
        self._locks.enter_context(self.run.lock(self._lock))
        if self._resume and self.run.is_held("share-*"):
            raise RunError(f"shares of {self.run.folder} are still being done; resume it when they have ended")
        if self._share and self.run.is_held("run"):
            raise RunError(f"{self.run.folder} is being done whole by another process; its shares come too late")

    def stage(
        self, stage: str, experiment: Experiment[Any], settings: Mapping[str, object], *, last: bool = True
    ) -> pd.DataFrame | None:
        """The table of a stage, once all processes have done their parts of it.

        Of the last stage only the first process has it. Shares are of the stage of the table: nobody has that while
        some may be missing.
        """
        shared = stage == TABLE
        # A stage before that one, which all shares of a run need, one does whole, and the others wait for it.
        alone = self._share is not None and not shared and self._processes.main
        with self.run.lock(stage, wait=True) if alone else nullcontext():
            self._processes.wait()
            if self._processes.from_main(self.run.table(stage) is None):
                self._read(stage, experiment, settings)
            elif self._share and shared:
                self._tell(f"{self.run.folder} is whole already")
        if self._share and shared:
            return None
        return self.run.table(stage) if not last or self._processes.main else None

    def complete(self) -> None:
        """Say that all is there, and delete what was needed on the way."""
        if self._processes.main and not self._share:
            took = {"seconds": self._seconds()} if self._stage else {}
            table = self.run.table()
            self.run.tell(status="complete", rows=0 if table is None else len(table), **took)
            self.run.clear()
        self._locks.close()
        self._processes.close()

    def stop(self, error: BaseException) -> str | None:
        """Keep what is finished, or leave nothing where nothing is; returns what to say of it.

        Of several processes the first says it, or, where it has died, one of the others; the rest has None to say.
        """
        with self._locks:
            if not self._processes.main and not self._has_the_last_word():
                return None
            # What cannot be done as asked will not be done later either.
            before_table = self._stage not in STAGES[STAGES.index(TABLE) :]
            vain = isinstance(error, PscopeError) and not isinstance(error, RunError) and before_table
            alone = not self._resume and not self._share and self._processes.main
            if alone and (vain or not self.run.finished):
                self.run.leave_nothing()
                return ""
            with suppress(RunError):
                # If the disk is full, those of the start still stand.
                self.run.tell(status=f"stopped by {type(error).__name__}", seconds=self._seconds())
            finished = f"{len(self._parts.finished())} of {len(self._parts.plan)} parts" if self._parts else "the run"
            return f"kept {'the table' if self.run.whole else finished} in {self.run.folder}; `{self.again}` goes on"

    def _has_the_last_word(self) -> bool:
        """Whether the first process has died, and this is the first of the others to notice: it holds the folder."""
        if not self.run.there:
            return False
        self._last_word = self.run.lock(self._lock)
        try:
            self._last_word.__enter__()
        except RunError:
            return False
        return self.run.settings.get("status") == "running"

    @property
    def again(self) -> str:
        """The command that goes on with the run."""
        launched = f"torchrun --nproc-per-node {self._processes.count} -m " if self._processes.tensor_parallel else ""
        return f"{launched}pscope resume {shlex.quote(str(self.run.folder))}"

    def _read(self, stage: str, experiment: Experiment[Any], settings: Mapping[str, object]) -> None:
        """Do the missing parts of a stage, and join them."""
        run, processes, rows = self.run, self._processes, 0
        self._stage, check = stage, experiment.check
        if processes.main:
            self._tell(str(check))
            run.tell(**settings, path=str(check))
            rows = run.agree(stage, experiment.rows_per_part(experiment.rows_per_pass()))
        parts = self._parts = run.parts(stage, experiment.parts(processes.from_main(rows)))
        if processes.main and self._resume:
            for number in parts.discard_damaged():
                self._tell(f"part {number} was damaged, and is done again")
        missing = processes.from_main(parts.missing())
        if self._share and stage == TABLE:
            number, of = self._share
            missing = [part for part in missing if part % of == number - 1]
        with self._progress(parts.rows, parts.rows_finished()) as meter:
            for part in processes.mine(missing):
                rows_read = self._rows(experiment, parts.plan[part])
                if processes.main or not processes.tensor_parallel:
                    parts.write(part, rows_read)
                meter(parts.rows_finished())
            processes.wait(lambda: meter(parts.rows_finished()))
        if self._share and stage == TABLE:
            count = f"{len(parts.finished())} of {len(parts.plan)} parts are there"
            if not any(part % of == number - 1 for part in range(len(parts.plan))):
                count += ", and this share has none to do"
            self._tell(f"share {number} of {of} is done; {count}; `{self.again}` joins them")
            return
        if processes.main:
            run.keep(experiment.join(parts.table()), stage)
        processes.wait()

    def _rows(self, experiment: Experiment[Any], units: Sequence[Unit]) -> pd.DataFrame:
        if not self._processes.tensor_parallel:
            return read_in_memory(experiment, units, self._tell)
        # Those who hold one model together must not go different ways.
        try:
            return experiment.read(units)
        except RuntimeError as error:
            if out_of_memory(error):
                raise
            raise RunError(f"another process of this run has ended before its time, or failed: {error}") from error

    def _refuse_another(self, identity: Mapping[str, object]) -> None:
        changes = differences(self.run.settings, identity)
        if changes and not self._force:
            hint = "; --force goes on all the same, and notes it" if self._resume else ""
            raise RunError(f"{self.run.folder} was begun with something else: {', '.join(changes)}{hint}")
        if DATA in changes:
            self.run.set_aside()
        if changes:
            self.run.tell(**identity, forced=[*self.run.settings.get("forced", []), *changes])
        if self._resume:
            self.run.tell(status="running")

    def _seconds(self) -> float:
        before = self.run.settings.get("seconds", 0)
        return round((before if isinstance(before, (int, float)) else 0) + time.monotonic() - self._began, 1)
