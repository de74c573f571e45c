"""DeepFool (Moosavi-Dezfooli et al. 2016), batched: steps to the nearest linearised decision boundary."""

import torch
from torch import Tensor

from acsr_ray.attacks.gradient import Model
from acsr_ray.attacks.subset import subset_model

FLOOR = 1e-12
DEFAULT_RIVALS = 3
"""Rivals looked at: on CIFAR networks the norms are about 1 % above those of all nine, in half the time."""
FOLLOWED = 1
"""Rivals followed between two looks at all of them: the nearest at the last look mostly stays the nearest."""
LOOK_EVERY = 4
"""Steps between two looks at all rivals, so that no image follows a wrong one for long."""
PUSH = 1e-4
"""l2 length added to every step, as in the paper's code: an image can land so near to the boundary that
the remaining step is lost in float32, and would stay there for all its steps."""


def deepfool(
    model: Model,
    images: Tensor,
    labels: Tensor,
    *,
    steps: int = 100,
    overshoot: float = 0.02,
    classes: int | None = None,
) -> Tensor:
    """Find small adversarial perturbations; every image stops at its own first misclassified point.

    Args:
        model: images to logits; asked for rows of the batch (`subset_model`) as images finish.
        images: (N, 3, H, W) in [0, 1].
        labels: (N,) int64; an image already misclassified is returned as it is.
        steps: linearisations per image.
        overshoot: share by which each step goes beyond the linearised boundary.
        classes: rival classes considered, those of highest logit; None: three.

    Returns:
        (N, 3, H, W) in [0, 1]; still classified right where `steps` did not suffice.
    """
    result = images.clone()
    rows = torch.arange(len(images), device=images.device)
    nearest = torch.zeros((len(images), FOLLOWED), dtype=torch.int64, device=images.device)
    serving = model
    for iteration in range(steps):
        leaf, logits = _forward(serving, result[rows])
        look = iteration % LOOK_EVERY == 0
        rivals = min(classes or DEFAULT_RIVALS, logits.shape[1] - 1) if look else FOLLOWED
        standing = (logits.argmax(1) == labels[rows]).nonzero()[:, 0]
        if not len(standing):
            break
        fallen = len(rows) - len(standing)
        if fallen:
            rows, serving = rows[standing], subset_model(model, rows[standing])
            # A backward pass over all rows, or one more forward pass over those left: the cheaper one.
            if fallen * rivals > len(rows):
                leaf, logits = _forward(serving, result[rows])
                standing = torch.arange(len(rows), device=rows.device)
        own = labels[rows, None]
        ranked = nearest[rows]
        if look:
            ranked = logits[standing].detach().scatter(1, own, -torch.inf).topk(rivals, dim=1).indices
        step, lengths = _nearest_boundary(leaf, logits, standing, own, ranked)
        if look:
            nearest[rows] = ranked.gather(1, lengths.argsort(dim=1)[:, :FOLLOWED])
        result[rows] = (result[rows] + (1 + overshoot) * step).clamp(0, 1)
    return result


def _forward(model: Model, images: Tensor) -> tuple[Tensor, Tensor]:
    leaf = images.detach().requires_grad_()
    with torch.enable_grad():
        return leaf, model(leaf)


def _nearest_boundary(
    leaf: Tensor, logits: Tensor, standing: Tensor, own: Tensor, rivals: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the shortest step that makes a rival's linearised logit meet the label's.

    Args:
        leaf: (N, C, H, W) the images that `logits` were computed from.
        logits: (N, J) with their graph.
        standing: (M,) rows of interest.
        own: (M, 1) their labels.
        rivals: (M, R) classes to look at.

    Returns:
        Steps (M, C, H, W) and the distances (M, R) to every rival.
    """
    with torch.enable_grad():
        ours = logits[standing]
        gaps = ours.gather(1, own) - ours.gather(1, rivals)
    count = rivals.shape[1]
    shortest = torch.full((len(standing),), torch.inf, device=leaf.device, dtype=leaf.dtype)
    step = torch.zeros_like(leaf[standing])
    lengths = []
    for rank in range(count):
        (slope,) = torch.autograd.grad(gaps[:, rank].sum(), leaf, retain_graph=rank + 1 < count)
        slope = slope[standing]
        square = slope.flatten(1).square().sum(1).clamp(min=FLOOR**2)
        length = gaps[:, rank].detach() / square.sqrt()
        nearer = length < shortest
        shortest = torch.where(nearer, length, shortest)
        towards = -((length + PUSH) / square.sqrt()).view(-1, 1, 1, 1) * slope
        step = torch.where(nearer.view(-1, 1, 1, 1), towards, step)
        lengths.append(length)
    return step, torch.stack(lengths, dim=1)
