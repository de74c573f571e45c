"""How many clusters a class has: elbow of the WCSS curve, after a test that it has more than one.

The chord rule never answers 1, so a minimum-gain test comes first: splitting the class must lower the WCSS
clearly more than splitting one Gaussian blob of the same mean, covariance and size would (the idea of the
gap statistic, Tibshirani et al. 2001, with a Gaussian reference).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

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
    """`sklearn` (CPU), `cuml` (GPU), or `auto`: cuml where tasks have a GPU share and it is installed."""
    task_cpus: float = Field(1.0, gt=0)
    """CPUs of one k-means task; there is one per class and k."""
    task_gpus: float = Field(0.0, ge=0)
    """GPU share of one k-means task."""


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


@dataclass(frozen=True)
class Split:
    """One class split into k: the clusters, and what k leaves of the WCSS of Gaussian blobs."""

    fit: KMeansResult
    blob_share: float
    """Lowest WCSS of some blobs at k, as a share of their WCSS at 1."""


def split_class(latents: NDArray[Any], k: int, config: ElbowConfig, seed: int) -> Split:
    """Split one class's latents (N, L) into k clusters, and blobs of its covariance likewise.

    The fewer latents, the more is left to chance, and the more blobs are drawn.

    Raises:
        ValueError: latents that are not finite.
    """
    backend = resolve_backend(config.backend)
    fit = fit_kmeans(_on_device(latents, backend), k, restarts=config.restarts, seed=seed, backend=backend)
    shares = []
    for draw in range(min(BLOBS, max(1, BLOB_LATENTS // len(latents)))):
        blob = _gaussian_blob(latents, seed + draw)
        whole = float(((blob - blob.mean(0)) ** 2).sum())
        split = fit_kmeans(_on_device(blob, backend), k, restarts=config.restarts, seed=seed, backend=backend)
        shares.append(split.wcss / max(whole, np.finfo(np.float64).tiny))
    return Split(fit, min(shares))


def choose_clusters(latents: NDArray[Any], config: ElbowConfig, *splits: Split) -> ClassClusters:
    """Choose the number of clusters of one class from its splits for k = 1, 2, ..., and merge small ones.

    The curve ends where every distinct latent has a cluster of its own.
    """
    nothing = 1e-12 * float(np.square(latents, dtype=np.float64).sum())
    exact = next((k for k, split in enumerate(splits, 1) if split.fit.wcss <= nothing), len(splits))
    splits = splits[:exact]
    wcss = tuple(split.fit.wcss for split in splits)
    blob = tuple(split.blob_share * wcss[0] for split in splits)
    elbow = (
        choose_num_clusters(wcss, blob, config.minimum_gain) if config.one_blob_test else chord_elbow(wcss)
    )
    min_size = config.min_cluster_size
    if min_size is None:
        min_size = min(200, int(np.ceil(0.05 * len(latents))))
    cluster_id = merge_small_clusters(latents, splits[elbow - 1].fit.cluster_id, min_size)
    return ClassClusters(cluster_id, wcss, blob, elbow, int(cluster_id.max()) + 1)


def cluster_class(latents: NDArray[Any], config: ElbowConfig, seed: int) -> ClassClusters:
    """Split one class's latents (N, L) into clusters, k chosen by the elbow rule.

    Raises:
        ValueError: no latents, or latents that are not finite.
    """
    if not len(latents):
        raise ValueError("a class needs at least one latent")
    largest = min(config.k_max, len(latents))
    return choose_clusters(
        latents, config, *(split_class(latents, k, config, seed) for k in range(1, largest + 1))
    )


def _on_device(latents: NDArray[Any], backend: Backend) -> NDArray[Any] | Tensor:
    """Return latents where the backend takes them without another copy: for cuML a tensor on the GPU."""
    return torch.from_numpy(np.asarray(latents, np.float32)).cuda() if backend == "cuml" else latents


def _gaussian_blob(latents: NDArray[Any], seed: int) -> NDArray[np.float64]:
    centred = np.asarray(latents, np.float64) - latents.mean(0)
    variances = np.linalg.eigvalsh(centred.T @ centred / len(centred)).clip(min=0)
    # k-means does not see rotations, so a blob along the axes stands for the one along the eigenvectors.
    return np.random.default_rng(seed).standard_normal(latents.shape) * np.sqrt(variances)
