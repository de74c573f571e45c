"""Projected gradient descent on cross-entropy (Madry et al. 2018); a single step is FGSM."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from acsr_ray.attacks.threat import ThreatModel


def pgd(
    model: Callable[[Tensor], Tensor],
    images: Tensor,
    labels: Tensor,
    *,
    threat: ThreatModel,
    steps: int,
    step_size: float,
    generator: torch.Generator | None,
) -> Tensor:
    """Maximise the cross-entropy of the labels within a threat model.

    Args:
        model: images to logits.
        images: (N, 3, H, W) in [0, 1].
        labels: (N,) int64.
        threat: the set to stay in.
        steps: gradient steps; 1 is the single-step attack.
        step_size: length of a step in the threat's norm.
        generator: source of the random start; None starts at the images.

    Returns:
        Adversarial images of the same shape, detached.
    """
    adversarial = images if generator is None else threat.random_start(images, generator)
    for _ in range(steps):
        adversarial = adversarial.detach().requires_grad_()
        loss = F.cross_entropy(model(adversarial), labels, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, adversarial)
        with torch.no_grad():
            adversarial = adversarial + step_size * threat.direction(gradient)
            adversarial = threat.project(adversarial, images)
    return adversarial.detach()
