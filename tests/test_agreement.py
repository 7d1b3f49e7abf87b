"""How alike scores and words rank, against scipy and a plain bootstrap."""

import numpy as np
import pandas as pd
import pytest
from scipy.stats import spearmanr

from pscope.experiments.agreement import ALL, rank_agreement
from pscope.experiments.sweep import PATCHED, RANDOM
from pscope.show.agreement import agreement_table

PAIRS = [(layer, target) for layer in (1, 3, 5) for target in (0, 2)]


def answered(relation, shares, subjects=8, seed=0, **more):
    """Two contexts of each subject at every pair, answered in about such shares."""
    random = np.random.default_rng(seed)
    return pd.DataFrame(
        [
            {"relation": relation, "subject": f"s{subject}", "context": context, "condition": condition}
            | {"layer": layer, "target_layer": target, "found": bool(random.random() < share)}
            for subject in range(subjects)
            for context in range(2)
            for condition in (PATCHED, RANDOM)
            for (layer, target), share in zip(PAIRS, shares, strict=True)
        ]
    )


def agreed(scores, said):
    return rank_agreement(scores, said, "relation", ["subject", "context"], "subject")


def shares(table, relation, pairs=PAIRS):
    own = table[(table["relation"] == relation) & (table["condition"] == PATCHED)]
    return [own[(own["layer"] == layer) & (own["target_layer"] == target)]["found"].mean() for layer, target in pairs]


RISING, FALLING = [0.1, 0.2, 0.4, 0.5, 0.7, 0.9], [0.9, 0.7, 0.5, 0.4, 0.2, 0.1]


def test_correlations_are_those_of_scipy():
    scores = pd.concat([answered("a", RISING, seed=1), answered("b", RISING, seed=2), answered("c", FALLING, seed=3)])
    said = pd.concat([answered("a", RISING, seed=4), answered("b", FALLING, seed=5), answered("c", FALLING, seed=6)])
    table = agreed(scores, said)
    assert table["relation"].tolist() == ["a", "b", "c", ALL]
    assert table["ranked"].tolist() == ["pairs of layers"] * 3 + ["relation"]
    assert table["count"].tolist() == [6, 6, 6, 3]
    each = [spearmanr(shares(scores, name), shares(said, name)).statistic for name in "abc"]
    means = [[np.mean(shares(table, name)) for name in "abc"] for table in (scores, said)]
    assert table["rho"].tolist() == pytest.approx([*each, spearmanr(*means).statistic])
    assert (table["low"] <= table["rho"]).all()
    assert (table["rho"] <= table["high"]).all()
    assert table["rho"][0] > 0.5
    assert table["rho"][1] < -0.5


def test_bands_against_a_plain_bootstrap_of_subjects():
    scores, said = answered("a", RISING, seed=1), answered("a", RISING, seed=4)
    (row,) = agreed(scores, said).itertuples()
    random = np.random.default_rng(9)
    cells = [
        table[table["condition"] == PATCHED].pivot_table(
            index="subject", columns=["layer", "target_layer"], values="found", aggfunc="mean"
        )
        for table in (scores, said)
    ]
    drawn = [random.integers(8, size=8) for _ in range(2000)]
    rhos = [spearmanr(*(each.to_numpy()[picked].mean(axis=0) for each in cells)).statistic for picked in drawn]
    low, high = np.quantile(rhos, [0.025, 0.975])
    assert (row.low, row.high) == pytest.approx((low, high), abs=0.1 * (high - low))


def test_only_pairs_that_were_said_and_scored_count():
    scores = answered("a", RISING, seed=1)
    said = answered("a", FALLING, seed=2)
    said = said[said["target_layer"] == 0]
    (row,) = agreed(scores, said).itertuples()
    pairs = [pair for pair in PAIRS if pair[1] == 0]
    assert row.count == 3
    assert row.rho == pytest.approx(spearmanr(shares(scores, "a", pairs), shares(said, "a", pairs)).statistic)
    assert agreed(scores, said.assign(target_layer=7)).empty


def test_where_nothing_differs_nothing_is_told():
    table = agreed(answered("a", [1] * 6), answered("a", RISING))
    assert table[["rho", "low", "high"]].isna().all(axis=None)
    shown = agreement_table(table)
    assert list(shown.columns[3].cells) == [""]
