"""A best pair of layers, chosen on others than it is reported on: folds, the choice, and the accuracy at it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from sklearn.model_selection import GroupKFold

from pscope.experiments.bands import mean_bands
from pscope.models.residual import Pair

FOLDS = 3


def draw_folds(groups: Sequence[str], seed: int) -> list[int]:
    """Which of the folds each unit is in, those of one group together; all in the first if there are too few groups.

    `groups` (units,) names the group of each unit.
    """
    if len(set(groups)) < FOLDS:
        return [0] * len(groups)
    folds = np.empty(len(groups), int)
    splits = GroupKFold(FOLDS, shuffle=True, random_state=seed).split(groups, groups=groups)
    for fold, (_, held_out) in enumerate(splits):
        folds[held_out] = fold
    return folds.tolist()


def found_at(rows: pd.DataFrame, condition: str, unit: list[str], what: str = "found") -> pd.DataFrame:
    """Found or not in one condition of a table, (units, layer × target layer); the columns `unit` tell units apart.

    `what` may be another column of numbers.
    """
    layers = ["layer", "target_layer"]
    here = (
        rows[rows["condition"] == condition].dropna(subset=layers).astype({**dict.fromkeys(layers, int), what: float})
    )
    return here.pivot(index=unit, columns=layers, values=what).sort_index(axis=1)


def folds_of(rows: pd.DataFrame, unit: list[str]) -> pd.Series:
    """The fold of each unit of a table, (units,)."""
    return rows.drop_duplicates(unit).set_index(unit)["fold"]


def best_on_half(scores: pd.DataFrame, random: np.random.Generator, seed: int) -> dict[str, object] | None:
    """The best pair of layers of scores (units, layer × target layer) on half of the units; None for a single unit.

    `layer` and `target_layer` are best in the mean on `chosen_on` units, drawn at random; `held_out` is the mean there
    of the `reported_on` others, with its band `low` and `high`; and the oracle, `maximum`, the best mean of all pairs
    on all units, at `maximum_layer` and `maximum_target_layer`.
    """
    if len(scores) < 2:
        return None
    order = random.permutation(len(scores))
    chosen_on, reported_on = scores.iloc[order[: len(order) // 2]], scores.iloc[order[len(order) // 2 :]]
    best, oracle = chosen_on.mean().idxmax(), scores.mean().idxmax()
    reported = reported_on[best]
    (low,), (high,) = mean_bands(reported.to_numpy()[:, None], np.ones(len(reported)), seed)
    chosen = {"layer": best[0], "target_layer": best[1], "chosen_on": len(chosen_on)}
    told = {"held_out": reported.mean(), "low": low, "high": high, "reported_on": len(reported)}
    maximum = {"maximum": scores[oracle].mean(), "maximum_layer": oracle[0], "maximum_target_layer": oracle[1]}
    return {**chosen, **told, **maximum}


def chosen_elsewhere(scores: pd.DataFrame, folds: pd.Series) -> pd.DataFrame:
    """For each unit the columns that were best on the other folds: one, or all that tie, True in (units, columns).

    `scores` is (units, columns), `folds` (units,) says which fold each is in, so that a unit has no part in choosing
    its own.
    """
    chosen = pd.DataFrame(False, scores.index, scores.columns)
    for fold in folds.unique():
        means = scores[folds != fold].mean()
        chosen.loc[folds == fold] = (means == means.max()).to_numpy()
    return chosen


def best_elsewhere(found: pd.DataFrame, log_probabilities: pd.DataFrame, folds: pd.Series) -> dict[int, Pair]:
    """For each fold the column that is best on the others, one alone: of those that tie the most probable in the mean.

    `found` and `log_probabilities` are (units, columns), `folds` (units,). Where there is but one fold, what is best on
    it stands for want of others.
    """
    best = {}
    for fold in sorted(folds.unique()):
        others = folds != fold if folds.nunique() > 1 else folds == fold
        means = found[others].mean()
        layer, target = log_probabilities[others].mean()[means == means.max()].idxmax()
        best[int(fold)] = int(layer), int(target)
    return best


def at_chosen(scores: pd.DataFrame, chosen: pd.DataFrame) -> pd.Series:
    """Each unit's score averaged over the columns that `chosen_elsewhere` chose for it: (units,).

    `scores`, (units, columns), may be of some of the units only, as a control's are.
    """
    # A mean of whole numbers, not a sum of fractions: units that are always right score 1 to the last digit.
    return scores.where(chosen.loc[scores.index]).mean(axis=1)
