"""Comparisons of defences on the same images, and scores of a classifier's confidences.

Outcomes are arrays over the images of one split: `correct` is (N,) bool, `labels` (N,) int.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import binomtest
from sklearn.metrics import f1_score, roc_auc_score

from acsr_ray.evaluation.intervals import wilson_share


@dataclass(frozen=True)
class McNemar:
    """Images by which of two defences got them right, and the exact test that both are equally good."""

    both: int
    only_first: int
    only_second: int
    neither: int
    p_value: float
    """Two-sided; 1 when the defences differ on no image."""


@dataclass(frozen=True)
class PairedDifference:
    """Accuracy of the first minus accuracy of the second, with its 95 % interval."""

    value: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        """Return it in percentage points, such as `+4.2 [+1.0, +7.3]`."""
        return f"{100 * self.value:+.1f} [{100 * self.low:+.1f}, {100 * self.high:+.1f}]"


@dataclass(frozen=True)
class RiskCoverage:
    """Error rate among the most confident images, by how many of them are answered."""

    coverage: NDArray[np.float64]
    """(N,) rising to 1: 1/N, 2/N, ..., 1 where all images weigh the same."""
    risk: NDArray[np.float64]
    """(N,) share of wrong ones among that share of images; the last is the error rate."""
    aurc: float
    """Mean risk over all coverages; smaller is better, 0 when every answer is right."""


@dataclass(frozen=True)
class MacroScores:
    """Scores averaged over the classes that the labels have."""

    auc: float | None
    """One class against the rest, in [0, 1]; None when the labels have one class only."""
    f1: float
    """In [0, 1]."""
    absent: tuple[int, ...]
    """Classes without an image, which neither mean contains; a table must say so."""


def mcnemar(first: ArrayLike, second: ArrayLike) -> McNemar:
    """Test whether two defences are equally accurate on the same images.

    The exact test on discordant images: under equality each is won by either with probability 1/2.
    Source: McNemar 1947.

    Args:
        first: (N,) bool, correct under the first defence.
        second: the same images under the second.
    """
    table = _paired_table(first, second)
    discordant = table[1] + table[2]
    p_value = float(binomtest(table[1], discordant).pvalue) if discordant else 1.0
    return McNemar(*table, p_value)


def paired_difference(first: ArrayLike, second: ArrayLike) -> PairedDifference:
    """Return the difference of two accuracies on the same images, with a 95 % interval.

    Newcombe's hybrid score interval: the Wilson intervals of both accuracies, combined with the correlation
    phi of the outcomes, which is corrected for continuity. It keeps its coverage near 0 and 1, where the
    normal approximation fails. Source: Newcombe 1998, "Improved confidence intervals for the difference
    between binomial proportions based on paired data", method 10.
    """
    both, only_first, only_second, neither = _paired_table(first, second)
    count = both + only_first + only_second + neither
    one, two = wilson_share(both + only_first, count), wilson_share(both + only_second, count)
    margins = (both + only_first) * (only_second + neither) * (both + only_second) * (only_first + neither)
    association = float(both * neither - only_first * only_second)
    if association > 0:
        association = max(0.0, association - count / 2)
    phi = association / np.sqrt(margins) if margins else 0.0

    def combined(a: float, b: float) -> float:
        return float(np.sqrt(max(0.0, a * a - 2 * phi * a * b + b * b)))

    value = one.value - two.value
    low = value - combined(one.value - one.low, two.high - two.value)
    high = value + combined(one.high - one.value, two.value - two.low)
    return PairedDifference(value, max(-1.0, low), min(1.0, high), count)


def risk_coverage(
    correct: ArrayLike, confidence: ArrayLike, weights: ArrayLike | None = None
) -> RiskCoverage:
    """Order images by confidence and return the error rate of every leading share.

    Images of equal confidence share their mean error, as if in random order, so the curve does not depend on
    the order of the rows. Source: Geifman and El-Yaniv 2017; AURC as in Geifman et al. 2019.

    Args:
        correct: (N,) bool.
        confidence: (N,) finite; only its order counts.
        weights: (N,) > 0, how often each image occurs; all the same when omitted.
    """
    hits, scores = _outcomes(correct), np.asarray(confidence, np.float64)
    if scores.shape != hits.shape or not np.isfinite(scores).all():
        raise ValueError(f"need {len(hits)} finite confidences, got shape {scores.shape}")
    mass = np.ones(len(hits)) if weights is None else np.asarray(weights, np.float64)
    if mass.shape != hits.shape or not (np.isfinite(mass) & (mass > 0)).all():
        raise ValueError(f"need {len(hits)} positive weights, got shape {mass.shape}")
    _, group = np.unique(-scores, return_inverse=True)
    errors_of = np.bincount(group, weights=mass * ~hits) / np.bincount(group, weights=mass)
    order = np.argsort(group, kind="stable")
    shares = mass[order]
    answered = np.cumsum(shares)
    risk = np.cumsum(errors_of[group[order]] * shares) / answered
    return RiskCoverage(answered / answered[-1], risk, float(np.average(risk, weights=shares)))


def macro_scores(labels: ArrayLike, scores: ArrayLike) -> MacroScores:
    """Return macro-averaged one-vs-rest AUC and F1 of the largest score.

    Classes without an image have no AUC and no recall: they are left out of both means and listed. An image
    that is taken for such a class still counts against its own class.

    Args:
        labels: (N,) in 0..J-1.
        scores: (N, J), larger is likelier; logits or probabilities.
    """
    truth, table = np.asarray(labels), np.asarray(scores, np.float64)
    if table.ndim != 2 or truth.shape != table.shape[:1] or not len(truth):
        raise ValueError(f"need labels (N,) and scores (N, J), got {truth.shape} and {table.shape}")
    if not np.isfinite(table).all():
        raise ValueError("scores must be finite")
    if truth.min() < 0 or truth.max() >= table.shape[1]:
        raise ValueError(f"labels must be in 0..{table.shape[1] - 1}, got {truth.min()}..{truth.max()}")
    present = np.unique(truth)
    absent = tuple(int(label) for label in np.setdiff1d(np.arange(table.shape[1]), present))
    f1 = f1_score(truth, table.argmax(1), labels=present, average="macro", zero_division=0)
    auc = None
    if len(present) > 1:
        auc = float(np.mean([roc_auc_score(truth == label, table[:, label]) for label in present]))
    return MacroScores(auc, float(f1), absent)


def _outcomes(correct: ArrayLike) -> NDArray[np.bool_]:
    values = np.asarray(correct)
    if values.ndim != 1 or not len(values) or values.dtype != np.bool_:
        raise ValueError(f"outcomes must be (N,) bool with N >= 1, got {values.dtype} {values.shape}")
    return values


def _paired_table(first: ArrayLike, second: ArrayLike) -> tuple[int, int, int, int]:
    """Return the images both, only the first, only the second and neither got right."""
    a, b = _outcomes(first), _outcomes(second)
    if a.shape != b.shape:
        raise ValueError(f"need outcomes of the same images, got {len(a)} and {len(b)}")
    return int((a & b).sum()), int((a & ~b).sum()), int((~a & b).sum()), int((~a & ~b).sum())
