"""Brier score and calibration error by definition, on probabilities that are right and that are not."""

import numpy as np
import pytest
from sklearn.metrics import brier_score_loss

from acsr_ray.evaluation.reliability import brier_score, expected_calibration_error, reliability_bins


@pytest.fixture
def cases():
    """Probabilities, events that come as often as they say, weights."""
    rng = np.random.default_rng(0)
    said = rng.beta(0.5, 2, 20000)
    return said, rng.random(20000) < said, rng.uniform(0.1, 3, 20000)


def test_brier_is_that_of_sklearn(cases):
    said, came, weights = cases
    assert brier_score(said, came, weights) == pytest.approx(
        brier_score_loss(came, said, sample_weight=weights)
    )


def test_bins_are_of_equal_weight_and_in_order(cases):
    bins = reliability_bins(*cases, bins=10)
    assert [entry.share for entry in bins] == pytest.approx([0.1] * 10, abs=0.002)
    assert sorted(entry.probability for entry in bins) == [entry.probability for entry in bins]


def test_probabilities_that_are_right_have_next_to_no_error(cases):
    said, came, weights = cases
    assert expected_calibration_error(reliability_bins(said, came, weights)) < 0.015
    off = np.minimum(said + 0.2, 1.0)
    assert expected_calibration_error(reliability_bins(off, came, weights)) == pytest.approx(0.19, abs=0.02)


def test_the_error_by_hand():
    said, came = np.array([0.1, 0.1, 0.9, 0.9]), np.array([False, True, True, True])
    bins = reliability_bins(said, came, np.array([1, 1, 1, 3.0]), bins=2)
    assert [(b.probability, b.frequency) for b in bins] == [
        (pytest.approx(0.1), 0.5),
        (pytest.approx(0.9), 1.0),
    ]
    assert expected_calibration_error(bins) == pytest.approx((2 * 0.4 + 4 * 0.1) / 6)


def test_a_weight_of_two_is_two_cases():
    said, came = np.array([0.2, 0.6, 0.7]), np.array([True, False, True])
    twice = (np.repeat(said, [1, 2, 1]), np.repeat(came, [1, 2, 1]), np.ones(4))
    once = (said, came, np.array([1, 2, 1.0]))
    assert brier_score(*once) == pytest.approx(brier_score(*twice))
    assert reliability_bins(*once, bins=2) == reliability_bins(*twice, bins=2)


def test_equal_probabilities_share_a_bin():
    (only,) = reliability_bins(np.full(50, 0.3), np.arange(50) < 20, np.ones(50))
    assert (only.probability, only.frequency, only.share) == (pytest.approx(0.3), pytest.approx(0.4), 1.0)


@pytest.mark.parametrize(
    ("said", "came", "weights"),
    [
        ([0.5], [True, False], [1.0]),
        ([], np.zeros(0, bool), []),
        ([1.5], [True], [1.0]),
        ([np.nan], [True], [1.0]),
        ([0.5], [1], [1.0]),
        ([0.5], [True], [0.0]),
    ],
)
def test_what_is_no_probability_is_refused(said, came, weights):
    with pytest.raises(ValueError, match="need"):
        brier_score(said, came, weights)
