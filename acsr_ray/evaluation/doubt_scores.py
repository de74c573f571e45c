"""What a fitted doubt is worth, measured on images that it was not fitted on.

All measures are of traffic in which a share of the images is attacked (`Samples.weights`). An image counts
once, as the mean of its versions, so intervals are those of as many trials as there are images. That is wide
enough: a mean over versions varies less than one version drawn at random.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

from acsr_ray.evaluation.doubt_fit import DoubtError
from acsr_ray.evaluation.doubt_samples import Samples
from acsr_ray.evaluation.intervals import Share, score_share
from acsr_ray.evaluation.reliability import (
    ReliabilityBin,
    brier_score,
    expected_calibration_error,
    reliability_bins,
)
from acsr_ray.evaluation.statistics import RiskCoverage, risk_coverage
from acsr_ray.purification.doubt import FEATURES, Logistic

COVERAGES = (1.0, 0.99, 0.95, 0.9, 0.8)
"""Shares of the traffic that are answered; the rest goes to people."""
RESAMPLES = 400


@dataclass(frozen=True)
class Threshold:
    """What it means to send every image of more doubt than this to people."""

    value: float
    routed: Share
    """Of all traffic."""
    routed_clean: Share
    """Of clean images."""
    routed_attacked: Share
    """Of attacked images."""
    caught: Share
    """Of the images on which the classifier is wrong."""
    left: Share | None
    """Error rate among the rest; None where nothing is left."""


@dataclass(frozen=True)
class KindScores:
    """One kind of images by itself: clean, or under one attack."""

    name: str
    bare: Share
    """Error rate without purification."""
    purified: Share
    """Error rate on the purified images."""
    doubt: float
    """Mean doubt; a doubt that is calibrated for this kind too is the error rate."""


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % interval, by resampling images."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class DoubtScores:
    """What doubt is worth on held-out images."""

    images: int
    prevalence: float
    brier: float
    calibration_error: float
    bins: tuple[ReliabilityBin, ...]
    auroc_wrong: dict[str, float]
    """Area under the ROC curve for wrong answers, by score."""
    auroc_attacked: dict[str, float]
    """The same for attacked images."""
    curves: dict[str, RiskCoverage]
    """By score: doubt, the classifier's confidence on the purified image alone, random."""
    gain: Interval
    """AURC of confidence minus that of doubt; above 0 where doubt is better."""
    thresholds: tuple[Threshold, ...]
    kinds: tuple[KindScores, ...]


def score_doubt(logistic: Logistic, fitted: Samples, held_out: Samples, prevalence: float) -> DoubtScores:
    """Measure a doubt on held-out images.

    Args:
        logistic: fitted on `fitted`.
        fitted: where thresholds are set.
        held_out: other images.
        prevalence: share of attacked images in the traffic.

    Raises:
        DoubtError: all answers are right, or all are wrong.
    """
    if held_out.wrong.all() or not held_out.wrong.any():
        raise DoubtError("the classifier is never or always wrong on the held-out images; give more --images")
    weights = held_out.weights(prevalence)
    doubt = logistic.probability(held_out.features).astype(np.float64)
    unsure = -held_out.features[:, FEATURES.index("log_odds")]
    scores = {"doubt": doubt, "confidence": unsure, "random": np.zeros_like(doubt)}
    bins = reliability_bins(doubt, held_out.wrong, weights)
    before = logistic.probability(fitted.features).astype(np.float64)
    return DoubtScores(
        images=held_out.num_images,
        prevalence=prevalence,
        brier=brier_score(doubt, held_out.wrong, weights),
        calibration_error=expected_calibration_error(bins),
        bins=bins,
        auroc_wrong=_auroc(held_out.wrong, scores, weights),
        auroc_attacked=_auroc(held_out.attacked, scores, weights),
        curves={name: risk_coverage(~held_out.wrong, -score, weights) for name, score in scores.items()},
        gain=_gain(held_out, doubt, unsure, weights),
        thresholds=tuple(
            _threshold(value, held_out, doubt, weights)
            for value in thresholds_of(before, fitted.weights(prevalence), COVERAGES)
        ),
        kinds=tuple(_kind(number, held_out, doubt) for number in range(len(held_out.kinds))),
    )


def thresholds_of(
    doubt: NDArray[np.float64], weights: NDArray[np.float64], coverages: Sequence[float]
) -> list[float]:
    """Return for each coverage the smallest doubt that at least this share of the traffic does not exceed."""
    order = np.argsort(doubt)
    reached = np.cumsum(weights[order]) / weights.sum()
    # Rounding may leave the sum of all weights a little below 1.
    return [
        float(doubt[order][min(int(np.searchsorted(reached, share - 1e-12)), len(doubt) - 1)])
        if share < 1
        else 1.0
        for share in coverages
    ]


def risk_at(curve: RiskCoverage, coverage: float, images: int) -> Share:
    """Return the error rate at a coverage, with the interval of so many images times the coverage."""
    position = min(int(np.searchsorted(curve.coverage, coverage - 1e-9)), len(curve.risk) - 1)
    return _share(float(curve.risk[position]), images * coverage)


def _auroc(
    positive: NDArray[np.bool_], scores: dict[str, NDArray[np.float64]], weights: NDArray[np.float64]
) -> dict[str, float]:
    return {
        name: float(roc_auc_score(positive, score, sample_weight=weights)) for name, score in scores.items()
    }


def _gain(
    samples: Samples,
    doubt: NDArray[np.float64],
    unsure: NDArray[np.float64],
    weights: NDArray[np.float64],
) -> Interval:
    """Return by how much confidence's AURC exceeds doubt's, with the bootstrap interval over images."""

    def difference(mass: NDArray[np.float64]) -> float:
        there = mass > 0
        correct = ~samples.wrong[there]
        by_unsure, by_doubt = (
            risk_coverage(correct, -score[there], mass[there]).aurc for score in (unsure, doubt)
        )
        return by_unsure - by_doubt

    generator = np.random.default_rng(0)
    images, index = np.unique(samples.image, return_inverse=True)
    drawn = [
        difference(weights * generator.multinomial(len(images), np.full(len(images), 1 / len(images)))[index])
        for _ in range(RESAMPLES)
    ]
    low, high = np.quantile(drawn, (0.025, 0.975))
    return Interval(difference(weights), float(low), float(high))


def _threshold(
    value: float, samples: Samples, doubt: NDArray[np.float64], weights: NDArray[np.float64]
) -> Threshold:
    count = samples.num_images

    def share_of(what: NDArray[np.bool_], among: NDArray[np.bool_], trials: float) -> Share:
        return _share(float(np.average(what[among], weights=weights[among])), trials)

    routed = doubt > value
    everything = np.ones_like(routed)
    rate = float(np.average(samples.wrong, weights=weights))
    rest = float(np.average(~routed, weights=weights))
    return Threshold(
        value=value,
        routed=share_of(routed, everything, count),
        routed_clean=share_of(routed, ~samples.attacked, count),
        routed_attacked=share_of(routed, samples.attacked, count),
        caught=share_of(routed, samples.wrong, count * rate),
        left=share_of(samples.wrong, ~routed, count * rest) if rest > 0 else None,
    )


def _kind(number: int, samples: Samples, doubt: NDArray[np.float64]) -> KindScores:
    mine = samples.kind == number
    bare, purified = (
        _share(float(wrong[mine].mean()), int(mine.sum())) for wrong in (samples.wrong_bare, samples.wrong)
    )
    return KindScores(samples.kinds[number], bare, purified, float(doubt[mine].mean()))


def _share(value: float, trials: float) -> Share:
    # Weighted means may leave [0, 1] by rounding.
    return score_share(min(1.0, max(0.0, value)), max(1, round(trials)))
