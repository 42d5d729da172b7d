"What chapter 7 leaves to be tested: edge cases, and what is refused."

import numpy as np
import pytest
from scipy.stats import norm

from qr_rlhf.uncertainty import (
    against_truth,
    conformal_verdicts,
    explained,
    partial_correlation,
    risk_coverage,
)


def test_explained_and_partial_correlation():
    rng = np.random.default_rng(0)
    mean, own, noise = rng.normal(size=(3, 5000))
    assert explained(2 - mean**2 / 4, mean) > 0.99
    assert abs(explained(mean + noise, mean) - 0.5) < 0.05
    assert explained(noise, mean) < 0.05
    assert explained(np.ones(9), mean[:9]) == 0
    assert abs(partial_correlation(mean + own, mean + noise, mean)) < 0.05
    assert partial_correlation(mean + own, own - mean, mean) > 0.9
    assert partial_correlation(np.ones(9), own[:9], mean[:9]) == 0


def test_against_truth_counts_crossings_before_it_sorts():
    true = np.sort(np.random.default_rng(0).normal(size=(30, 60)))
    row = against_truth(np.tile([0.0, 2.0, 1.0], (30, 1)), true)
    assert row["crossing"] == 0.5 and row["spread_correlation"] == 0


def test_coverage_stands_beside_what_ten_levels_can_reach():
    levels = (np.arange(500) + 0.5) / 500
    uniform = np.tile(levels, (20, 1))  # straight between ten levels, so that nothing is lost
    normal = np.tile(norm.ppf(levels), (20, 1))
    for true, reached in ((uniform, 0.8), (normal, 0.82)):
        ten = np.quantile(true[0], (np.arange(10) + 0.5) / 10)
        row = against_truth(np.tile(ten, (20, 1)), true)
        assert abs(row["coverage_perfect"] - reached) < 0.005
        assert abs(row["coverage"] - row["coverage_perfect"]) < 0.005
        narrow = against_truth(np.tile(ten / 2, (20, 1)), true)
        assert narrow["coverage"] < 0.6
        assert narrow["coverage_perfect"] == row["coverage_perfect"]


def test_risk_coverage_keeps_at_least_one_pair():
    kept = risk_coverage([0.1, 0.9, 0.5], [0, 1, 0.5], [0.01, 0.7, 1.0])
    assert kept.to_dict() == {0.01: 1.0, 0.7: 0.75, 1.0: 0.5}


def test_a_promise_that_the_pairs_cannot_support_is_refused():
    for alpha in (0.1, 1.0):
        with pytest.raises(ValueError, match="can't be promised from 3 pairs"):
            conformal_verdicts([0.5, 0.6, 0.7], [0.5], alpha)
