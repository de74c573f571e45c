"""Chosen rows of Parquet shards as pixels at native size: what a cluster's dictionary is learnt from."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from acsr_ray.columns import IMAGE
from acsr_ray.corpus.containers import open_parquet
from acsr_ray.corpus.images import DecodeLimits, Pixels, decode_image
from acsr_ray.corpus.labelled import image_bytes


def read_rows(rows: Sequence[tuple[str, int]], limits: DecodeLimits) -> list[Pixels]:
    """Decode chosen rows.

    Args:
        rows: (shard URI, row) of each image; all must be decodable.
        limits: as in purification.

    Returns:
        (H, W, 3) uint8 arrays in the order asked for.

    Raises:
        ImageError: a row that cannot be decoded.
    """
    wanted: dict[str, list[int]] = {}
    for position, (uri, _) in enumerate(rows):
        wanted.setdefault(uri, []).append(position)
    images: dict[int, Pixels] = {}
    for uri, positions in wanted.items():
        with open_parquet(uri) as file:
            column = file.read(columns=[IMAGE])[IMAGE]
        chosen = column.take(pa.array([rows[position][1] for position in positions]))
        for position, data in zip(positions, image_bytes(chosen), strict=True):
            images[position] = decode_image(data, limits)
    return [images[position] for position in range(len(rows))]


def crop_alike(images: Sequence[Pixels], side: int, smallest: int, seed: int) -> Pixels:
    """Cut one random square of a common side from every image that is large enough.

    Args:
        images: (H, W, 3) arrays of any sizes.
        side: the side aimed at; the images' median side when that is smaller.
        smallest: images with a shorter side than this, or than the side chosen, are left out.
        seed: fixes the positions.

    Returns:
        (N, S, S, 3) uint8, S at most `side`.

    Raises:
        ValueError: no image has sides of `smallest`.
    """
    large = [image for image in images if min(image.shape[:2]) >= smallest]
    if not large:
        raise ValueError(f"no image has sides of at least {smallest} pixels")
    # Half of the images set the side, so that one thumbnail does not shrink the crops of a whole cluster.
    common = min(side, int(np.median([min(image.shape[:2]) for image in large])))
    large = [image for image in large if min(image.shape[:2]) >= common]
    generator = np.random.default_rng(seed)
    crops: list[NDArray[np.uint8]] = []
    for image in large:
        top = int(generator.integers(image.shape[0] - common + 1))
        left = int(generator.integers(image.shape[1] - common + 1))
        crops.append(image[top : top + common, left : left + common])
    return np.stack(crops)
