"""Fit the probability that a classifier is wrong, by logistic regression on labelled images."""

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression

from acsr_ray.config import AcsrError
from acsr_ray.purification.doubt import FEATURES, Logistic

MOST_ITERATIONS = 1000


class DoubtError(AcsrError, ValueError):
    """Images on which no doubt can be fitted or measured."""


def fit_logistic(
    features: NDArray[np.float64], wrong: NDArray[np.bool_], weights: NDArray[np.float64]
) -> Logistic:
    """Fit the probability of being wrong by weighted logistic regression with a slight l2 penalty.

    Args:
        features: (V, F) finite.
        wrong: (V,).
        weights: (V,) > 0; their sum is how many independent images the penalty is weighed against.

    Raises:
        DoubtError: all right, all wrong, or features that are not finite.
    """
    if not np.isfinite(features).all():
        raise DoubtError("the classifier gives answers that are not finite; doubt cannot be fitted on them")
    if wrong.all() or not wrong.any():
        outcome = "wrong" if wrong.all() else "right"
        raise DoubtError(f"the classifier is {outcome} on every image; doubt cannot be fitted on them")
    mean = np.average(features, axis=0, weights=weights)
    scale = np.sqrt(np.average((features - mean) ** 2, axis=0, weights=weights))
    scale = np.where(scale > 1e-9, scale, 1.0)
    model = LogisticRegression(max_iter=MOST_ITERATIONS)
    model.fit((features - mean) / scale, wrong, sample_weight=weights)
    return Logistic(
        features=FEATURES,
        mean=tuple(mean.tolist()),
        scale=tuple(scale.tolist()),
        coefficients=tuple(model.coef_[0].tolist()),
        intercept=float(model.intercept_[0]),
    )
