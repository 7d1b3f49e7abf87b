"""The processes that do one run: this one alone, or those that torchrun or accelerate started together."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from threading import Thread
from typing import TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState

from pscope.errors import RunError

T = TypeVar("T")

PATIENCE = timedelta(days=30)
"""How long processes wait for the slowest one. One that dies is noticed at once: its connection ends."""


class Processes:
    """This process and its companions: which it is, its device, and when the others are where it is.

    With `tensor_parallel` they hold one model together, and do every part together; without, each has its own model
    and does its own parts. The first one, `main`, writes what belongs to all.
    """

    def __init__(self, device: str | None = None, *, tensor_parallel: bool = False) -> None:
        self.index, self.count, self.device = 0, 1, device
        self.tensor_parallel = tensor_parallel
        if os.environ.get("WORLD_SIZE", "1") != "1":
            state = PartialState(cpu=device == "cpu" or not torch.cuda.is_available(), timeout=PATIENCE)
            self.index, self.count = state.process_index, state.num_processes
            self.device = device if device is not None and device != "cuda" else str(state.device)
            # Waiting takes nothing of a GPU.
            self._group = dist.new_group(backend="gloo", timeout=PATIENCE)

    @property
    def main(self) -> bool:
        return self.index == 0

    def mine(self, numbers: list[int]) -> list[int]:
        """Which of these parts this process does."""
        return numbers if self.tensor_parallel else numbers[self.index :: self.count]

    def from_main(self, value: T) -> T:
        """What the first process has, in all of them."""
        if self.count == 1:
            return value
        box = [value]
        self._together(lambda: dist.broadcast_object_list(box, src=0, group=self._group))
        return box[0]

    def least(self, value: int) -> int:
        """The smallest of what the processes have, in all of them."""
        if self.count == 1:
            return value
        smallest = torch.tensor(value)
        self._together(lambda: dist.all_reduce(smallest, dist.ReduceOp.MIN, self._group))
        return int(smallest)

    def wait(self, meanwhile: Callable[[], None] = lambda: None) -> None:
        """Return once all processes are here; `meanwhile` is called twice a second. Raises RunError if one has died."""
        if self.count > 1:
            self._together(lambda: dist.barrier(group=self._group), meanwhile)

    def _together(self, meet: Callable[[], None], meanwhile: Callable[[], None] = lambda: None) -> None:
        faults: list[RuntimeError] = []

        def try_to_meet() -> None:
            try:
                meet()
            except RuntimeError as error:
                faults.append(error)

        # In a thread, so that Ctrl-C and signals of the scheduler are heard.
        meeting = Thread(target=try_to_meet, daemon=True)
        meeting.start()
        while meeting.is_alive():
            meeting.join(0.5)
            meanwhile()
        if faults:
            raise RunError("another process of this run has ended before its time") from faults[0]

    def close(self) -> None:
        """Part from the others."""
        if dist.is_initialized():
            dist.destroy_process_group()
