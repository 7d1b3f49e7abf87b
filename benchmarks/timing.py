"""Contestants in turn, in one process: medians, and ratios with bands from resampling the rounds."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch


class Contestant(NamedTuple):
    """What to run, and how many rows (or passes) one run answers for."""

    run: Callable[[], object]
    rows: int = 1


def seconds_of(run: Callable[[], object]) -> float:
    """How long something takes, what it left to a GPU included."""
    began = perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return perf_counter() - began


def in_turn(contestants: dict[str, Contestant], seconds: float, most_rounds: int = 30) -> pd.DataFrame:
    """Seconds per row, one column per contestant and one line per round, for about `seconds`, three rounds at least.

    All take their turn before any has another; who begins changes from round to round. They have been warmed up: by
    the run in which their answers were compared.
    """
    names, rounds = list(contestants), []
    began = perf_counter()
    while len(rounds) < 3 or (len(rounds) < most_rounds and perf_counter() - began < seconds):
        shift = len(rounds) % len(names)
        taken = {}
        for name in names[shift:] + names[:shift]:
            contestant = contestants[name]
            taken[name] = seconds_of(contestant.run) / contestant.rows
        rounds.append(taken)
    return pd.DataFrame(rounds, columns=names)


def against(times: pd.DataFrame, base: str, resamples: int = 2000) -> pd.DataFrame:
    """For each contestant its median `seconds`, and how many times those of `base` they are: `ratio`, `low`, `high`.

    The ratio is the median of the rounds' own ratios, so that a machine that slows down slows both; the 95 % band is
    from resampling rounds.
    """
    ratios = times.div(times[base], axis=0)
    drawn = np.random.default_rng(0).integers(len(times), size=(resamples, len(times)))
    medians = np.median(ratios.to_numpy()[drawn], axis=1)  # (resamples, contestants)
    low, high = np.quantile(medians, [0.025, 0.975], axis=0)
    found = pd.DataFrame({"seconds": times.median(), "ratio": ratios.median(), "low": low, "high": high})
    return found.rename_axis("contestant").reset_index()
