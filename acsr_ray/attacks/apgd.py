"""Auto-PGD: projected gradient ascent that halves its own step size (Croce and Hein 2020, Algorithm 1)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from acsr_ray.attacks.gradient import Model
from acsr_ray.attacks.threat import ThreatModel

MOMENTUM = 0.75
RHO = 0.75
"""Share of steps that must raise the loss between two checkpoints, or the step is halved."""


def apgd(
    model: Model,
    images: Tensor,
    labels: Tensor,
    *,
    threat: ThreatModel,
    steps: int,
    loss: str,
    start: Tensor,
) -> Tensor:
    """Maximise a loss without a step size to choose.

    Step sizes, checkpoints and the best point are per image.

    Args:
        model: images to logits.
        images: (N, 3, H, W) in [0, 1].
        labels: (N,) int64.
        threat: the set to stay in.
        steps: gradient steps.
        loss: `ce` or `dlr`.
        start: (N, 3, H, W) in the set.

    Returns:
        Of the points met, the misclassified one of highest loss, or else the one of highest loss.

    Raises:
        ValueError: `dlr` with fewer than three classes.
    """
    step = 2 * threat.radius(images)
    point, previous = start, start
    value, gradient, fooled = _evaluate(model, point, labels, loss)
    best, best_value, best_gradient = point, value, gradient
    found, found_value = point, torch.where(fooled, value, -torch.inf)
    rises = torch.zeros_like(value)
    halved_before, value_before = torch.zeros_like(fooled), torch.full_like(value, -torch.inf)
    marks, last_mark = checkpoints(steps), 0
    for number in range(1, steps + 1):
        target = threat.project(point + step * threat.direction(gradient), images)
        if number > 1:
            target = point + MOMENTUM * (target - point) + (1 - MOMENTUM) * (point - previous)
            target = threat.project(target, images)
        previous, point, old_value = point, target, value
        value, gradient, fooled = _evaluate(model, point, labels, loss)
        rises += value > old_value
        better = value > best_value
        best, best_gradient = _where(better, point, best), _where(better, gradient, best_gradient)
        best_value = torch.where(better, value, best_value)
        better = fooled & (value > found_value)
        found, found_value = _where(better, point, found), torch.where(better, value, found_value)
        if number in marks:
            stuck = ~halved_before & (best_value <= value_before)
            halve = (rises < RHO * (number - last_mark)) | stuck
            step = _where(halve, step / 2, step)
            # Restart at the best point, with no momentum from where the walk had gone.
            point, gradient = _where(halve, best, point), _where(halve, best_gradient, gradient)
            previous, value = _where(halve, best, previous), torch.where(halve, best_value, value)
            halved_before, value_before, last_mark = halve, best_value, number
            rises = torch.zeros_like(rises)
    return _where(torch.isfinite(found_value), found, best)


def checkpoints(steps: int) -> tuple[int, ...]:
    """Return the steps after which the step size is reviewed: 22 % first, then ever closer."""
    shares = [0.0, 0.22]
    while shares[-1] < 1:
        shares.append(shares[-1] + max(shares[-1] - shares[-2] - 0.03, 0.06))
    # Rounded first: 0.57 as a sum of floats is a little more than 57 %.
    return tuple(sorted({math.ceil(round(share * steps, 6)) for share in shares[1:] if share <= 1}))


def dlr(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the difference of logits ratio (N,): -(z_y - max other) / (z_1st - z_3rd).

    Unlike the cross-entropy it does not change when the logits are shifted or rescaled.

    Raises:
        ValueError: fewer than three classes.
    """
    if logits.shape[1] < 3:
        raise ValueError(f"loss dlr needs at least 3 classes, got {logits.shape[1]}")
    ranked = logits.sort(dim=1, descending=True).values
    return -margin(logits, labels) / (ranked[:, 0] - ranked[:, 2] + 1e-12)


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """Return z_label - max other (N,): positive where the label wins, whatever the logits' signs."""
    own = labels[:, None]
    others = logits.scatter(1, own, -torch.inf)
    return logits.gather(1, own)[:, 0] - others.amax(1)


def _evaluate(model: Model, images: Tensor, labels: Tensor, loss: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return loss (N,), its gradient (N, C, H, W), and which images are misclassified (N,)."""
    leaf = images.detach().requires_grad_()
    with torch.enable_grad():
        logits = model(leaf)
        ratio = loss == "dlr"
        values = dlr(logits, labels) if ratio else F.cross_entropy(logits, labels, reduction="none")
        (gradient,) = torch.autograd.grad(values.sum(), leaf)
    return values.detach(), gradient, logits.detach().argmax(1) != labels


def _where(mask: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    return torch.where(mask.view(-1, 1, 1, 1), yes, no)
