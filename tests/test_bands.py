import numpy as np
import pytest

from pscope.experiments.bands import mean_bands, share_bands


def test_where_all_agree_the_interval_is_exact():
    # Of 12 units with 2 observations each: all right, none right, and half of each unit.
    counts = np.full(12, 2)
    sums = np.stack([counts, 0 * counts, counts / 2], axis=1)
    low, high = share_bands(sums, counts, seed=0)
    # 12 of 12 are not improbable (2.5 %) down to a share of p with p to the power of 12 = .025.
    edge = 0.025 ** (1 / 12)
    assert low == pytest.approx([edge, 0, 0.5])
    assert high == pytest.approx([1, 1 - edge, 0.5])
    assert [bound.tolist() for bound in share_bands(sums[:1], counts[:1], seed=0)] == [
        pytest.approx([0.025, 0, np.nan], nan_ok=True),
        pytest.approx([1, 0.975, np.nan], nan_ok=True),
    ]


def test_where_some_differ_they_are_resampled():
    sums, counts = np.array([[1.0], [0], [3], [1]]), np.array([1, 2, 3, 1])
    assert [bound.tolist() for bound in share_bands(sums, counts, 5)] == [
        bound.tolist() for bound in mean_bands(sums, counts, 5)
    ]
    low, high = share_bands(sums, counts, 5)
    units = [[1], [0, 0], [1, 1, 1], [1]]
    random = np.random.default_rng(1)
    means = [np.concatenate([units[i] for i in random.integers(4, size=4)]).mean() for _ in range(5000)]
    assert [low[0], high[0]] == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.03)
