"""Whether probabilities mean what they say: Brier score, expected calibration error, reliability bins."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True)
class ReliabilityBin:
    """Cases of similar probability."""

    probability: float
    """Mean of what was said."""
    frequency: float
    """Share of them in which the event came."""
    share: float
    """Share of all cases; the shares of all bins add up to 1."""


def brier_score(probabilities: ArrayLike, events: ArrayLike, weights: ArrayLike) -> float:
    """Return the mean squared difference of probability and event (Brier 1950); 0 is perfect.

    Args:
        probabilities: (N,) in [0, 1].
        events: (N,) bool.
        weights: (N,) > 0.
    """
    said, came, mass = _checked(probabilities, events, weights)
    return float(np.average((said - came) ** 2, weights=mass))


def reliability_bins(
    probabilities: ArrayLike, events: ArrayLike, weights: ArrayLike, bins: int = 10
) -> tuple[ReliabilityBin, ...]:
    """Cut cases, ordered by probability, into bins of about equal weight.

    Not of equal width: where events are rare nearly all cases would lie in the first one. Cases of equal
    probability stay together, so there may be fewer bins than asked for.

    Args:
        probabilities: (N,) in [0, 1].
        events: (N,) bool.
        weights: (N,) > 0.
        bins: most bins.
    """
    said, came, mass = _checked(probabilities, events, weights)
    _, group = np.unique(said, return_inverse=True)
    mass_of = np.bincount(group, weights=mass)
    # A value belongs where the middle of its weight lies.
    middle = (np.cumsum(mass_of) - mass_of / 2) / mass_of.sum()
    bin_of = np.minimum((middle * bins).astype(int), bins - 1)[group]
    found = []
    for number in np.unique(bin_of):
        mine = bin_of == number
        found.append(
            ReliabilityBin(
                float(np.average(said[mine], weights=mass[mine])),
                float(np.average(came[mine], weights=mass[mine])),
                float(mass[mine].sum() / mass.sum()),
            )
        )
    return tuple(found)


def expected_calibration_error(bins: Sequence[ReliabilityBin]) -> float:
    """Return the mean distance of probability and frequency over the bins, by their weight (Naeini 2015)."""
    return sum(entry.share * abs(entry.probability - entry.frequency) for entry in bins)


def _checked(
    probabilities: ArrayLike, events: ArrayLike, weights: ArrayLike
) -> tuple[NDArray[np.float64], NDArray[np.bool_], NDArray[np.float64]]:
    said, came = np.asarray(probabilities, np.float64), np.asarray(events)
    mass = np.asarray(weights, np.float64)
    if said.ndim != 1 or not len(said) or said.shape != came.shape or said.shape != mass.shape:
        raise ValueError(f"need (N,) of each with N >= 1, got {said.shape}, {came.shape} and {mass.shape}")
    if came.dtype != np.bool_ or not ((said >= 0) & (said <= 1)).all() or not (mass > 0).all():
        raise ValueError("need probabilities in [0, 1], bool events and positive weights")
    return said, came, mass
