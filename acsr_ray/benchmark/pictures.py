"""The benchmark's images: crops of scikit-learn's two photos (CC BY), which are everywhere, or of a shard."""

from functools import lru_cache
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_sample_images
from torch import Tensor

from acsr_ray.columns import IMAGE
from acsr_ray.config import ConfigError
from acsr_ray.corpus.images import DecodeLimits, ImageError, Pixels, decode_image
from acsr_ray.corpus.labelled import image_bytes
from acsr_ray.purification.bands import split_bands
from acsr_ray.sparse.tikhonov import TikhonovConfig

SHARD_ROWS = 1000
"""Rows of a shard that are drawn from."""
TRAIN_SHARE = 0.7

Part = Literal["all", "train", "held out"]
"""Which pixels: all, or one of two sets without a common pixel (the first rows of a shard and the others;
the left of both photos and the right)."""


def _photos(shard: str | None, part: Part) -> list[Pixels]:
    photos = _whole_photos(shard)
    if part == "all":
        return list(photos)
    if shard is not None:
        cut = int(TRAIN_SHARE * len(photos))
        return list(photos[:cut] if part == "train" else photos[cut:])
    cut = int(TRAIN_SHARE * photos[0].shape[1])
    return [photo[:, :cut] if part == "train" else photo[:, cut:] for photo in photos]


@lru_cache(maxsize=1)
def _whole_photos(shard: str | None) -> tuple[Pixels, ...]:
    if shard is None:
        return tuple(load_sample_images().images)
    try:
        batches = pq.ParquetFile(shard).iter_batches(SHARD_ROWS, columns=[IMAGE])
        table = pa.Table.from_batches([next(batches)])
        limits = DecodeLimits()
        return tuple(decode_image(data, limits) for data in image_bytes(table[IMAGE]))
    except (OSError, pa.ArrowInvalid, KeyError, StopIteration, ImageError) as error:
        raise ConfigError(f"cannot read {shard}: {error or 'it has no rows'}") from error


def crops(
    count: int, side: int, seed: int = 0, shard: str | None = None, part: Part = "all"
) -> NDArray[np.uint8]:
    """Return (count, side, side, 3) uint8 crops at random places, of the photos in turns.

    Raises:
        ConfigError: no image of the shard is large enough.
    """
    photos = [photo for photo in _photos(shard, part) if min(photo.shape[:2]) >= side]
    if not photos:
        where = f"{shard} among its first {SHARD_ROWS} rows" if shard else "scikit-learn's photos"
        raise ConfigError(f"no image of {side} pixels in {where} ({part})")
    draws = np.random.default_rng(seed)
    parts = []
    for n in range(count):
        photo = photos[n % len(photos)]
        top, left = (draws.integers(0, length - side + 1) for length in photo.shape[:2])
        parts.append(photo[top : top + side, left : left + side])
    return np.stack(parts)


def images(count: int, side: int, seed: int = 0, shard: str | None = None, part: Part = "all") -> Tensor:
    """Return crops as (count, 3, side, side) float32 in [0, 1]."""
    return torch.from_numpy(crops(count, side, seed, shard, part)).permute(0, 3, 1, 2).float() / 255


def high_bands(count: int, side: int, seed: int = 0, shard: str | None = None, part: Part = "all") -> Tensor:
    """Return the high bands of such crops."""
    return split_bands(images(count, side, seed, shard, part), TikhonovConfig())[1]
