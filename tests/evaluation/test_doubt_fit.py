"""The fit recovers the probabilities that made the data, and says when it cannot."""

import numpy as np
import pytest
from scipy.special import expit

from acsr_ray.evaluation.doubt_fit import DoubtError, fit_logistic
from acsr_ray.purification.doubt import FEATURES

COUNT = len(FEATURES)
TRUE = np.array([0.8, -0.5, 0.0, 1.2, -1.5, 0.3])


@pytest.fixture(scope="module")
def planted():
    """Features of many scales, and outcomes drawn with known probabilities."""
    rng = np.random.default_rng(0)
    features = rng.normal(size=(20000, COUNT)) * [1, 3, 0.1, 1, 10, 2] + [0, 5, -3, 0, 2, 1]
    standard = (features - features.mean(0)) / features.std(0)
    probability = expit(standard @ TRUE - 1.5)
    return features, rng.random(20000) < probability, probability


def test_planted_probabilities_are_recovered(planted):
    features, wrong, probability = planted
    found = fit_logistic(features, wrong, np.ones(len(wrong)))
    np.testing.assert_allclose(found.coefficients, TRUE, atol=0.08)
    assert np.abs(found.probability(features) - probability).mean() < 0.01
    assert np.abs(found.probability(features) - probability).max() < 0.06


def test_a_weight_is_a_number_of_cases(planted):
    features, wrong, _ = planted
    features, wrong = features[:500], wrong[:500]
    times = np.random.default_rng(1).integers(1, 4, 500)
    weighted = fit_logistic(features, wrong, times.astype(float))
    repeated = fit_logistic(features.repeat(times, 0), wrong.repeat(times), np.ones(times.sum()))
    np.testing.assert_allclose(weighted.coefficients, repeated.coefficients, atol=1e-4)
    np.testing.assert_allclose(weighted.mean, repeated.mean)
    np.testing.assert_allclose(weighted.scale, repeated.scale)


def test_weights_move_the_probabilities_to_the_traffic_they_describe():
    """Half of the rows are wrong, but they are a tenth of the traffic."""
    rng = np.random.default_rng(2)
    features = rng.normal(size=(4000, COUNT))
    wrong = np.arange(4000) % 2 == 0
    found = fit_logistic(features, wrong, np.where(wrong, 0.1, 0.9))
    assert found.probability(features).mean() == pytest.approx(0.1, abs=0.01)


def test_a_feature_that_never_changes_does_no_harm(planted):
    features, wrong, _ = planted
    flat = features[:2000].copy()
    flat[:, 3] = 1.0
    found = fit_logistic(flat, wrong[:2000], np.ones(2000))
    assert found.coefficients[3] == pytest.approx(0, abs=1e-6)
    assert np.isfinite(found.probability(flat)).all()


@pytest.mark.parametrize(("wrong", "word"), [(False, "right"), (True, "wrong")])
def test_one_outcome_is_not_enough(wrong, word):
    with pytest.raises(DoubtError, match=f"{word} on every image"):
        fit_logistic(np.zeros((4, COUNT)), np.full(4, wrong), np.ones(4))


def test_answers_that_are_not_finite_are_said():
    features = np.zeros((4, COUNT))
    features[2, 1] = np.nan
    with pytest.raises(DoubtError, match="not finite"):
        fit_logistic(features, np.array([True, False, True, False]), np.ones(4))
