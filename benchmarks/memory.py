"""The peak memory of each case of `benchmarks.growth`, which runs this in a process of its own."""

from __future__ import annotations

import json
import sys
from threading import Event, Thread

import psutil
import torch

import pscope
from benchmarks.growth import cases


def peak_of(run) -> int:
    """By how many bytes the process, or what a GPU has allocated, grows at most while something runs."""
    if torch.cuda.is_available():
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
    return max(seen, default=before) - before


def main() -> None:
    name, dtype, *quick = sys.argv[1:]
    found = []
    for quantity, value, run in cases(pscope.load(name, dtype=dtype), bool(quick)):
        run()
        found.append({"quantity": quantity, "value": value, "peak": peak_of(run)})
    print(json.dumps(found))


if __name__ == "__main__":
    main()
