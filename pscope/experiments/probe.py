"""The probe that Patchscopes are held against: a logistic regression from hidden states to answers, one per layer."""

from __future__ import annotations

import warnings

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler


def probe_elsewhere(states: np.ndarray, answers: np.ndarray, folds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What is predicted for each unit by probes fitted on the other folds, and by their most frequent answer.

    `states` are (units, layers, hidden), `answers` and `folds` (units,). Returns the predictions of each layer's probe,
    (units, layers), and those of the majority class, (units,).
    """
    predicted = np.empty(states.shape[:2], dtype=answers.dtype)
    majority = np.empty(len(answers), dtype=answers.dtype)
    for fold in np.unique(folds):
        here, others = folds == fold, folds != fold
        names, counts = np.unique(answers[others], return_counts=True)
        majority[here] = names[counts.argmax()]
        for layer in range(states.shape[1]):
            predicted[here, layer] = _predict(states[others, layer], answers[others], states[here, layer])
    return predicted, majority


def _predict(states: np.ndarray, answers: np.ndarray, unseen: np.ndarray) -> np.ndarray:
    if len(set(answers)) == 1:
        return np.full(len(unseen), answers[0])
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=200))
    with warnings.catch_warnings():
        # With more features than samples the loss goes on falling; the predictions do not change any more.
        warnings.simplefilter("ignore", ConvergenceWarning)
        return probe.fit(states, answers).predict(unseen)
