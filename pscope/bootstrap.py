"""Bootstrapped bands around means."""

from __future__ import annotations

import numpy as np

RESAMPLES = 2000


def mean_bands(
    sums: np.ndarray, counts: np.ndarray, seed: int, resamples: int = RESAMPLES
) -> tuple[np.ndarray, np.ndarray]:
    """The 95 % bands, (cells,) low and (cells,) high, of means over units that are resampled whole.

    `sums` (units, cells) are each unit's sums of its observations, `counts` (units,) how many they are. Observations
    of one unit need not be independent of each other; a single unit has no band (NaN).
    """
    units = len(sums)
    if units == 1:
        return np.full(sums.shape[1], np.nan), np.full(sums.shape[1], np.nan)
    random = np.random.default_rng(seed)
    picked = random.multinomial(units, np.full(units, 1 / units), size=resamples)  # (resamples, units)
    means = (picked @ sums) / (picked @ counts)[:, None]
    low, high = np.quantile(means, [0.025, 0.975], axis=0)
    return low, high
