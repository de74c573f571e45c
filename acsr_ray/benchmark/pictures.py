"""The benchmark's images: crops of scikit-learn's two photos (CC BY), so that it runs anywhere."""

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_sample_images
from torch import Tensor

from acsr_ray.purification.bands import split_bands
from acsr_ray.sparse.tikhonov import TikhonovConfig


def crops(count: int, side: int, seed: int = 0) -> NDArray[np.uint8]:
    """Return (count, side, side, 3) uint8 crops at random places, of either photo in turns."""
    photos = load_sample_images().images
    draws = np.random.default_rng(seed)
    parts = []
    for n in range(count):
        photo = photos[n % len(photos)]
        top, left = (draws.integers(0, length - side + 1) for length in photo.shape[:2])
        parts.append(photo[top : top + side, left : left + side])
    return np.stack(parts)


def images(count: int, side: int, seed: int = 0) -> Tensor:
    """Return crops as (count, 3, side, side) float32 in [0, 1]."""
    return torch.from_numpy(crops(count, side, seed)).permute(0, 3, 1, 2).float() / 255


def high_bands(count: int, side: int, seed: int = 0) -> Tensor:
    """Return the high bands of such crops."""
    return split_bands(images(count, side, seed), TikhonovConfig())[1]
