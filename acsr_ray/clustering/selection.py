"""Which cluster an image belongs to at inference, where no label is known (Algorithm 1, stage iii).

`mahalanobis` is the paper's rule; it favours broad clusters, since a wide Gaussian is near to everything.
`gaussian_loglik` adds log det S, the Gaussian log-likelihood up to constants. `tied` gives all clusters one
covariance when the Gaussians are fitted, and then compares plain distances.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from acsr_ray.clustering.gaussians import Gaussians, squared_mahalanobis

SelectionRule = Literal["mahalanobis", "gaussian_loglik", "tied"]
RULES: tuple[SelectionRule, ...] = ("mahalanobis", "gaussian_loglik", "tied")


@dataclass(frozen=True)
class Selection:
    """Chosen cluster (N,) as position among the Gaussians, and its Mahalanobis distance d (N,).

    `nearest` (N, k) holds the k best clusters, the chosen one first; None where only one was asked for.
    """

    index: Tensor
    distance: Tensor
    nearest: Tensor | None = None

    @property
    def candidates(self) -> Tensor:
        """Clusters (N, k) to reconstruct with."""
        return self.index[:, None] if self.nearest is None else self.nearest

    def rows(self, chosen: slice) -> "Selection":
        """Return some of the rows."""
        nearest = None if self.nearest is None else self.nearest[chosen]
        return Selection(self.index[chosen], self.distance[chosen], nearest)


def select_cluster(latents: Tensor, gaussians: Gaussians, rule: SelectionRule, top_k: int = 1) -> Selection:
    """Choose the best cluster over all classes.

    Args:
        latents: (N, L), same dtype and device as the Gaussians.
        gaussians: fitted with `tied=True` for the rule `tied`.
        rule: how clusters are compared.
        top_k: how many of the best to return, at most all.
    """
    squared = squared_mahalanobis(latents, gaussians)
    score = squared + gaussians.log_det if rule == "gaussian_loglik" else squared
    index = score.argmin(1)
    distance = torch.gather(squared, 1, index[:, None])[:, 0].sqrt()
    if top_k == 1:
        return Selection(index, distance)
    return Selection(index, distance, score.argsort(dim=1, stable=True)[:, :top_k])
