"""How far a run has come: a bar on a terminal, a line a minute anywhere else."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from pscope.cli.console import err, tell
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

PERIOD = 60
"""Seconds from line to line."""


@contextmanager
def progress(total: int, done: int = 0, what: str = "rows") -> Iterator[Callable[[int], None]]:
    """A function that is told how many of so many rows, or something else, are done by now; some were before."""
    if err.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        # Work comes in parts of many seconds, of which the estimate must see several.
        bar = Progress(*columns, TextColumn("left"), TimeRemainingColumn(), console=err, speed_estimate_period=300)
        with bar:
            task = bar.add_task(what, total=total, completed=done)
            yield lambda done: bar.update(task, completed=done)
    else:
        yield _Lines(total, done, what)


class _Lines:
    """The first line comes with the first rows, so that it is soon known how long all will take; the last, if there was
    one before, with all of them.
    """

    def __init__(self, total: int, done: int, what: str) -> None:
        self._total, self._before, self._what = total, done, what
        self._began = time.monotonic()
        self._next, self._unfinished = self._began, False

    def __call__(self, done: int) -> None:
        now = time.monotonic()
        seconds = now - self._began
        if done == self._total and self._unfinished:
            self._unfinished = False
            took = f"{seconds / 60:.0f} min" if seconds >= 60 else f"{seconds:.0f} s"
            tell(f"all {self._total} {self._what}, in {took}")
        if done in (self._before, self._total) or now < self._next:
            return
        self._next, self._unfinished = now + PERIOD, True
        rate = (done - self._before) / max(seconds, 1e-9)
        minutes = (self._total - done) / rate / 60
        left = f"about {minutes:.0f} min" if minutes >= 1 else "less than a minute"
        share = f"{done} of {self._total} {self._what} ({done / self._total:.0%})"
        tell(f"{share}, {rate:.3g} {self._what} a second, {left} left")
