"""Chosen rows of Parquet shards: as pixels to learn a cluster's dictionary from, or as they are stored."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from acsr_ray.columns import IMAGE
from acsr_ray.corpus.containers import ContainerError, open_parquet
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


def read_cells(uri: str, rows: Sequence[int], columns: Sequence[str], most_bytes: float) -> pa.Table:
    """Read chosen rows as they are stored, from the row groups that hold them.

    Args:
        uri: of the shard, which may be hostile.
        rows: ascending, without repetition.
        columns: names of columns; those that it has not are left out.
        most_bytes: that the columns of one row group may have; one at a time is in memory.

    Raises:
        ContainerError: the file is refused, has not so many rows, or a row group is larger.
        OSError: the store does not deliver it.
    """
    parts: list[pa.Table] = []
    with open_parquet(uri) as file:
        columns = [name for name in columns if name in file.schema_arrow.names]
        start = taken = 0
        for group in range(file.metadata.num_row_groups):
            end = start + file.metadata.row_group(group).num_rows
            inside = [row - start for row in rows if start <= row < end]
            start = end
            if not inside:
                continue
            if sum(file.group_bytes(group, name) for name in columns) > most_bytes:
                raise ContainerError("too_large", f"{uri}: row group {group} is too large to be looked into")
            parts.append(file.read_row_group(group, columns=columns).take(pa.array(inside, pa.int64())))
            taken += len(inside)
        if taken != len(rows) or not parts:
            raise ContainerError("unreadable", f"{uri} has {start} rows, not row {max(rows, default=0)}")
    return pa.concat_tables(parts)


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
