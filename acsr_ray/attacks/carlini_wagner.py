"""The l2 attack of Carlini and Wagner (2017): the smallest perturbation that is worth its margin.

Minimises ||x' - x||^2 + c max(z_y - max other, -kappa) over w with x' = (tanh w + 1) / 2, by Adam. Weight c,
best point and stopping are per image, so a result does not depend on the rest of the batch.
"""

import torch
from torch import Tensor

from acsr_ray.attacks.apgd import margin
from acsr_ray.attacks.gradient import Model
from acsr_ray.attacks.subset import subset_model

INSIDE = 1 - 1e-6
"""Pixels at 0 and 1 are moved inside by half of 1e-6, where atanh is finite."""
BETAS = (0.9, 0.999)
FLOOR = 1e-8


def carlini_wagner(
    model: Model,
    images: Tensor,
    labels: Tensor,
    *,
    c: float = 1.0,
    kappa: float = 0.0,
    steps: int = 100,
    lr: float = 0.01,
    binary_search_steps: int = 0,
) -> Tensor:
    """Find small adversarial perturbations.

    Args:
        model: images to logits; asked for rows of the batch (`subset_model`) as images finish.
        images: (N, 3, H, W) in [0, 1].
        labels: (N,) int64.
        c: weight of the margin term; with a binary search, the first one.
        kappa: logit margin that a success must have.
        steps: Adam steps. An image is done early once its objective has not fallen for a tenth of them.
        lr: Adam's learning rate.
        binary_search_steps: further runs per image, with c lower after a success, higher after none.

    Returns:
        The nearest point of margin kappa met; else the misclassified one of largest margin; else the image.
    """
    best = _Best(images)
    weight = images.new_full((len(images),), c)
    low, high = torch.zeros_like(weight), torch.full_like(weight, torch.inf)
    for search in range(1 + binary_search_steps):
        succeeded = _minimise(model, images, labels, weight, kappa, steps, lr, best)
        if search == binary_search_steps:
            break
        high = torch.where(succeeded, weight.minimum(high), high)
        low = torch.where(succeeded, low, weight.maximum(low))
        weight = torch.where(torch.isinf(high), weight * 10, (low + high) / 2)
    return best.images


class _Best:
    """The best point of each image so far."""

    def __init__(self, images: Tensor) -> None:
        self.images = images.clone()
        self.distance = images.new_full((len(images),), torch.inf)
        self.lead = images.new_zeros(len(images))

    def offer(self, rows: Tensor, points: Tensor, distance: Tensor, lead: Tensor, success: Tensor) -> None:
        """Keep points that are nearer at full margin, or lead by more where no success is known."""
        nearer = success & (distance < self.distance[rows])
        self.distance[rows[nearer]] = distance[nearer]
        leading = torch.isinf(self.distance[rows]) & (lead > self.lead[rows])
        self.lead[rows[leading]] = lead[leading]
        taken = nearer | leading
        self.images[rows[taken]] = points[taken]


def _minimise(
    model: Model,
    images: Tensor,
    labels: Tensor,
    weight: Tensor,
    kappa: float,
    steps: int,
    lr: float,
    best: _Best,
) -> Tensor:
    """Run Adam once from the images, offer every point to `best`, and return who succeeded (N,)."""
    succeeded = torch.zeros(len(images), dtype=torch.bool, device=images.device)
    rows = torch.arange(len(images), device=images.device)
    w = torch.atanh((images * 2 - 1) * INSIDE)
    first, second = torch.zeros_like(w), torch.zeros_like(w)
    reviewed = images.new_full((len(images),), torch.inf)
    serving = model
    for step in range(steps):
        leaf = w.detach().requires_grad_()
        with torch.enable_grad():
            points = (torch.tanh(leaf) + 1) / 2
            distance = (points - images[rows]).square().flatten(1).sum(1)
            logits = serving(points)
            lead = -margin(logits, labels[rows])
            cost = distance + weight[rows] * (-lead).clamp(min=-kappa)
            (gradient,) = torch.autograd.grad(cost.sum(), leaf)
        distance, lead, cost = distance.detach(), lead.detach(), cost.detach()
        success = (logits.detach().argmax(1) != labels[rows]) & (lead >= kappa)
        succeeded[rows] |= success
        best.offer(rows, points.detach(), distance, lead, success)
        first = BETAS[0] * first + (1 - BETAS[0]) * gradient
        second = BETAS[1] * second + (1 - BETAS[1]) * gradient.square()
        rate = first / (1 - BETAS[0] ** (step + 1))
        w = w - lr * rate / ((second / (1 - BETAS[1] ** (step + 1))).sqrt() + FLOOR)
        if step % max(steps // 10, 1):
            continue
        kept = (cost <= reviewed).nonzero()[:, 0]
        reviewed = cost
        if not len(kept):
            break
        if len(kept) < len(rows):
            rows, w, first, second, reviewed = (part[kept] for part in (rows, w, first, second, reviewed))
            serving = subset_model(model, rows)
    return succeeded
