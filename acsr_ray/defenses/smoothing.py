"""Smoothing as a defence: median and Gaussian filters.

Source: Xu et al. 2018, Feature Squeezing (median); the Gaussian is the control that any denoiser must beat.
"""

import math

import numpy as np
import torch
from scipy.ndimage import median_filter
from torch import Tensor

from acsr_ray.defenses.base import Defense, Floats, PerImage, check_batch

TRUNCATE = 4.0
"""Radius of the Gaussian kernel in standard deviations."""


class Median(PerImage):
    """Median of a square window, per channel, the edge mirrored.

    Args:
        size: side of the window in pixels; the paper takes 2 and 3.

    Raises:
        ValueError: size below 2.
    """

    def __init__(self, size: int = 3) -> None:
        super().__init__()
        if size < 2:
            raise ValueError(f"size must be >= 2, got {size}")
        self.size = size

    def defend(self, image: Floats, generator: np.random.Generator) -> Floats:
        """Return the filtered image; see `PerImage.defend`."""
        return median_filter(image, size=(self.size, self.size, 1), mode="reflect")


class Gaussian(Defense):
    """Separable Gaussian filter, per channel, the edge mirrored.

    Args:
        sigma: standard deviation in pixels.

    Raises:
        ValueError: sigma not above 0.
    """

    differentiable = True

    def __init__(self, sigma: float = 0.5) -> None:
        super().__init__()
        if not sigma > 0:
            raise ValueError(f"sigma must be > 0, got {sigma}")
        self.sigma = sigma
        radius = int(TRUNCATE * sigma + 0.5)
        weights = [math.exp(-0.5 * (x / sigma) ** 2) for x in range(-radius, radius + 1)]
        self.weights = [weight / sum(weights) for weight in weights]

    def forward(self, images: Tensor) -> Tensor:
        """Return the filtered images; see `Defense.forward`."""
        check_batch(images)
        return self._along(self._along(images, 2), 3).clamp(0, 1)

    def _along(self, images: Tensor, axis: int) -> Tensor:
        # Sums of shifted copies: unlike a library convolution, the same to the bit for any batch.
        length, radius = images.shape[axis], len(self.weights) // 2
        position = torch.arange(-radius, length + radius, device=images.device) % (2 * length)
        padded = images.index_select(
            axis, torch.where(position < length, position, 2 * length - 1 - position)
        )
        parts = [weight * padded.narrow(axis, k, length) for k, weight in enumerate(self.weights)]
        return sum(parts[1:], parts[0])
