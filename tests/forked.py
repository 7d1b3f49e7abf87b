"""Processes that tests start, watch and kill, forked from one that has imported what they need.

Python with torch and transformers takes seconds to start, a fork none. Each has one thread for torch: forks may have no
more.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import forkserver
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

IMPORTED = [
    "pscope.experiments.entity_resolution",
    "pscope.experiments.next_token",
    "pscope.runs.folder",
    "pscope.show.entity_resolution",
    "torch.distributed.launcher.api",
    "transformers.models.llama.modeling_llama",
]


class Forked:
    """A process that runs a function of a module, with the environment and working directory as they are now.

    It is spoken to as those of `subprocess` are. Where the block ends, it ends, and what it has started.
    """

    def __init__(self, run: Callable[..., None], *arguments: object) -> None:
        self._kept = TemporaryDirectory()
        self.folder = Path(self._kept.name)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(IMPORTED)
        with patch.dict(os.environ, OMP_NUM_THREADS="1"):
            forkserver.ensure_running()
        there = self.folder, os.getcwd(), {**os.environ, "OMP_NUM_THREADS": "1"}
        self._process = context.Process(target=_begin, args=(*there, run, arguments))
        self._process.start()
        self.pid = self._process.pid

    def __enter__(self) -> Forked:
        return self

    def __exit__(self, *error: object) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.join()

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What was printed, and what was told on standard error, once it has ended."""
        self._process.join(timeout)
        assert self.returncode is not None, f"it has not ended within {timeout} seconds"
        return tuple((self.folder / name).read_text("utf-8") for name in ("stdout", "stderr"))


def pscope(*arguments: object) -> Forked:
    """A command of pscope."""
    return Forked(command, *map(str, arguments))


def two(run: Callable[..., None], *arguments: object) -> Forked:
    """A function in two processes, which are started and ended as by torchrun."""
    return Forked(_launch, run, *arguments)


def two_of_pscope(*arguments: object) -> Forked:
    """A command of pscope in two processes."""
    return two(command, *map(str, arguments))


def pid_of(rank: int, started: Forked) -> int:
    """Which process one of the two is."""
    return int((started.folder / f"rank {rank}").read_text())


def _begin(folder: Path, cwd: str, environment: dict[str, str], run: Callable[..., None], arguments: tuple) -> None:
    os.setsid()
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment, FORKED=str(folder))
    # Whoever runs the tests may have some of them ignored.
    for signalled in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signalled, signal.SIG_DFL)
    run(*arguments)


def command(*arguments: str) -> None:
    """What runs in the process of a command."""
    from pscope.cli import main

    sys.argv = ["pscope", *arguments]
    main()


def _launch(run: Callable[..., None], *arguments: object) -> None:
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        1, 1, 2, run_id="tests", rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=0, start_method="fork"
    )
    elastic_launch(config, _ranked)(run, *arguments)


def _ranked(run: Callable[..., None], *arguments: object) -> None:
    (Path(os.environ["FORKED"]) / f"rank {os.environ['RANK']}").write_text(str(os.getpid()))
    try:
        run(*arguments)
    except SystemExit as end:
        if end.code:
            raise
