"""Scores of a doubt on planted samples: against counting, against sklearn, and with known winners."""

import numpy as np
import pytest
from scipy.special import expit
from sklearn.metrics import roc_auc_score

from acsr_ray.evaluation.doubt_fit import DoubtError, fit_logistic
from acsr_ray.evaluation.doubt_report import (
    coverage_table,
    doubt_report,
    kind_table,
    reliability_table,
    threshold_table,
)
from acsr_ray.evaluation.doubt_samples import Samples
from acsr_ray.evaluation.doubt_scores import COVERAGES, risk_at, score_doubt, thresholds_of
from acsr_ray.purification.doubt import FEATURES

PREVALENCE = 0.2
IMAGES = 2000


@pytest.fixture(scope="module")
def samples():
    """Three versions of each image; attacked ones are changed more, and change says more than confidence."""
    rng = np.random.default_rng(0)
    kind = np.repeat(np.arange(3), IMAGES)
    features = rng.normal(size=(3 * IMAGES, len(FEATURES)))
    features[:, 0] += kind
    log_odds = 1.5 * features[:, 0] - 0.7 * features[:, FEATURES.index("log_odds")] - 3
    wrong = rng.random(3 * IMAGES) < expit(log_odds)
    return Samples(("clean", "weak", "strong"), np.tile(np.arange(IMAGES), 3), kind, features, wrong, ~wrong)


@pytest.fixture(scope="module")
def halves(samples):
    return samples.halves(0)


@pytest.fixture(scope="module")
def logistic(halves):
    return fit_logistic(halves[0].features, halves[0].wrong, halves[0].weights(PREVALENCE))


@pytest.fixture(scope="module")
def scores(halves, logistic):
    return score_doubt(logistic, *halves, PREVALENCE)


@pytest.fixture(scope="module")
def traffic(halves):
    """Rows of the held-out half repeated as often as they occur: 8 to 1 to 1."""
    held_out = halves[1]
    times = np.where(held_out.attacked, 1, 8)
    return np.repeat(np.arange(len(times)), times)


def test_halves_share_no_image_and_lose_none(samples, halves):
    first, second = (set(half.image.tolist()) for half in halves)
    assert not first & second
    assert first | second == set(range(IMAGES))
    for half in halves:
        assert half.num_images == IMAGES // 2
        for image in list(set(half.image.tolist()))[:20]:
            assert sorted(half.kind[half.image == image].tolist()) == [0, 1, 2]
    other = samples.halves(1)[0]
    assert set(other.image.tolist()) != first


def test_weights_are_the_shares_of_the_traffic(samples):
    weights = samples.weights(PREVALENCE)
    assert weights.sum() == pytest.approx(IMAGES)
    assert weights[samples.attacked].sum() / weights.sum() == pytest.approx(PREVALENCE)
    assert set(np.round(weights[samples.attacked], 12)) == {0.1}


def test_errors_left_are_those_of_counting(halves, logistic, scores, traffic):
    held_out = halves[1]
    doubt, wrong = logistic.probability(held_out.features)[traffic], held_out.wrong[traffic]
    order = np.argsort(doubt, kind="stable")
    for coverage in COVERAGES:
        kept = order[: round(coverage * len(order))]
        found = risk_at(scores.curves["doubt"], coverage, scores.images)
        assert found.value == pytest.approx(wrong[kept].mean(), abs=2e-3)
        assert found.low < found.value < found.high
        assert found.count == round(coverage * scores.images)
        # To chance, which images are kept does not matter.
        assert risk_at(scores.curves["random"], coverage, 9).value == pytest.approx(wrong.mean())


def test_thresholds_are_those_of_counting(halves, logistic, scores, traffic):
    fitted, held_out = halves
    doubt, wrong = logistic.probability(held_out.features)[traffic], held_out.wrong[traffic]
    attacked = held_out.attacked[traffic]
    before = logistic.probability(fitted.features)
    fitted_weights = fitted.weights(PREVALENCE)
    for threshold, coverage in zip(scores.thresholds, COVERAGES, strict=True):
        routed = doubt > threshold.value
        assert threshold.routed.value == pytest.approx(routed.mean())
        assert threshold.routed_clean.value == pytest.approx(routed[~attacked].mean())
        assert threshold.routed_attacked.value == pytest.approx(routed[attacked].mean())
        assert threshold.caught.value == pytest.approx(routed[wrong].mean())
        assert threshold.left.value == pytest.approx(wrong[~routed].mean())
        kept = np.average(before <= threshold.value, weights=fitted_weights)
        assert kept == pytest.approx(coverage, abs=1e-3)
    assert scores.thresholds[0].routed.value == 0


def test_ranking_is_that_of_sklearn_on_the_traffic(halves, logistic, scores, traffic):
    held_out = halves[1]
    doubt = logistic.probability(held_out.features)[traffic]
    assert scores.auroc_wrong["doubt"] == pytest.approx(roc_auc_score(held_out.wrong[traffic], doubt))
    assert scores.auroc_attacked["doubt"] == pytest.approx(roc_auc_score(held_out.attacked[traffic], doubt))
    assert scores.auroc_wrong["random"] == scores.auroc_attacked["random"] == 0.5
    assert scores.auroc_wrong["doubt"] > scores.auroc_wrong["confidence"] + 0.05


def test_doubt_is_calibrated_and_beats_confidence_where_it_knows_more(scores):
    assert scores.calibration_error < 0.03
    assert scores.brier < 0.12
    assert scores.gain.low > 0
    assert scores.gain.low < scores.gain.value < scores.gain.high
    aurc = {name: curve.aurc for name, curve in scores.curves.items()}
    assert scores.gain.value == pytest.approx(aurc["confidence"] - aurc["doubt"])
    assert aurc["doubt"] < aurc["confidence"] < aurc["random"]


def test_doubt_gains_nothing_where_only_confidence_tells():
    rng = np.random.default_rng(1)
    features = rng.normal(size=(2 * 1000, len(FEATURES)))
    wrong = rng.random(2000) < expit(-features[:, FEATURES.index("log_odds")] - 1)
    samples = Samples(
        ("clean", "a"), np.tile(np.arange(1000), 2), np.repeat([0, 1], 1000), features, wrong, wrong
    )
    fitted, held_out = samples.halves(0)
    scores = score_doubt(
        fit_logistic(fitted.features, fitted.wrong, fitted.weights(0.5)), fitted, held_out, 0.5
    )
    assert scores.gain.low < 0 or scores.gain.value < 0.005


def test_kinds_by_themselves(halves, logistic, scores):
    held_out = halves[1]
    doubt = logistic.probability(held_out.features)
    for number, kind in enumerate(scores.kinds):
        mine = held_out.kind == number
        assert kind.name == held_out.kinds[number]
        assert kind.purified.value == pytest.approx(held_out.wrong[mine].mean())
        assert kind.bare.value == pytest.approx(1 - kind.purified.value)
        assert kind.doubt == pytest.approx(doubt[mine].mean())
        assert kind.purified.count == IMAGES // 2


def test_thresholds_keep_at_least_what_is_asked_for():
    doubt, weights = np.array([0.3, 0.1, 0.2, 0.9]), np.array([1.0, 4.0, 4.0, 1.0])
    assert thresholds_of(doubt, weights, (0.4, 0.41, 0.8, 0.9, 1.0)) == [0.1, 0.2, 0.2, 0.3, 1.0]


@pytest.mark.parametrize("outcome", [True, False])
def test_held_out_images_of_one_outcome_are_refused(halves, logistic, outcome):
    fitted, held_out = halves
    one = Samples(
        held_out.kinds,
        held_out.image,
        held_out.kind,
        held_out.features,
        np.full(len(held_out.wrong), outcome),
        held_out.wrong,
    )
    with pytest.raises(DoubtError, match="never or always wrong"):
        score_doubt(logistic, fitted, one, PREVALENCE)


def test_the_page_holds_the_tables_and_works_offline(scores, logistic, monkeypatch):
    from acsr_ray.evaluation import doubt_report as module

    page = doubt_report("Doubt of <b>", "About.", scores, logistic)
    assert "&lt;b&gt;" in page
    assert "http:" not in page
    assert "https:" not in page
    for table in (coverage_table(scores), threshold_table(scores), kind_table(scores)):
        for row in table.rows:
            assert all(cell in page for cell in row)
    assert "20 % is attacked" in page
    assert len(threshold_table(scores).rows) == len(coverage_table(scores).rows) == len(COVERAGES)
    assert f"{100 * scores.calibration_error:.2f} points" in reliability_table(scores).caption

    def missing(*_, **__):
        raise module.MissingExtraError("matplotlib is not installed")

    monkeypatch.setattr(module, "risk_coverage_figure", missing)
    assert "matplotlib is not installed" in doubt_report("x", "y", scores, logistic)
