"""Bands around means: bootstrapped, and exact for shares in which nothing varies."""

from __future__ import annotations

import numpy as np
import pandas as pd
from scipy.stats import binomtest

RESAMPLES = 2000


def mean_bands(sums: np.ndarray, counts: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The 95 % bands, (cells,) low and (cells,) high, of means over units that are resampled whole.

    `sums` (units, cells) are each unit's sums of its observations, `counts` (units,) how many they are. Observations
    of one unit need not be independent of each other; a single unit has no band (NaN).
    """
    units = len(sums)
    if units == 1:
        return np.full(sums.shape[1], np.nan), np.full(sums.shape[1], np.nan)
    random = np.random.default_rng(seed)
    weights = random.multinomial(units, np.full(units, 1 / units), size=RESAMPLES)  # (resamples, units)
    means = (weights @ sums) / (weights @ counts)[:, None]
    low, high = np.quantile(means, [0.025, 0.975], axis=0)
    return low, high


def share_bands(sums: np.ndarray, counts: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """As `mean_bands`, for observations of 0 or 1: where all of a cell agree, resampling would give a band of no width.

    There it is the exact interval (Clopper-Pearson) of as many trials as there are units, even of one.
    """
    low, high = mean_bands(sums, counts, seed)
    units = len(sums)
    for agreed, successes in ((sums == 0, 0), (sums == counts[:, None], units)):
        exact = binomtest(successes, units).proportion_ci(0.95, method="exact")
        cells = agreed.all(axis=0)
        low[cells], high[cells] = exact.low, exact.high
    return low, high


def token_measures(sums: pd.DataFrame, counts: np.ndarray, seed: int) -> pd.DataFrame:
    """The means `precision_at_1` and `surprisal`, and for each its band, `…_low` and `…_high`: one row per cell.

    `sums` (texts, measure × cell) are those of each text's samples, `counts` (texts,) how many these are. A cell of
    which something is missing has no mean.
    """
    columns: dict[str, object] = {}
    for measure, bands in (("precision_at_1", share_bands), ("surprisal", mean_bands)):
        low, high = bands(sums[measure].to_numpy(), counts, seed)
        mean = sums[measure].sum(skipna=False) / counts.sum()
        columns |= {measure: mean, f"{measure}_low": low, f"{measure}_high": high}
    return pd.DataFrame(columns).reset_index()
