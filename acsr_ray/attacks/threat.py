"""Threat models: the set an adversarial image must stay in, as a value.

Perturbations are per image; `epsilon` is on the [0, 1] pixel scale (`8 / 255`). Images are (N, C, H, W).
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Norm = Literal["linf", "l2"]
FLOOR = 1e-12


@dataclass(frozen=True)
class ThreatModel:
    """All images within `epsilon` of the original in a norm, and within [0, 1].

    Raises:
        ValueError: unknown norm or negative epsilon.
    """

    norm: Norm
    epsilon: float

    def __post_init__(self) -> None:
        if self.norm not in ("linf", "l2"):
            raise ValueError(f"norm must be linf or l2, got {self.norm!r}")
        if self.epsilon < 0:
            raise ValueError(f"epsilon must be >= 0, got {self.epsilon}")

    def random_start(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Return a random point of the set: uniform in the cube, or in a random direction of the ball."""
        noise = torch.rand(images.shape, generator=generator).to(images) * 2 - 1
        if self.norm == "l2":
            radius = torch.rand((len(images), 1, 1, 1), generator=generator).to(images)
            noise = noise / _norms(noise) * radius
        return self.project(images + self.epsilon * noise, images)

    def direction(self, gradient: Tensor) -> Tensor:
        """Return the steepest-ascent direction of unit length in the norm."""
        return gradient.sign() if self.norm == "linf" else gradient / _norms(gradient)

    def project(self, adversarial: Tensor, images: Tensor) -> Tensor:
        """Return the nearest point of the ball, then clipped to [0, 1]."""
        delta = adversarial - images
        if self.norm == "linf":
            delta = delta.clamp(-self.epsilon, self.epsilon)
        else:
            delta = delta * (self.epsilon / _norms(delta)).clamp(max=1.0)
        return (images + delta).clamp(0, 1)


def _norms(delta: Tensor) -> Tensor:
    return delta.flatten(1).norm(dim=1).clamp(min=FLOOR).view(-1, 1, 1, 1)
