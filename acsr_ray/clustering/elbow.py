"""How many clusters a class has: elbow of the WCSS curve, after a test that it has more than one.

The chord rule never answers 1, so a minimum-gain test comes first: splitting the class must lower the WCSS
clearly more than splitting one Gaussian blob of the same mean, covariance and size would (the idea of the
gap statistic, Tibshirani et al. 2001, with a Gaussian reference).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from acsr_ray.clustering.kmeans import (
    Backend,
    KMeansResult,
    fit_kmeans,
    merge_small_clusters,
    resolve_backend,
)
from acsr_ray.config import Described

BLOBS, BLOB_LATENTS = 8, 2000
"""Most reference blobs, and latents in all of them together; one blob of a small class is left to chance."""


class ElbowConfig(Described):
    """How a class's latents are split into clusters."""

    k_max: int = Field(10, ge=1)
    """Largest number of clusters tried."""
    restarts: int = Field(10, ge=1)
    """k-means++ starts per k."""
    minimum_gain: float = Field(0.05, ge=0, lt=1)
    """Share of the WCSS left by a Gaussian blob that the chosen split must save on top; else k = 1."""
    one_blob_test: bool = True
    """Keep k = 1 unless the gain is there; False is the paper's plain elbow, which never answers 1."""
    min_cluster_size: int | None = None
    """Smaller clusters merge into their neighbour; None: the smaller of 200 and 5 % of the class."""
    backend: Backend = "auto"
    """`sklearn` (CPU), `cuml` (GPU), or `auto`."""


@dataclass(frozen=True)
class ClassClusters:
    """One class's clusters: id per latent (N,), WCSS for k = 1.. and what the elbow rule saw."""

    cluster_id: NDArray[np.int32]
    wcss: tuple[float, ...]
    blob_wcss: tuple[float, ...]
    elbow: int
    num_clusters: int


def chord_elbow(wcss: Sequence[float]) -> int:
    """Return the k whose point on the WCSS curve is farthest from the chord between its ends.

    Args:
        wcss: WCSS for k = 1, 2, ...; both axes are scaled to [0, 1] first.
    """
    if len(wcss) < 3 or wcss[0] <= wcss[-1]:
        return 1 if len(wcss) < 2 or wcss[0] <= wcss[-1] else 2
    x = np.linspace(0, 1, len(wcss))
    y = (np.asarray(wcss) - wcss[-1]) / (wcss[0] - wcss[-1])
    # The chord runs from (0, 1) to (1, 0); the distance to it is (1 - x - y) / sqrt(2).
    return int((1 - x - y).argmax()) + 1


def choose_num_clusters(wcss: Sequence[float], blob_wcss: Sequence[float], minimum_gain: float) -> int:
    """Return the elbow of `wcss`, or 1 when no split beats a Gaussian blob's by `minimum_gain`.

    Args:
        wcss: WCSS of the class for k = 1, 2, ...
        blob_wcss: the same for Gaussian blobs of the class's covariance.
        minimum_gain: share of the blob's remaining WCSS that the split must save on top.
    """
    elbow = chord_elbow(wcss)
    if elbow == 1 or wcss[0] <= 0:
        return 1
    left, blob_left = wcss[elbow - 1] / wcss[0], blob_wcss[elbow - 1] / blob_wcss[0]
    return elbow if left <= (1 - minimum_gain) * blob_left else 1


def cluster_class(latents: NDArray[Any], config: ElbowConfig, seed: int) -> ClassClusters:
    """Split one class's latents (N, L) into clusters, k chosen by the elbow rule.

    Raises:
        ValueError: no latents, or latents that are not finite.
    """
    if not len(latents):
        raise ValueError("a class needs at least one latent")
    k_max = min(config.k_max, len(np.unique(latents, axis=0)))
    fits = _fit_curve(latents, k_max, config, seed)
    wcss = tuple(fit.wcss for fit in fits)
    blob = tuple(share * wcss[0] for share in _blob_curve(latents, k_max, config, seed))
    elbow = (
        choose_num_clusters(wcss, blob, config.minimum_gain) if config.one_blob_test else chord_elbow(wcss)
    )
    min_size = config.min_cluster_size
    if min_size is None:
        min_size = min(200, int(np.ceil(0.05 * len(latents))))
    cluster_id = merge_small_clusters(latents, fits[elbow - 1].cluster_id, min_size)
    return ClassClusters(cluster_id, wcss, blob, elbow, int(cluster_id.max()) + 1)


def _fit_curve(latents: NDArray[Any], k_max: int, config: ElbowConfig, seed: int) -> list[KMeansResult]:
    backend = resolve_backend(config.backend)
    return [
        fit_kmeans(latents, k, restarts=config.restarts, seed=seed, backend=backend)
        for k in range(1, k_max + 1)
    ]


def _blob_curve(latents: NDArray[Any], k_max: int, config: ElbowConfig, seed: int) -> tuple[float, ...]:
    """Return the lowest WCSS curve of some blobs, as shares of its first value.

    The fewer latents, the more is left to chance, and the more blobs are drawn.
    """
    count = min(BLOBS, max(1, BLOB_LATENTS // len(latents)))
    curves = []
    for draw in range(count):
        blob = _gaussian_blob(latents, seed + draw)
        wcss = np.array([fit.wcss for fit in _fit_curve(blob, k_max, config, seed)])
        curves.append(wcss / max(wcss[0], np.finfo(np.float64).tiny))
    return tuple(np.min(curves, axis=0).tolist())


def _gaussian_blob(latents: NDArray[Any], seed: int) -> NDArray[np.float64]:
    centred = np.asarray(latents, np.float64) - latents.mean(0)
    variances = np.linalg.eigvalsh(centred.T @ centred / len(centred)).clip(min=0)
    # k-means does not see rotations, so a blob along the axes stands for the one along the eigenvectors.
    return np.random.default_rng(seed).standard_normal(latents.shape) * np.sqrt(variances)
