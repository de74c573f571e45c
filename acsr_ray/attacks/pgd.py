"""Projected gradient descent on cross-entropy as training uses it (Madry et al. 2018); one step is FGSM."""

import numpy as np
import torch
from torch import Tensor

from acsr_ray.attacks.gradient import Model, ascend, cross_entropy_of
from acsr_ray.attacks.threat import ThreatModel

EVALUATION_BATCH = 250


def pgd(
    model: Model,
    images: Tensor,
    labels: Tensor,
    *,
    threat: ThreatModel,
    steps: int,
    step_size: float,
    start: Tensor,
) -> Tensor:
    """Maximise the cross-entropy of the labels within a threat model.

    Args:
        model: images to logits.
        images: (N, 3, H, W) in [0, 1].
        labels: (N,) int64.
        threat: the set to stay in.
        steps: gradient steps; 1 is the single-step attack.
        step_size: length of a step in the threat's norm.
        start: (N, 3, H, W) inside the set, such as `threat.random_start`.

    Returns:
        Adversarial images of the same shape, detached.
    """
    loss = cross_entropy_of(model, labels)
    return ascend(loss, start, images, threat=threat, steps=steps, step_size=step_size)


def attack_pixels(
    model: Model,
    pixels: np.ndarray,
    labels: np.ndarray,
    threat: ThreatModel,
    device: str = "cpu",
) -> np.ndarray:
    """Attack stored images by 10-step PGD without random start, and round the result to 8 bits.

    Args:
        model: images to logits, in evaluation mode.
        pixels: (N, H, W, 3) uint8.
        labels: (N,) int64.
        threat: the set to stay in, up to rounding; the step is a quarter of its radius.
        device: where the model is.

    Returns:
        (N, H, W, 3) uint8.
    """
    parts = []
    for start in range(0, len(pixels), EVALUATION_BATCH):
        end = start + EVALUATION_BATCH
        images = torch.from_numpy(np.moveaxis(pixels[start:end], -1, 1).astype(np.float32) / 255).to(device)
        adversarial = pgd(
            model,
            images,
            torch.as_tensor(labels[start:end]).to(device),
            threat=threat,
            steps=10,
            step_size=threat.epsilon / 4,
            start=images,
        )
        parts.append((adversarial * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy())
    return np.concatenate(parts)
