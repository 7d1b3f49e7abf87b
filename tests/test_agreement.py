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
LOW = [0.0, 0.05, 0.1, 0.2, 0.3, 0.4]


def test_correlations_are_those_of_scipy():
    falls = {"a": (RISING, RISING), "b": (RISING, FALLING), "c": (FALLING, FALLING), "d": (LOW, RISING)}
    scores, said = (
        pd.concat([answered(name, each[place], seed=10 * place + ord(name)) for name, each in falls.items()])
        for place in (0, 1)
    )
    table = agreed(scores, said)
    assert table["relation"].tolist() == ["a", "b", "c", "d", ALL]
    assert table["ranked"].tolist() == ["pairs of layers"] * 4 + ["relation"]
    assert table["count"].tolist() == [6, 6, 6, 6, 4]
    each = [spearmanr(shares(scores, name), shares(said, name)).statistic for name in "abcd"]
    means = [[np.mean(shares(table, name)) for name in "abcd"] for table in (scores, said)]
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
    spread = np.std(np.arctanh(rhos))
    low, high = np.tanh(np.arctanh(row.rho) + np.array([-1.96, 1.96]) * spread)
    assert (row.low, row.high) == pytest.approx((low, high), abs=0.1 * (high - low))
    assert low < row.rho < high


def test_only_pairs_that_were_said_and_scored_count():
    scores = answered("a", RISING, seed=1)
    said = answered("a", FALLING, seed=2)
    said = said[~(said["layer"].eq(3) & said["target_layer"].eq(2))]
    (row,) = agreed(scores, said).itertuples()
    pairs = [pair for pair in PAIRS if pair != (3, 2)]
    assert row.count == 5
    assert row.rho == pytest.approx(spearmanr(shares(scores, "a", pairs), shares(said, "a", pairs)).statistic)
    assert agreed(scores, said.assign(target_layer=said["target_layer"] + 7)).empty


def test_only_units_of_both_count():
    scores, said = answered("a", RISING, seed=1), answered("a", RISING, seed=2)
    few = said[said["subject"] != "s3"]
    (row,) = agreed(scores, few).itertuples()
    expected = spearmanr(shares(scores[scores["subject"] != "s3"], "a"), shares(few, "a")).statistic
    assert row.rho == pytest.approx(expected)
    (same,) = agreed(scores[scores["subject"] != "s3"], said).itertuples()
    assert same.rho == pytest.approx(
        spearmanr(shares(scores[scores["subject"] != "s3"], "a"), shares(few, "a")).statistic
    )


def test_few_have_no_rank_and_one_has_no_band():
    scores, said = answered("a", RISING, seed=1), answered("a", RISING, seed=2)
    three = said["layer"].isin([1]) | (said["layer"].eq(3) & said["target_layer"].eq(0))
    (row,) = agreed(scores, said[three]).itertuples()
    assert row.count == 3
    assert np.isnan([row.rho, row.low, row.high]).all()
    alone = [table[table["subject"] == "s0"] for table in (scores, said)]
    (row,) = agreed(*alone).itertuples()
    assert not np.isnan(row.rho)
    assert np.isnan([row.low, row.high]).all()


def test_where_nothing_differs_nothing_is_told():
    table = agreed(answered("a", [1] * 6), answered("a", RISING))
    assert table[["rho", "low", "high"]].isna().all(axis=None)
    shown = agreement_table(table)
    assert list(shown.columns[3].cells) == [""]


def test_relations_are_resampled_alike_only_where_their_subjects_are():
    scores, said = answered("a", RISING), answered("a", RISING, seed=1)
    for renamed, alike in ((lambda name: name, True), (lambda name: name.str.upper(), False)):
        both = [
            pd.concat([table, table.assign(relation="b", subject=renamed(table["subject"]))])
            for table in (scores, said)
        ]
        table = agreed(*both)[["rho", "low", "high"]]
        assert table["rho"][0] == table["rho"][1]
        assert (table["low"][0] == table["low"][1]) == alike
