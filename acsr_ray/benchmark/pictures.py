"""The benchmark's images: crops of scikit-learn's two photos (CC BY), which are everywhere, or of a shard."""

from functools import lru_cache

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_sample_images
from torch import Tensor

from acsr_ray.columns import IMAGE
from acsr_ray.config import ConfigError
from acsr_ray.corpus.images import DecodeLimits, Pixels, decode_image
from acsr_ray.corpus.labelled import image_bytes
from acsr_ray.purification.bands import split_bands
from acsr_ray.sparse.tikhonov import TikhonovConfig

SHARD_ROWS = 1000
"""Rows of a shard that are drawn from."""


@lru_cache(maxsize=1)
def _photos(shard: str | None) -> tuple[Pixels, ...]:
    if shard is None:
        return tuple(load_sample_images().images)
    table = pa.Table.from_batches([next(pq.ParquetFile(shard).iter_batches(SHARD_ROWS, columns=[IMAGE]))])
    limits = DecodeLimits()
    return tuple(decode_image(data, limits) for data in image_bytes(table[IMAGE]))


def crops(count: int, side: int, seed: int = 0, shard: str | None = None) -> NDArray[np.uint8]:
    """Return (count, side, side, 3) uint8 crops at random places, of the photos in turns.

    Raises:
        ConfigError: no image of the shard is large enough.
    """
    photos = [photo for photo in _photos(shard) if min(photo.shape[:2]) >= side]
    if not photos:
        raise ConfigError(f"{shard} has no image of {side} pixels among its first {SHARD_ROWS}")
    draws = np.random.default_rng(seed)
    parts = []
    for n in range(count):
        photo = photos[n % len(photos)]
        top, left = (draws.integers(0, length - side + 1) for length in photo.shape[:2])
        parts.append(photo[top : top + side, left : left + side])
    return np.stack(parts)


def images(count: int, side: int, seed: int = 0, shard: str | None = None) -> Tensor:
    """Return crops as (count, 3, side, side) float32 in [0, 1]."""
    return torch.from_numpy(crops(count, side, seed, shard)).permute(0, 3, 1, 2).float() / 255


def high_bands(count: int, side: int, seed: int = 0, shard: str | None = None) -> Tensor:
    """Return the high bands of such crops."""
    return split_bands(images(count, side, seed, shard), TikhonovConfig())[1]
