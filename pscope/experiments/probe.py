"""The probe that Patchscopes are held against: a logistic regression from hidden states to answers, one per layer."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler


class Probed(NamedTuple):
    """What was predicted for each unit by what was fitted on the other folds."""

    predicted: np.ndarray
    """(units, layers): the answer that each layer's probe gives."""
    right: np.ndarray
    """(units, layers): whether it counts."""
    chosen: np.ndarray
    """(units, layers): whether the layer is the best for the unit's fold, or one that ties with it."""
    majority: np.ndarray
    """(units,): the answer most frequent in the other folds."""
    majority_right: np.ndarray
    """(units,)"""
    nameable: np.ndarray
    """(units,): whether any answer of the other folds counts, without which a probe cannot be right."""


def probe_elsewhere(
    states: np.ndarray, answers: Sequence[str], folds: np.ndarray, counts: Callable[[int, str], bool]
) -> Probed:
    """Probe each unit by what was fitted on the other folds, of which there must be three at least.

    `states` are (units, layers, hidden), `answers` and `folds` (units,); `counts(unit, answer)` says whether an answer,
    perhaps another unit's, is right for a unit. A layer is chosen for a fold by probes that have not seen it: fitted on
    some of the other folds and scored on the one that they left out.
    """
    names, classes = np.unique(answers, return_inverse=True)
    accepted = np.array([[counts(unit, name) for name in names.tolist()] for unit in range(len(classes))])
    units = np.arange(len(classes))
    within = _by_other_folds(states, classes, folds)
    predicted, majority = np.empty(states.shape[:2], int), np.empty(len(classes), int)
    chosen, nameable = np.empty(states.shape[:2], bool), np.empty(len(classes), bool)
    for fold in np.unique(folds):
        here, others = folds == fold, folds != fold
        predicted[here] = _predict(states, classes, others, here)
        shares = accepted[units[others, None], within[fold][others]].mean(axis=0)
        chosen[here] = shares == shares.max()
        frequencies = np.bincount(classes[others], minlength=len(names))
        majority[here] = frequencies.argmax()
        nameable[here] = accepted[here][:, frequencies > 0].any(axis=1)
    right, majority_right = accepted[units[:, None], predicted], accepted[units, majority]
    return Probed(names[predicted], right, chosen, names[majority], majority_right, nameable)


def _by_other_folds(states: np.ndarray, classes: np.ndarray, folds: np.ndarray) -> dict[object, np.ndarray]:
    """For each fold the classes given to the units of all others, (units, layers), by what was fitted on the rest."""
    within = {fold: np.empty(states.shape[:2], int) for fold in np.unique(folds).tolist()}
    # What has seen neither of two folds is asked about both.
    for pair in combinations(within, 2):
        unseen = np.isin(folds, pair)
        predicted = _predict(states, classes, ~unseen, unseen)
        for fold in pair:
            within[fold][unseen] = predicted
    return within


def _predict(states: np.ndarray, classes: np.ndarray, seen: np.ndarray, unseen: np.ndarray) -> np.ndarray:
    """The classes that probes fitted on the `seen` units give to the `unseen` ones, (unseen, layers)."""
    names = np.unique(classes[seen])
    if len(names) == 1:
        return np.full((unseen.sum(), states.shape[1]), names[0])
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=200))
    with warnings.catch_warnings():
        # With more features than samples the loss goes on falling; the predictions do not change any more.
        warnings.simplefilter("ignore", ConvergenceWarning)
        predictions = [
            probe.fit(states[seen, layer], classes[seen]).predict(states[unseen, layer])
            for layer in range(states.shape[1])
        ]
    return np.stack(predictions, axis=1)
