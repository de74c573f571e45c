"""K-means of one class's latents (Eq. 4): k-means++ with restarts, scikit-learn or cuML behind one function.

Shapes: N latents of length L, K clusters. WCSS is the sum of squared distances to the own centroid (the
paper's Eq. 4 drops the square; its text says WCSS).
"""

import importlib.util
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.cluster import KMeans
from torch import Tensor

Backend = Literal["auto", "sklearn", "cuml"]


@dataclass(frozen=True)
class KMeansResult:
    """Centroids (K, L) float32, cluster of each latent (N,) int32, and the WCSS."""

    centroids: NDArray[np.float32]
    cluster_id: NDArray[np.int32]
    wcss: float


def fit_kmeans(
    latents: NDArray[Any] | Tensor,
    num_clusters: int,
    *,
    restarts: int = 10,
    seed: int = 0,
    backend: Backend = "auto",
    start: NDArray[Any] | None = None,
) -> KMeansResult:
    """Cluster latents.

    Args:
        latents: (N, L) finite floats; cuML shares a tensor on its GPU without a copy.
        num_clusters: K, at most N.
        restarts: k-means++ starts, of which the one with the smallest WCSS is kept.
        seed: fixes the starts.
        backend: `cuml` needs a GPU; `auto` takes it when it is installed, else scikit-learn.
        start: (K, L) centroids to start from instead of k-means++.

    Raises:
        ValueError: K is not in 1..N, or latents are not finite.
    """
    if not 1 <= num_clusters <= len(latents):
        raise ValueError(f"num_clusters must be in 1..{len(latents)}, got {num_clusters}")
    finite = torch.isfinite(latents) if isinstance(latents, Tensor) else np.isfinite(latents)
    if not finite.all():
        raise ValueError("latents must be finite")
    options: dict[str, Any] = {
        "n_clusters": num_clusters,
        "init": "k-means++" if start is None else start,
        "n_init": restarts if start is None else 1,
        "random_state": seed,
        "max_iter": 300,
        "tol": 1e-4,
    }
    if resolve_backend(backend) == "cuml":
        from acsr_ray.clustering.kmeans_cuml import fit_cuml

        centroids, cluster_id, wcss = fit_cuml(latents, options)
    else:
        rows = latents.numpy(force=True) if isinstance(latents, Tensor) else latents
        model = KMeans(**options).fit(np.asarray(rows, np.float64))
        centroids, cluster_id, wcss = model.cluster_centers_, model.labels_, model.inertia_
    return KMeansResult(np.asarray(centroids, np.float32), np.asarray(cluster_id, np.int32), float(wcss))


def resolve_backend(backend: Backend) -> Literal["sklearn", "cuml"]:
    """Return the backend that `auto` stands for here."""
    if backend != "auto":
        return backend
    return "cuml" if importlib.util.find_spec("cuml") else "sklearn"


def merge_small_clusters(
    latents: NDArray[Any], cluster_id: NDArray[np.int32], min_size: int
) -> NDArray[np.int32]:
    """Merge clusters smaller than `min_size`, smallest first, into the one with the nearest centroid.

    Returns:
        (N,) int32 cluster ids, renumbered 0..K'-1 in the old order.
    """
    merged = cluster_id.copy()
    while True:
        ids, sizes = np.unique(merged, return_counts=True)
        if len(ids) == 1 or sizes.min() >= min_size:
            return np.searchsorted(ids, merged).astype(np.int32)
        smallest = ids[sizes.argmin()]
        centroids = np.stack([latents[merged == i].mean(0) for i in ids])
        distances = np.linalg.norm(centroids - centroids[sizes.argmin()], axis=1)
        distances[sizes.argmin()] = np.inf
        merged[merged == smallest] = ids[distances.argmin()]
