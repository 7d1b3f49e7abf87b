"""`python -m benchmarks.spread -- fig2`: one process of two threads against two processes of one, on the same run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import pandas as pd
import typer
from rich.console import Console

from benchmarks.timing import Contestant, against, in_turn

SINGLE = "1 process × 2 threads"
TOGETHER = "2 processes × 1 thread"


def measure(command: list[str]) -> pd.DataFrame:
    """Wall time of a command in both ways, from the start of the interpreter to its end, in turn.

    One row per way: `seconds`, and the `ratio` to the single process with its band. Raises AssertionError if their
    tables differ.
    """
    tables: dict[str, pd.DataFrame] = {}

    def once(name: str, *launcher: str) -> None:
        threads = "2" if name == SINGLE else "1"
        with TemporaryDirectory() as folder:
            line = [sys.executable, *launcher, "-m", "pscope", *command, "--out", f"{folder}/run"]
            environment = {**os.environ, "OMP_NUM_THREADS": threads}
            subprocess.run(line, env=environment, check=True, capture_output=True)
            tables[name] = pd.read_parquet(Path(folder) / "run" / "table.parquet")

    contestants = {
        SINGLE: Contestant(lambda: once(SINGLE)),
        TOGETHER: Contestant(lambda: once(TOGETHER, "-m", "torch.distributed.run", "--nproc-per-node", "2")),
    }
    times = against(in_turn(contestants, seconds=0), SINGLE)
    pd.testing.assert_frame_equal(tables[SINGLE], tables[TOGETHER], atol=1e-5)
    return times


def main(command: Annotated[list[str] | None, typer.Argument()] = None) -> None:
    """The command that is run: by default `fig3`, layers 0 to 7 of every shipped entity."""
    times = measure(command or ["fig3", "--layers", "0-7"])
    Console().print(times.to_string(index=False))


if __name__ == "__main__":
    typer.run(main)
