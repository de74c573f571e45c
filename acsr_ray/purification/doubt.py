"""How likely a classifier is wrong on a purified image: a calibrated score that routes images to people.

Doubt is a logistic function of six numbers of an image: how much purification changed it, how far its latent
is from the chosen cluster, how noisy it was, whether the classifier's label changed, how sure the classifier
is of the purified image, and how far apart its two predictions are. It is fitted on images with labels, clean
and attacked (`acsr_ray.evaluation.doubt_fit`), and holds for the bundle, the classifier and the kind of
traffic that it was fitted for.
"""

from pathlib import Path
from typing import Annotated, Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import Field, ValidationError, model_validator
from scipy.special import expit

from acsr_ray.artifacts import ArtifactError, begin_artifact, finish_artifact, json_digest, load_artifact
from acsr_ray.config import Described
from acsr_ray.purification.judge import OWN_CLASSES, Opinion
from acsr_ray.purification.options import PurifyOptions

KIND = "doubt"
FEATURES = ("log_residual", "distance", "log_noise", "label_changed", "log_odds", "divergence")
"""Columns of the features, in order."""
RESIDUALS = (1e-4, 1.0)
"""Range of the relative l2 change: from less than rounding to 8 bits, to what only black images exceed."""
NOISE_FLOOR = 0.25 / 255
"""Noise level on the [0, 1] pixel scale below which an image counts as free of noise."""

Finite = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Logistic(Described):
    """Probability as a logistic function of standardised features."""

    features: tuple[str, ...]
    """Names of the columns."""
    mean: tuple[Finite, ...]
    """Subtracted from each column."""
    scale: tuple[Positive, ...]
    """Divides it then."""
    coefficients: tuple[Finite, ...]
    """Of the standardised columns."""
    intercept: Finite
    """Log odds where every column is at its mean."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.features != FEATURES:
            raise ValueError(f"features must be {', '.join(FEATURES)}, got {', '.join(self.features)}")
        for name in ("mean", "scale", "coefficients"):
            if len(getattr(self, name)) != len(FEATURES):
                raise ValueError(f"{name} must have {len(FEATURES)} values, got {len(getattr(self, name))}")
        return self

    def probability(self, features: NDArray[np.float64]) -> NDArray[np.float32]:
        """Return the probability (N,) float32 in [0, 1] of rows (N, F) of features.

        1 where a feature is not finite: what cannot be judged is for people.

        Raises:
            ValueError: not one column per feature.
        """
        if features.ndim != 2 or features.shape[1] != len(self.features):
            raise ValueError(f"features must be (N, {len(self.features)}), got {features.shape}")
        judged = np.isfinite(features).all(1)
        log_odds = np.full(len(features), self.intercept)
        # One column after the other: a matrix product may round a row differently among other rows.
        for column, mean, scale, coefficient in zip(
            np.where(judged, features.T, 0.0), self.mean, self.scale, self.coefficients, strict=True
        ):
            log_odds += coefficient * ((column - mean) / scale)
        probability: NDArray[np.float32] = np.where(judged, expit(log_odds), 1.0).astype(np.float32)
        return probability


class DoubtModel(Described):
    """A calibrated doubt and what it was calibrated for."""

    bundle: str
    """Digest of the bundle whose purified images are judged."""
    options: PurifyOptions
    """How it purified them; the reconstruction is named also where it is the bundle's default."""
    classifier: str
    """Digest of the target whose mistakes doubt is about, or `bundle` for the encoder's own classes."""
    image_size: int = Field(ge=1)
    """Side in pixels of what the classifier sees."""
    logistic: Logistic
    """Features to probability."""

    def check(self, *, bundle: str, options: PurifyOptions, classifier: str) -> None:
        """Raise `ArtifactError` unless doubt was calibrated for these; digests, see the fields."""
        if bundle != self.bundle:
            raise ArtifactError(
                f"doubt was calibrated for bundle {self.bundle[:12]}, not {bundle[:12]}; "
                "calibrate_doubt makes one for yours"
            )
        changed = [name for name, value in self.options if getattr(options, name) != value]
        if changed:
            raise ArtifactError(
                "doubt was calibrated for another purifier: "
                + ", ".join(f"{n} {getattr(self.options, n)}, not {getattr(options, n)}" for n in changed)
            )
        if classifier == self.classifier:
            return
        if self.classifier == OWN_CLASSES:
            raise ArtifactError("doubt was calibrated for the bundle's own classes; leave --target away")
        if classifier == OWN_CLASSES:
            raise ArtifactError(f"doubt was calibrated for target {self.classifier[:12]}; give --target")
        raise ArtifactError(f"doubt was calibrated for target {self.classifier[:12]}, not {classifier[:12]}")

    def doubt(self, features: NDArray[np.float64]) -> NDArray[np.float32]:
        """Return the probability (N,) float32 in [0, 1] that the classifier is wrong on the purified images.

        Args:
            features: (N, F) of `image_features`.
        """
        return self.logistic.probability(features)


def image_features(
    opinion: Opinion, noise: ArrayLike, distance: ArrayLike, residual: ArrayLike, latent_length: int
) -> NDArray[np.float64]:
    """Return the features (N, F) float64 of purified images, columns as in `FEATURES`.

    Args:
        opinion: of the classifier, on N images.
        noise: (N,) noise level of the images before purification, `acsr_ray.sparse.noise`.
        distance: (N,) Mahalanobis distance of the chosen cluster; near sqrt(latent_length) for its own.
        residual: (N,) relative l2 change by purification.
        latent_length: L.
    """
    columns = (
        np.log(np.clip(np.asarray(residual, np.float64), *RESIDUALS)),
        np.asarray(distance, np.float64) / np.sqrt(latent_length),
        np.log(np.maximum(np.asarray(noise, np.float64), NOISE_FLOOR)),
        (opinion.label_before != opinion.label_after).double().cpu().numpy(),
        opinion.log_odds.cpu().numpy(),
        # Its tail is long: classifiers that are too sure are far apart whenever they differ.
        np.log1p(opinion.divergence.cpu().numpy()),
    )
    return np.stack(columns, 1)


def save_doubt(directory: Path, model: DoubtModel, content: dict[str, Any]) -> None:
    """Write a doubt model as artifact `doubt`, all of it in the manifest.

    Args:
        directory: where; an older one there is withdrawn first.
        model: what to write.
        content: provenance and measurements.
    """
    begin_artifact(directory)
    described = model.describe()
    finish_artifact(directory, KIND, [], {KIND: described, "model_digest": json_digest(described), **content})


def load_doubt(directory: Path) -> DoubtModel:
    """Load a doubt model.

    Raises:
        ArtifactError: none there, or it was changed.
    """
    manifest = load_artifact(directory, KIND)
    described = manifest.get(KIND)
    if json_digest(described) != manifest.get("model_digest"):
        raise ArtifactError(f"{directory} was changed: its model has another digest than its manifest says")
    try:
        return DoubtModel.from_description(described or {})
    except ValidationError as error:
        raise ArtifactError(f"{directory} has no usable doubt model: {error}") from error
