"""Time and peak memory of each case of `benchmarks.growth`, which runs this in a process of its own."""

from __future__ import annotations

import json
import mmap
import sys
from collections.abc import Callable
from threading import Event, Thread

import psutil
import torch

import pscope
from benchmarks.growth import cases
from benchmarks.timing import seconds_of


def peak_of(run: Callable[[], object], device: torch.device) -> int:
    """By how many bytes the process, or what a GPU has allocated, grows at most while something runs."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    process, ended, seen = psutil.Process(), Event(), []

    def watch() -> None:
        while not ended.wait(0.001):
            seen.append(process.memory_info().rss)

    before = process.memory_info().rss
    watcher = Thread(target=watch)
    watcher.start()
    run()
    ended.set()
    watcher.join()
    # Less than a page cannot be told from nothing.
    return max([before + mmap.PAGESIZE, *seen]) - before


def main() -> None:
    name, dtype, device, *quick = sys.argv[1:]
    model = pscope.load(name, dtype=dtype, device=device)
    found = []
    for quantity, value, run in cases(model, bool(quick)):
        run()
        seconds = []
        peak = peak_of(lambda run=run, seconds=seconds: seconds.append(seconds_of(run)), model.device)
        found.append({"quantity": quantity, "value": value, "seconds": seconds[0], "peak": peak})
    print(json.dumps(found))


if __name__ == "__main__":
    main()
