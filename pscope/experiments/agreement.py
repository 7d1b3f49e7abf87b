"""Whether answers that are scored and answers that are said rank relations, wirings, and pairs of layers alike."""

from __future__ import annotations

import warnings

import numpy as np
import pandas as pd
from scipy.stats import ConstantInputWarning, spearmanr

from pscope.experiments.bands import RESAMPLES
from pscope.experiments.held_out import found_at
from pscope.experiments.sweep import PATCHED

ALL = "all of them"

FEWEST = 4
"""Of fewer a rank correlation says nothing."""


def rank_agreement(
    scores: pd.DataFrame, said: pd.DataFrame, key: str, unit: list[str], group: str, seed: int = 0
) -> pd.DataFrame:
    """Spearman's rank correlation of the shares answered by score and by word, over the pairs of layers that were said.

    One row for each value of `key`, as a relation or a wiring: `ranked`, what is ranked, `count`, how many of them,
    `rho`, and its 95 % band, `low` and `high`. In the last row the values of `key` are ranked themselves, by their mean
    over those pairs. The band is that of Fisher's z, as wide as it scatters where the `group` is resampled that units,
    told apart by the columns `unit`, belong to: resampled ranks are noisier than the ranks themselves, and would give a
    band around less. `rho` is missing where all shares are alike or fewer than four are ranked, the band where there is
    but one group.
    """
    found, scored_means, said_means = [], [], []
    for value, spoken in said.groupby(key, sort=False):
        heard = found_at(spoken, PATCHED, unit)
        scored = found_at(scores[scores[key] == value], PATCHED, unit)
        both, units = heard.columns.intersection(scored.columns), heard.index.intersection(scored.index)
        if both.empty or units.empty:
            continue
        groups = spoken.drop_duplicates(unit).set_index(unit, drop=False)[group]
        one, other = (_resampled(cells.loc[units, both], groups.loc[units], seed) for cells in (scored, heard))
        found.append({key: value, "ranked": "pairs of layers", **_agreement(one, other)})
        scored_means.append(one.mean(axis=1))
        said_means.append(other.mean(axis=1))
    if len(found) > 1:
        means = (np.stack(each, axis=1) for each in (scored_means, said_means))
        found.append({key: ALL, "ranked": key, **_agreement(*means)})
    return pd.DataFrame(found, columns=[key, "ranked", "count", "rho", "low", "high"])


def _resampled(cells: pd.DataFrame, groups: pd.Series, seed: int) -> np.ndarray:
    """The share of each column, (1 + resamples, columns): first as it is, then with groups drawn anew."""
    by_group = cells.groupby(groups)
    sums, counts = by_group.sum().to_numpy(), by_group.size().to_numpy()
    drawn = np.random.default_rng(seed).multinomial(len(counts), np.full(len(counts), 1 / len(counts)), RESAMPLES)
    weights = np.vstack([np.ones_like(counts), drawn])
    return (weights @ sums) / (weights @ counts)[:, None]


def _agreement(scored: np.ndarray, said: np.ndarray) -> dict[str, float]:
    """The rank correlation of two sets of shares, (1 + resamples, columns) each, and its band."""
    unknown = {"count": scored.shape[1], "rho": np.nan, "low": np.nan, "high": np.nan}
    if scored.shape[1] < FEWEST:
        return unknown
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConstantInputWarning)
        whole, *resampled = (spearmanr(one, other).statistic for one, other in zip(scored, said, strict=True))
    # Of a perfect agreement z would be infinite.
    z, *around = np.arctanh(np.clip([whole, *resampled], -0.999, 0.999))
    spread = 1.96 * np.nanstd(around) if len(set(resampled)) > 1 else np.nan
    low, high = np.minimum(whole, np.tanh(z - spread)), np.maximum(whole, np.tanh(z + spread))
    return {**unknown, "rho": whole, "low": low, "high": high}
