"""Attacks that follow the gradient of a loss inside a ball: FGSM, BIM, PGD, TPGD; and plain noise.

In l2 and relative l2, FGSM and BIM go along the gradient's *sign* scaled to the norm, as the sign is what
defines them; PGD goes along the gradient itself. Image by image: nothing is averaged over a batch.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from acsr_ray.attacks.draws import Draws
from acsr_ray.attacks.threat import ThreatModel

Model = Callable[[Tensor], Tensor]
TPGD_START = 1e-3
"""Standard deviation of TPGD's start: at x itself the divergence from x has no gradient."""


def gradient_of(loss: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """Return the gradient (N, C, H, W) of a loss, summed over the batch, at the images."""
    leaf = images.detach().requires_grad_()
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(loss(leaf), leaf)
    return gradient


def ascend(
    loss: Callable[[Tensor], Tensor],
    start: Tensor,
    images: Tensor,
    *,
    threat: ThreatModel,
    steps: int,
    step_size: float,
    sign: bool = False,
) -> Tensor:
    """Climb a loss by projected steps of fixed length.

    Args:
        loss: images to a scalar that is a sum over images.
        start: (N, C, H, W) inside the set.
        images: (N, C, H, W) in [0, 1], the centres.
        threat: the set to stay in.
        steps: gradient steps.
        step_size: length of a step in the threat's norm (relative to ||x|| for `relative_l2`).
        sign: go along the gradient's sign also in l2.

    Returns:
        The last point, detached.
    """
    adversarial = start.detach()
    length = step_size * threat.unit(images)
    for _ in range(steps):
        gradient = gradient_of(loss, adversarial)
        adversarial = threat.project(adversarial + length * threat.direction(gradient, sign), images)
    return adversarial


def cross_entropy_of(model: Model, labels: Tensor) -> Callable[[Tensor], Tensor]:
    """Return the summed cross-entropy of the labels as a function of images."""
    return lambda images: F.cross_entropy(model(images), labels, reduction="sum")


def divergence_from(model: Model, images: Tensor) -> Callable[[Tensor], Tensor]:
    """Return the summed KL(p(x) || p(x')) from the images' predictions as a function of other images x'."""
    with torch.no_grad():
        clean = F.log_softmax(model(images), 1)
    return lambda moved: F.kl_div(F.log_softmax(model(moved), 1), clean, reduction="sum", log_target=True)


def fgsm(model: Model, images: Tensor, labels: Tensor, *, threat: ThreatModel) -> Tensor:
    """Take one step along the gradient's sign to the surface of the ball (Goodfellow et al. 2015).

    In l2 the clipped step is lengthened until the norm is met (`ThreatModel.reach`).
    """
    gradient = gradient_of(cross_entropy_of(model, labels), images)
    return threat.reach(gradient.sign(), images)


def bim(
    model: Model, images: Tensor, labels: Tensor, *, threat: ThreatModel, steps: int, step_size: float
) -> Tensor:
    """Take sign steps from the image itself (Kurakin et al. 2017)."""
    loss = cross_entropy_of(model, labels)
    return ascend(loss, images, images, threat=threat, steps=steps, step_size=step_size, sign=True)


def pgd_attack(
    model: Model,
    images: Tensor,
    labels: Tensor,
    *,
    threat: ThreatModel,
    steps: int,
    step_size: float,
    draws: Draws | None,
) -> Tensor:
    """Take steepest steps from a random point of the ball, or without `draws` from x (Madry et al. 2018)."""
    start = images if draws is None else threat.drawn_start(images, draws)
    loss = cross_entropy_of(model, labels)
    return ascend(loss, start, images, threat=threat, steps=steps, step_size=step_size)


def tpgd(
    model: Model, images: Tensor, *, threat: ThreatModel, steps: int, step_size: float, draws: Draws
) -> Tensor:
    """Maximise KL(p(x) || p(x')): away from the clean prediction, no label (Zhang et al. 2019, TRADES)."""
    start = threat.project(images + TPGD_START * draws.normal(images.shape[1:], 0).to(images), images)
    loss = divergence_from(model, images)
    return ascend(loss, start, images, threat=threat, steps=steps, step_size=step_size)


def noise(images: Tensor, *, threat: ThreatModel, draws: Draws) -> Tensor:
    """Go to the surface of the ball in a random direction: the control that no attack may lose to.

    linf: random signs; l2 kinds: a Gaussian direction, lengthened until the norm is met after clipping.
    """
    shape = tuple(images.shape[1:])
    direction = draws.signs(shape, 0) if threat.norm == "linf" else draws.normal(shape, 0)
    return threat.reach(direction.to(images), images)
