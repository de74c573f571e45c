"""Threat models: the set an adversarial image must stay in, as a value.

Perturbations are per image; `epsilon` is on the [0, 1] pixel scale (`8 / 255`), or for `relative_l2` a share
of the image's own l2 norm (0.04: at most 4 % of it). Images are (N, C, H, W).
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from acsr_ray.attacks.draws import Draws

Norm = Literal["linf", "l2", "relative_l2"]
FLOOR = 1e-12
BISECTIONS = 40


@dataclass(frozen=True)
class ThreatModel:
    """All images within `epsilon` of the original in a norm, and within [0, 1].

    Raises:
        ValueError: unknown norm or negative epsilon.
    """

    norm: Norm
    epsilon: float

    def __post_init__(self) -> None:
        if self.norm not in get_args(Norm):
            raise ValueError(f"norm must be {', '.join(get_args(Norm))}, got {self.norm!r}")
        if self.epsilon < 0:
            raise ValueError(f"epsilon must be >= 0, got {self.epsilon}")

    def unit(self, images: Tensor) -> Tensor:
        """Return the length (N, 1, 1, 1) of which `epsilon` and step sizes are multiples: ||x||, or 1."""
        if self.norm == "relative_l2":
            return norms(images)
        return images.new_ones((len(images), 1, 1, 1))

    def radius(self, images: Tensor) -> Tensor:
        """Return the radius (N, 1, 1, 1) of each image's ball."""
        return self.epsilon * self.unit(images)

    def length(self, delta: Tensor) -> Tensor:
        """Return the absolute length (N, 1, 1, 1) of perturbations: largest entry, or l2."""
        if self.norm == "linf":
            return delta.flatten(1).abs().amax(1).view(-1, 1, 1, 1)
        return norms(delta)

    def random_start(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Return a random point of the set: uniform in the cube, or in a random direction of the ball."""
        noise = torch.rand(images.shape, generator=generator).to(images) * 2 - 1
        if self.norm == "linf":
            return self._start(images, noise)
        share = torch.rand((len(images), 1, 1, 1), generator=generator).to(images)
        return self._start(images, noise / norms(noise) * share)

    def drawn_start(self, images: Tensor, draws: Draws) -> Tensor:
        """Return a random point of the set like `random_start`, from per-image draws."""
        if self.norm == "linf":
            return self._start(images, (draws.uniform(images.shape[1:], 0) * 2 - 1).to(images))
        direction = draws.normal(images.shape[1:], 0).to(images)
        share = draws.uniform((1, 1, 1), 1).to(images)
        return self._start(images, direction / norms(direction) * share)

    def _start(self, images: Tensor, noise: Tensor) -> Tensor:
        return self.project(images + self.radius(images) * noise, images)

    def direction(self, gradient: Tensor, sign: bool = False) -> Tensor:
        """Return an ascent direction of unit length in the norm.

        Args:
            gradient: (N, C, H, W) of the loss.
            sign: follow the gradient's sign also in l2 (FGSM, BIM), not its steepest direction.
        """
        if self.norm == "linf":
            return gradient.sign()
        ascent = gradient.sign() if sign else gradient
        return ascent / norms(ascent)

    def project(self, adversarial: Tensor, images: Tensor) -> Tensor:
        """Return the nearest point of the ball, then clipped to [0, 1]."""
        delta, radius = adversarial - images, self.radius(images)
        if self.norm == "linf":
            delta = delta.clamp(-radius, radius)
        else:
            delta = delta * (radius / norms(delta)).clamp(max=1.0)
        return (images + delta).clamp(0, 1)

    def reach(self, direction: Tensor, images: Tensor) -> Tensor:
        """Go along a direction until the distance after clipping to [0, 1] is the radius.

        Clipping shortens an l2 step, so the step is lengthened by bisection until the norm is met. Where
        every moving pixel saturates first, the image is as far as it gets. In linf every pixel goes the
        whole radius, along the direction's sign.

        Args:
            direction: (N, C, H, W), of any length.
            images: (N, C, H, W) in [0, 1].
        """
        radius = self.radius(images)
        if self.norm == "linf":
            return (images + radius * direction.sign()).clamp(0, 1)
        step = direction / norms(direction)
        low = torch.zeros_like(radius)
        # At 1 / (smallest moving entry) every moving pixel has reached a bound.
        moving = torch.where(step == 0, torch.inf, step.abs()).flatten(1).amin(1).view(-1, 1, 1, 1)
        high = (1 / moving).clamp(min=0, max=1e6).maximum(radius)
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            short = norms((images + middle * step).clamp(0, 1) - images) < radius
            low, high = torch.where(short, middle, low), torch.where(short, high, middle)
        return (images + low * step).clamp(0, 1)


def norms(delta: Tensor) -> Tensor:
    """Return the l2 norm (N, 1, 1, 1) of each row of (N, C, H, W), at least a tiny floor."""
    return delta.flatten(1).norm(dim=1).clamp(min=FLOOR).view(-1, 1, 1, 1)
