"""What Table 2 shows: accuracies by oracle and by choice on other subjects, scored and said, beside a probe."""

from __future__ import annotations

import numpy as np
import pandas as pd
from scipy.stats import permutation_test

from pscope.experiments.attribute_extraction import ANOTHER, MAJORITY, PROBE
from pscope.experiments.bands import share_bands
from pscope.experiments.held_out import at_chosen, chosen_elsewhere, folds_of, found_at
from pscope.experiments.scored_sweep import at_best_pairs, chosen_pairs
from pscope.experiments.sweep import CLEAN, PATCHED, RANDOM

SCORED, SAID = "scored", "said"
RESAMPLES = 9999

_UNIT = ["subject", "context"]


def summarise(scores: pd.DataFrame, continuations: pd.DataFrame | None = None, seed: int = 0) -> pd.DataFrame:
    """One row per relation, and, where there are `continuations` too, a second one: how often the answer is right.

    `judged` says which. `subjects` and `samples` (subject × context) count what was read. The paper's number is
    `oracle`, with `oracle_std`: at each ℓ the share of samples for which any ℓ* gives the answer, mean and standard
    deviation over ℓ; `random_oracle` and `another_oracle` are those of the controls. All are missing where rows were
    said at chosen pairs alone. `held_out` is the accuracy at the (ℓ, ℓ*) that was best for the subjects of the other
    folds (by scores, where rows were said at those pairs alone), averaged over those that tie, and `random_held_out`
    and `another_held_out` those of the controls at the same pairs; its band is from resampling subjects, and exact
    where all agree. `probe` and `probe_std` are over ℓ, `probe_held_out` is at the layer that was best within the other
    folds.

    `p` is that of a paired permutation test of held_out against probe_held_out over the `nameable` subjects, times the
    number of relations (Bonferroni). The others are left out, since no probe could name their answers: nobody in
    the other folds has them. `least_p` is the smallest that so many subjects can give; where it is above .05, p is
    missing.
    """
    relations = list(dict.fromkeys(scores["relation"]))
    summaries = []
    for relation in relations:
        of_relation = scores[scores["relation"] == relation].astype({"found": float})
        probe = of_relation[of_relation["condition"] == PROBE]
        probe_means = probe[probe["chosen"].astype(bool)].groupby(_UNIT)["found"].mean()
        nameable = probe[probe["nameable"].astype(bool)]["subject"].unique()
        beside = {
            "probe": probe["found"].mean(),
            "probe_std": probe.groupby("layer")["found"].mean().std(ddof=0),
            "probe_held_out": probe_means.mean(),
            "majority": of_relation.loc[of_relation["condition"] == MAJORITY, "found"].mean(),
            "nameable": len(nameable),
            "least_p": _least_p(len(nameable), len(relations)),
        }
        for judged, table in ((SCORED, scores), (SAID, continuations)):
            if table is not None:
                rows = table[table["relation"] == relation].astype({"found": float})
                result, held_out = _accuracies(rows, seed)
                p = _corrected_p(held_out.loc[nameable], probe_means.loc[nameable], len(relations), seed)
                summaries.append({"relation": relation, "judged": judged, **result, **beside, "p": p})
    return pd.DataFrame(summaries)


def _accuracies(rows: pd.DataFrame, seed: int) -> tuple[dict[str, float], pd.Series]:
    """What one relation's rows tell, and the accuracy of each sample at the pairs chosen elsewhere."""
    grid = {name: found_at(rows, name, _UNIT) for name in (PATCHED, RANDOM, ANOTHER)}
    chosen = chosen_pairs(rows, grid[PATCHED], _UNIT)
    held_out = at_chosen(grid[PATCHED], chosen)
    per_subject = held_out.groupby("subject").agg(["sum", "count"])
    (low,), (high,) = share_bands(per_subject[["sum"]].to_numpy(), per_subject["count"].to_numpy(), seed)
    by_layer = {} if at_best_pairs(rows) else {name: _any_target(cells).mean() for name, cells in grid.items()}
    result = {
        "subjects": len(per_subject),
        "samples": len(held_out),
        "oracle": by_layer[PATCHED].mean() if by_layer else np.nan,
        "oracle_std": by_layer[PATCHED].std(ddof=0) if by_layer else np.nan,
        "held_out": held_out.mean(),
        "held_out_low": low,
        "held_out_high": high,
        "clean": rows.loc[rows["condition"] == CLEAN, "found"].mean(),
    }
    for condition, name in ((RANDOM, "random"), (ANOTHER, "another")):
        cells = grid[condition]
        result[f"{name}_oracle"] = by_layer[condition].mean() if by_layer and len(cells) else np.nan
        result[f"{name}_held_out"] = at_chosen(cells, chosen).mean() if len(cells) else np.nan
    return result, held_out


def _any_target(cells: pd.DataFrame) -> pd.DataFrame:
    """Whether any target layer gives the answer: (samples, layers)."""
    return cells.T.groupby(level="layer").max().T


BEST, MEAN, HELD_OUT = "best target layer (oracle)", "mean over target layers", "target layer held out"


def over_layers(scores: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """Accuracy over source layers: per relation × condition × `taken` × layer the mean `found`, and `low` and `high`.

    What is `taken` of the target layers: whether any gives the answer (an oracle, as in the paper), the mean over them,
    or the one that was best at this ℓ for the subjects of the other folds. Of the controls the first; the probe has no
    target layer. Bands are from resampling subjects, exact where all agree.
    """
    frames = []
    for relation, rows in scores.groupby("relation", sort=False):
        rows = rows.astype({"found": float})
        patched = found_at(rows, PATCHED, _UNIT)
        folds = folds_of(rows, _UNIT).loc[patched.index]
        probe = rows[rows["condition"] == PROBE].astype({"layer": int})
        lines: dict[tuple[str, str | None], pd.DataFrame] = {
            (PATCHED, taken): cells for taken, cells in _reductions(patched, folds).items()
        }
        for control in (RANDOM, ANOTHER):
            cells = found_at(rows, control, _UNIT)
            if len(cells):
                lines[control, BEST] = _any_target(cells)
        if len(probe):
            lines[PROBE, None] = probe.pivot(index=_UNIT, columns="layer", values="found")
        for (condition, taken), cells in lines.items():
            groups = cells.groupby("subject")
            low, high = share_bands(groups.sum().to_numpy(), groups.size().to_numpy(), seed)
            columns = {"relation": relation, "condition": condition, "taken": taken, "layer": cells.columns}
            frames.append(pd.DataFrame({**columns, "found": cells.mean().to_numpy(), "low": low, "high": high}))
    return pd.concat(frames, ignore_index=True)


def _reductions(patched: pd.DataFrame, folds: pd.Series) -> dict[str, pd.DataFrame]:
    """Each way of taking the target layers of a grid: (samples, layers)."""
    layers = patched.columns.unique("layer")
    at = {layer: patched.xs(layer, axis=1, level="layer", drop_level=False) for layer in layers}
    held_out = {layer: at_chosen(cells, chosen_elsewhere(cells, folds)) for layer, cells in at.items()}
    mean = patched.T.groupby(level="layer").mean().T
    return {BEST: _any_target(patched), MEAN: mean, HELD_OUT: pd.DataFrame(held_out)}


def _least_p(subjects: int, tests: int) -> float:
    """Of all flips of sign, or of those that are drawn, two are the most extreme."""
    return min(1.0, tests * max(2 / 2**subjects, 2 / (RESAMPLES + 1)))


def _corrected_p(one: pd.Series, other: pd.Series, tests: int, seed: int) -> float:
    """Of a paired permutation test over subjects, times the number of tests; NaN if they are too few to reach .05."""
    difference = (one.groupby("subject").mean() - other.groupby("subject").mean()).to_numpy()
    if _least_p(len(difference), tests) > 0.05:
        return np.nan
    if not difference.any():
        return 1.0
    test = permutation_test(
        (difference,),
        lambda values, axis: values.mean(axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=RESAMPLES,
        rng=np.random.default_rng(seed),
    )
    return min(1.0, tests * float(test.pvalue))
