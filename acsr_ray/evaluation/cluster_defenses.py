"""Purification with a bundle and some choice of cluster: ACSR's own, a random, the r-th nearest, a fixed one.

Comparing them on one bundle tests the core claim, that the nearest cluster's dictionary is the right one.
"""

from abc import abstractmethod

import torch
from torch import Tensor

from acsr_ray.clustering.gaussians import squared_mahalanobis
from acsr_ray.clustering.selection import Selection
from acsr_ray.defenses.base import Defense, image_generator
from acsr_ray.models.classifier import ENCODER_MICRO_BATCH, pad_batch
from acsr_ray.purification.purifier import Purifier, check_images


class PurifierDefense(Defense):
    """Purify each image with the dictionary of a chosen cluster.

    Gradients flow through split and sparse coding; the choice is constant almost everywhere.

    Args:
        purifier: loaded from a bundle.
    """

    differentiable = True

    def __init__(self, purifier: Purifier) -> None:
        super().__init__()
        self.purifier = purifier

    def forward(self, images: Tensor) -> Tensor:
        """Return the purified images; see `Defense.forward`."""
        check_images(images)
        if not len(images):
            return images.clone()
        ready = images.to(self.purifier.device, torch.float32)
        with torch.no_grad():
            selection = self.choose(ready.detach())
        return self.purifier.reconstruct(ready, selection).images.to(images)

    @abstractmethod
    def choose(self, images: Tensor) -> Selection:
        """Return the cluster of each image (N >= 1, 3, H, W), float32 on the purifier's device."""


class NearestCluster(PurifierDefense):
    """ACSR.

    Args:
        purifier: loaded from a bundle.
        reselect: how often the cluster is chosen anew from the purified image, for the original image's
            high band; 0 is the paper.
    """

    def __init__(self, purifier: Purifier, reselect: int = 0) -> None:
        super().__init__(purifier)
        self.reselect = reselect

    def choose(self, images: Tensor) -> Selection:
        """Return the nearest clusters; see `PurifierDefense.choose`."""
        if not self.purifier.uses_clusters:
            return _selection(torch.zeros(len(images), device=images.device))
        selection = self.purifier.select(self.purifier.latents(images))
        for _ in range(self.reselect):
            purified = self.purifier.reconstruct(images, selection).images
            selection = self.purifier.select(self.purifier.latents(purified))
        return selection


class RandomCluster(PurifierDefense):
    """A cluster drawn uniformly for each image."""

    randomized = True

    def choose(self, images: Tensor) -> Selection:
        """Return clusters fixed by the seed and the pixels; see `PurifierDefense.choose`."""
        count = self.purifier.clusters
        arrays = images.cpu().permute(0, 2, 3, 1).numpy()
        drawn = [int(image_generator(array, self.seed).integers(count)) for array in arrays]
        return _selection(torch.tensor(drawn, device=images.device))


class RankedCluster(PurifierDefense):
    """The r-th nearest cluster.

    Args:
        purifier: loaded from a bundle.
        rank: r; 1 is ACSR, the number of clusters the farthest.

    Raises:
        ValueError: no such rank.
    """

    def __init__(self, purifier: Purifier, rank: int) -> None:
        super().__init__(purifier)
        if not 1 <= rank <= purifier.clusters:
            raise ValueError(f"rank must be in 1..{purifier.clusters}, got {rank}")
        self.rank = rank

    def choose(self, images: Tensor) -> Selection:
        """Return the clusters of this rank; see `PurifierDefense.choose`."""
        return _selection(rank_clusters(self.purifier, images)[0][:, self.rank - 1])


class FixedCluster(PurifierDefense):
    """The same cluster for every image.

    Args:
        purifier: loaded from a bundle.
        cluster: position among the bundle's clusters, from 0.

    Raises:
        ValueError: no such cluster.
    """

    def __init__(self, purifier: Purifier, cluster: int) -> None:
        super().__init__(purifier)
        if not 0 <= cluster < purifier.clusters:
            raise ValueError(f"cluster must be in 0..{purifier.clusters - 1}, got {cluster}")
        self.cluster = cluster

    def choose(self, images: Tensor) -> Selection:
        """Return this cluster for all; see `PurifierDefense.choose`."""
        return _selection(torch.full((len(images),), self.cluster, device=images.device))


def rank_clusters(purifier: Purifier, images: Tensor) -> tuple[Tensor, Tensor]:
    """Order the clusters of each image by the bundle's own rule, so that the first is ACSR's choice.

    The rule `gaussian_loglik` adds log det S to the squared distance; the others compare distances.

    Returns:
        Order (N, K) int64 from near to far, and Mahalanobis distance (N, K) float32.
    """
    latents = purifier.latents(images).to(torch.float64)
    size = ENCODER_MICRO_BATCH[latents.device.type]
    parts = [
        # Filled up as in `Purifier.select`, so that both see the same numbers.
        squared_mahalanobis(pad_batch(part, size), purifier.gaussians)[: len(part)]
        for part in latents.split(size)
    ]
    squared = torch.cat(parts)
    by_likelihood = purifier.config.selection == "gaussian_loglik"
    score = squared + purifier.gaussians.log_det if by_likelihood else squared
    return score.argsort(dim=1, stable=True), squared.sqrt().float()


def _selection(index: Tensor) -> Selection:
    """Return a choice that no distance led to."""
    return Selection(index.long(), torch.zeros(len(index), device=index.device))
