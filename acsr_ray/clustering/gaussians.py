"""One Gaussian per cluster of latents, kept as the whitening that turns Mahalanobis into Euclidean.

Shapes: K clusters, L latent length. With W the whitening of a cluster, d(r)^2 = ||W (r - mu)||^2, which is
(r - mu)^T S^-1 (r - mu) (the paper's Eq. 7 lost a transpose and misplaced the root).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Inverse = Literal["shrinkage", "pinv"]


@dataclass(frozen=True)
class Gaussians:
    """Gaussians of K clusters.

    `class_id`, `cluster_id`, `count` are (K,) int32; `mean` (K, L); `whitening` (K, L, L) lower
    triangular; `log_det` (K,), the log determinant of the covariance (of its range for `pinv`).
    """

    class_id: Tensor
    cluster_id: Tensor
    count: Tensor
    mean: Tensor
    whitening: Tensor
    log_det: Tensor

    def to(self, device: str, dtype: torch.dtype) -> "Gaussians":
        """Return a copy on a device with real arrays in a dtype."""
        return replace(
            self,
            class_id=self.class_id.to(device),
            cluster_id=self.cluster_id.to(device),
            count=self.count.to(device),
            mean=self.mean.to(device, dtype),
            whitening=self.whitening.to(device, dtype),
            log_det=self.log_det.to(device, dtype),
        )

    def pack(self) -> dict[str, Tensor]:
        """Return the arrays to store: float32, the whitening as its packed lower triangle."""
        rows, columns = _triangle(self.mean.shape[1])
        return {
            "class_id": self.class_id,
            "cluster_id": self.cluster_id,
            "count": self.count,
            "mean": self.mean.float(),
            "whitening": self.whitening[:, rows, columns].float(),
            "log_det": self.log_det.float(),
        }

    @classmethod
    def unpack(cls, arrays: Mapping[str, Tensor]) -> Self:
        """Restore from `pack`, as float32."""
        count, latent = arrays["mean"].shape
        rows, columns = _triangle(latent)
        whitening = torch.zeros(count, latent, latent)
        whitening[:, rows, columns] = arrays["whitening"].float()
        real = {name: arrays[name].float() for name in ("mean", "log_det")}
        ids = {name: arrays[name] for name in ("class_id", "cluster_id", "count")}
        return cls(whitening=whitening, **real, **ids)


def fit_gaussians(
    latents: NDArray[Any],
    class_id: NDArray[Any],
    cluster_id: NDArray[Any],
    *,
    inverse: Inverse = "shrinkage",
    tied: bool = False,
) -> Gaussians:
    """Fit one Gaussian per (class, cluster).

    Args:
        latents: (N, L).
        class_id: (N,) class of each latent.
        cluster_id: (N,) cluster within the class.
        inverse: `shrinkage` (Ledoit-Wolf) or `pinv`, the paper's Moore-Penrose inverse, under which a
            displacement in the null space of a cluster costs nothing.
        tied: give every cluster the pooled within-cluster covariance.

    Raises:
        ValueError: lengths differ, or latents are not finite.
    """
    if not len(latents) == len(class_id) == len(cluster_id):
        raise ValueError("latents, class_id and cluster_id must have one row per image")
    if not np.isfinite(latents).all():
        raise ValueError("latents must be finite")
    latents = np.asarray(latents, np.float64)
    keys = np.stack([class_id, cluster_id], axis=1)
    unique, index, counts = np.unique(keys, axis=0, return_inverse=True, return_counts=True)
    index = index.reshape(-1)
    means = np.stack([latents[index == k].mean(0) for k in range(len(unique))])
    if tied:
        pooled = [_whiten(latents - means[index], inverse)] * len(unique)
    else:
        pooled = [_whiten(latents[index == k] - means[k], inverse) for k in range(len(unique))]
    return Gaussians(
        torch.from_numpy(unique[:, 0].astype(np.int32)),
        torch.from_numpy(unique[:, 1].astype(np.int32)),
        torch.from_numpy(counts.astype(np.int32)),
        torch.from_numpy(means),
        torch.from_numpy(np.stack([whitening for whitening, _ in pooled])),
        torch.tensor([log_det for _, log_det in pooled], dtype=torch.float64),
    )


def _whiten(centred: NDArray[Any], inverse: Inverse) -> tuple[NDArray[Any], float]:
    """Return the lower-triangular whitening of centred rows (n, L) and the covariance's log determinant."""
    if inverse == "shrinkage":
        # Imported here, because every purification actor loads this module and none of them fits.
        from sklearn.covariance import ledoit_wolf

        covariance, _ = ledoit_wolf(centred, assume_centered=True)
        # A lone or constant cluster has zero covariance; the floor keeps it invertible.
        scale = max(np.trace(covariance) / len(covariance), 1e-12)
        factor = np.linalg.cholesky(covariance + 1e-9 * scale * np.eye(len(covariance)))
        whitening = np.linalg.solve(factor, np.eye(len(factor)))
        return np.tril(whitening), 2 * float(np.log(np.diag(factor)).sum())
    covariance = centred.T @ centred / len(centred)
    values, vectors = np.linalg.eigh(covariance)
    kept = values > max(values.max(), 1e-300) * len(values) * np.finfo(np.float64).eps
    root = np.zeros_like(values)
    root[kept] = values[kept] ** -0.5
    return _lower_triangular(root[:, None] * vectors.T), float(np.log(values[kept]).sum())


def _lower_triangular(whitening: NDArray[Any]) -> NDArray[Any]:
    """Return the lower-triangular W' with W'^T W' = W^T W (a QL factor)."""
    upper = np.linalg.qr(whitening[:, ::-1])[1]
    return np.tril(upper[::-1, ::-1])


def squared_mahalanobis(latents: Tensor, gaussians: Gaussians) -> Tensor:
    """Return d^2 (N, K) of latents (N, L) to every cluster."""
    centres = torch.einsum("kij,kj->ki", gaussians.whitening, gaussians.mean)
    whitened = torch.einsum("kij,nj->nki", gaussians.whitening, latents)
    return (whitened - centres).square().sum(2)


def own_squared_mahalanobis(latents: Tensor, gaussians: Gaussians, index: Tensor) -> Tensor:
    """Return d^2 (N,) of each latent to the cluster `index` (N,) it belongs to; differentiable."""
    centred = latents - gaussians.mean[index]
    return torch.einsum("nij,nj->ni", gaussians.whitening[index], centred).square().sum(1)


def _triangle(size: int) -> tuple[Tensor, Tensor]:
    rows, columns = torch.tril_indices(size, size)
    return rows, columns


def locate_clusters(gaussians: Gaussians, class_id: Sequence[int], cluster_id: Sequence[int]) -> Tensor:
    """Return the position (N,) of each (class, cluster) among the Gaussians; `KeyError` if absent."""
    pairs = zip(gaussians.class_id.tolist(), gaussians.cluster_id.tolist(), strict=True)
    position = {key: k for k, key in enumerate(pairs)}
    return torch.tensor([position[key] for key in zip(class_id, cluster_id, strict=True)])
