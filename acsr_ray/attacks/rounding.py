"""8 bits: what an attack is worth once its images are stored."""

import math

from torch import Tensor

from acsr_ray.attacks.threat import Norm

LEVELS = 255


def round_to_pixels(images: Tensor) -> Tensor:
    """Return the nearest images that 8 bits can store, still as floats in [0, 1]."""
    return (images * LEVELS).round().clamp(0, LEVELS) / LEVELS


def rounding_slack(norm: Norm, shape: tuple[int, ...]) -> float:
    """Return by how much rounding can lengthen a perturbation, on the [0, 1] pixel scale.

    A pixel moves by at most half a level: 0.5 / 255 in linf, and sqrt(C H W) as much in l2 (0.109 for CIFAR;
    about 0.063 in quadrature when the rounding errors are uniform). For `relative_l2` divide by ||x||.

    Args:
        norm: the norm.
        shape: of one image, (C, H, W).
    """
    half = 0.5 / LEVELS
    return half if norm == "linf" else half * math.sqrt(math.prod(shape))
