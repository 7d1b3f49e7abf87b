"""Whether answers that are scored and answers that are said rank relations, wirings, and pairs of layers alike."""

from __future__ import annotations

import warnings

import numpy as np
import pandas as pd
from scipy.stats import ConstantInputWarning, spearmanr

from pscope.experiments.bands import RESAMPLES
from pscope.experiments.experiment import seed_of
from pscope.experiments.held_out import found_at
from pscope.experiments.sweep import PATCHED

ALL = "all of them"

FEWEST = 4
"""Of fewer a rank correlation says nothing."""


def rank_agreement(
    scores: pd.DataFrame, continuations: pd.DataFrame, key: str, unit: list[str], group: str, seed: int = 0
) -> pd.DataFrame:
    """Spearman's rank correlation of the shares answered by score and by word, over the pairs of layers that were said.

    One row for each value of `key`, as a relation or a wiring: `ranked`, what is ranked, `count`, how many of them,
    `rho`, and its 95 % band, `low` and `high`. In the last row the values of `key` are ranked themselves, by their mean
    over those pairs. The band is that of Fisher's z, as wide as it scatters where the `group` is resampled that units,
    told apart by the columns `unit`, belong to: resampled ranks are noisier than the ranks themselves, and would give a
    band around less. `rho` is missing where all shares are alike or fewer than four are ranked, the band where there is
    but one group.
    """
    results, score_means, word_means = [], [], []
    for value, part in continuations.groupby(key, sort=False):
        by_word = found_at(part, PATCHED, unit)
        by_score = found_at(scores[scores[key] == value], PATCHED, unit)
        pairs, units = by_word.columns.intersection(by_score.columns), by_word.index.intersection(by_score.index)
        if pairs.empty or units.empty:
            continue
        groups = part.drop_duplicates(unit).set_index(unit, drop=False)[group]
        shares = [_resampled_shares(cells.loc[units, pairs], groups.loc[units], seed) for cells in (by_score, by_word)]
        results.append({key: value, "ranked": "pairs of layers", **_agreement(*shares)})
        score_means.append(shares[0].mean(axis=1))
        word_means.append(shares[1].mean(axis=1))
    if len(results) > 1:
        means = (np.stack(each, axis=1) for each in (score_means, word_means))
        results.append({key: ALL, "ranked": key, **_agreement(*means)})
    return pd.DataFrame(results, columns=[key, "ranked", "count", "rho", "low", "high"])


def _resampled_shares(cells: pd.DataFrame, groups: pd.Series, seed: int) -> np.ndarray:
    """The share of each column, (1 + resamples, columns): first as it is, then with groups drawn anew."""
    by_group = cells.groupby(groups)
    sums, counts = by_group.sum().to_numpy(), by_group.size().to_numpy()
    # Others of the same groups have the same draws; those of other groups know nothing of these.
    random = np.random.default_rng(seed_of(seed, *by_group.size().index))
    draws = random.multinomial(len(counts), np.full(len(counts), 1 / len(counts)), RESAMPLES)
    weights = np.vstack([np.ones_like(counts), draws])
    return (weights @ sums) / (weights @ counts)[:, None]


def _agreement(by_score: np.ndarray, by_word: np.ndarray) -> dict[str, float]:
    """The rank correlation of two sets of shares, (1 + resamples, columns) each, and its band."""
    unknown = {"count": by_score.shape[1], "rho": np.nan, "low": np.nan, "high": np.nan}
    if by_score.shape[1] < FEWEST:
        return unknown
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConstantInputWarning)
        rho, *resampled = (spearmanr(one, other).statistic for one, other in zip(by_score, by_word, strict=True))
    # Of a perfect agreement z would be infinite.
    z, *around = np.arctanh(np.clip([rho, *resampled], -0.999, 0.999))
    spread = 1.96 * np.nanstd(around) if len(set(resampled)) > 1 else np.nan
    low, high = np.minimum(rho, np.tanh(z - spread)), np.maximum(rho, np.tanh(z + spread))
    return {**unknown, "rho": rho, "low": low, "high": high}
