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


ROWS_AT_ONCE = 8192


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

    def pack(self, *, half: bool = False) -> dict[str, Tensor]:
        """Return the arrays to store: float32, the whitening as its packed lower triangle.

        Args:
            half: the whitening in half precision.
        """
        rows, columns = _triangle(self.mean.shape[1])
        precision = torch.float16 if half else torch.float32
        return {
            "class_id": self.class_id,
            "cluster_id": self.cluster_id,
            "count": self.count,
            "mean": self.mean.float(),
            "whitening": self.whitening[:, rows, columns].to(precision),
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
    keys = np.stack([class_id, cluster_id], axis=1)
    unique, index = np.unique(keys, axis=0, return_inverse=True)
    moments = GaussianMoments(unique, latents.shape[1])
    for start in range(0, len(latents), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        moments.add(latents[rows], index.reshape(-1)[rows])
    return moments.finish(inverse, tied=tied)


class GaussianMoments:
    """Sums over latents from which the Gaussians of all clusters follow, in float64 and in one pass.

    Memory is K (L + 1)^2 numbers, whatever the number of latents. Sums are taken around each cluster's first
    mean, so that no large numbers cancel.

    Args:
        keys: (K, 2) class and cluster.
        length: L.
    """

    def __init__(self, keys: NDArray[Any], length: int) -> None:
        count = len(keys)
        self.keys = keys
        self.count = np.zeros(count, np.int64)
        self._shift = np.zeros((count, length))
        self._sum = np.zeros((count, length))
        self._outer = np.zeros((count, length, length))
        # Of |x|^2 x, |x|^2 and |x|^4: what Ledoit and Wolf's shrinkage needs beside the covariance.
        self._cubic = np.zeros((count, length))
        self._square = np.zeros(count)
        self._quartic = np.zeros(count)

    def add(self, latents: NDArray[Any], index: NDArray[np.int64]) -> None:
        """Add latents (n, L) of clusters `index` (n,), positions among the keys.

        Raises:
            ValueError: latents are not finite.
        """
        if not np.isfinite(latents).all():
            raise ValueError("latents must be finite")
        for k in np.unique(index).tolist():
            rows = np.asarray(latents[index == k], np.float64)
            if not self.count[k]:
                self._shift[k] = rows.mean(0)
            rows = rows - self._shift[k]
            squares = (rows * rows).sum(1)
            self.count[k] += len(rows)
            self._sum[k] += rows.sum(0)
            self._outer[k] += rows.T @ rows
            self._cubic[k] += squares @ rows
            self._square[k] += squares.sum()
            self._quartic[k] += (squares * squares).sum()

    def finish(self, inverse: Inverse, *, tied: bool = False) -> Gaussians:
        """Return the Gaussians; see `fit_gaussians`."""
        means = self._sum / self.count[:, None]
        scatter = self._outer - self.count[:, None, None] * means[:, :, None] * means[:, None, :]
        quartic = self._centred_quartic(means)
        if tied:
            pooled = _whiten(scatter.sum(0), float(quartic.sum()), int(self.count.sum()), inverse)
            whitened = [pooled] * len(self.keys)
        else:
            whitened = [
                _whiten(scatter[k], float(quartic[k]), int(self.count[k]), inverse)
                for k in range(len(self.keys))
            ]
        return Gaussians(
            torch.from_numpy(self.keys[:, 0].astype(np.int32)),
            torch.from_numpy(self.keys[:, 1].astype(np.int32)),
            torch.from_numpy(self.count.astype(np.int32)),
            torch.from_numpy(means + self._shift),
            torch.from_numpy(np.stack([whitening for whitening, _ in whitened])),
            torch.tensor([log_det for _, log_det in whitened], dtype=torch.float64),
        )

    def _centred_quartic(self, means: NDArray[Any]) -> NDArray[Any]:
        """Return the sums (K,) of |x - mean|^4, by expanding the square."""
        length = (means * means).sum(1)
        along = np.einsum("ki,kij,kj->k", means, self._outer, means)
        cubic = (self._cubic * means).sum(1)
        total = (self._sum * means).sum(1)
        return (
            self._quartic
            + 4 * along
            + self.count * length**2
            - 4 * cubic
            + 2 * length * self._square
            - 4 * length * total
        )


def _whiten(
    scatter: NDArray[Any], quartic: float, count: int, inverse: Inverse
) -> tuple[NDArray[Any], float]:
    """Return the lower-triangular whitening and the log determinant of a covariance.

    Args:
        scatter: (L, L) sum of the outer products of centred rows.
        quartic: sum of the fourth powers of their lengths.
        count: rows.
        inverse: see `fit_gaussians`.
    """
    covariance = scatter / count
    if inverse == "shrinkage":
        covariance = _shrunk(covariance, quartic, count)
        # A lone or constant cluster has zero covariance; the floor keeps it invertible.
        scale = max(np.trace(covariance) / len(covariance), 1e-12)
        factor = np.linalg.cholesky(covariance + 1e-9 * scale * np.eye(len(covariance)))
        whitening = np.linalg.solve(factor, np.eye(len(factor)))
        return np.tril(whitening), 2 * float(np.log(np.diag(factor)).sum())
    values, vectors = np.linalg.eigh(covariance)
    kept = values > max(values.max(), 1e-300) * len(values) * np.finfo(np.float64).eps
    root = np.zeros_like(values)
    root[kept] = values[kept] ** -0.5
    return _lower_triangular(root[:, None] * vectors.T), float(np.log(values[kept]).sum())


def _shrunk(covariance: NDArray[Any], quartic: float, count: int) -> NDArray[Any]:
    """Return the covariance shrunk towards a multiple of the identity (Ledoit and Wolf 2004)."""
    length = len(covariance)
    squared = float((covariance**2).sum())
    mean = np.trace(covariance) / length
    distance = (squared - length * mean**2) / length
    error = min((quartic / count - squared) / (length * count), distance)
    weight = 0.0 if error <= 0 else error / distance
    return (1 - weight) * covariance + weight * mean * np.eye(length)


def _lower_triangular(whitening: NDArray[Any]) -> NDArray[Any]:
    """Return the lower-triangular W' with W'^T W' = W^T W (a QL factor)."""
    upper = np.linalg.qr(whitening[:, ::-1])[1]
    return np.tril(upper[::-1, ::-1])


def squared_mahalanobis(latents: Tensor, gaussians: Gaussians) -> Tensor:
    """Return d^2 (N, K) of latents (N, L) to every cluster."""
    count, length = gaussians.mean.shape
    centres = torch.einsum("kij,kj->ki", gaussians.whitening, gaussians.mean)
    # One matrix product for all clusters.
    whitened = latents @ gaussians.whitening.reshape(count * length, length).mT
    return (whitened.unflatten(1, (count, length)) - centres).square().sum(2)


def own_squared_mahalanobis(latents: Tensor, gaussians: Gaussians, index: Tensor) -> Tensor:
    """Return d^2 (N,) of each latent to the cluster `index` (N,) it belongs to; differentiable.

    One matrix product whitens every latent for every cluster: N K L numbers, where a whitening per latent
    would be N L^2. It is done in the Gaussians' precision, also within autocast: squared distances in half
    precision would drown in rounding.
    """
    count, length = gaussians.mean.shape
    with torch.autocast(latents.device.type, enabled=False):
        # Around a point amid the means, so that no large numbers cancel.
        middle = gaussians.mean.mean(0)
        rows = latents.to(gaussians.mean) - middle
        whitened = (rows @ gaussians.whitening.reshape(count * length, length).mT).unflatten(1, (count, -1))
        centres = torch.einsum("kij,kj->ki", gaussians.whitening, gaussians.mean - middle)
        own = whitened[torch.arange(len(rows), device=rows.device), index]
        return (own - centres[index]).square().sum(1)


def _triangle(size: int) -> tuple[Tensor, Tensor]:
    rows, columns = torch.tril_indices(size, size)
    return rows, columns


def locate_clusters(gaussians: Gaussians, class_id: Sequence[int], cluster_id: Sequence[int]) -> Tensor:
    """Return the position (N,) of each (class, cluster) among the Gaussians; `KeyError` if absent."""
    pairs = zip(gaussians.class_id.tolist(), gaussians.cluster_id.tolist(), strict=True)
    position = {key: k for k, key in enumerate(pairs)}
    return torch.tensor([position[key] for key in zip(class_id, cluster_id, strict=True)])
