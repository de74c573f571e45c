"""Labelled images as Parquet shards in the Hugging Face layout."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from acsr_ray.artifacts import atomic_write
from acsr_ray.columns import IMAGE, LABEL
from acsr_ray.corpus.images import Pixels, encode_png
from acsr_ray.corpus.schema import IMAGE_TYPE, image_features


def write_shard(
    path: Path,
    pixels: Pixels,
    labels: NDArray[np.int64],
    image_ids: Sequence[str],
    class_names: Sequence[str],
) -> None:
    """Write one shard with columns image_id, image (lossless PNG) and label.

    Args:
        path: the `.parquet` file.
        pixels: (N, H, W, 3) uint8.
        labels: (N,) class of each image.
        image_ids: key of each image.
        class_names: recorded for `label` where Hugging Face readers look for them.
    """
    encoded = [encode_png(image) for image in pixels]
    _write_encoded(path, encoded, labels.tolist(), image_ids, class_names)


class ShardWriter:
    """Writes images one by one as the shards `SPLIT-00000-of-00007.parquet` of a folder.

    At most one shard's encoded images are in memory. The number of shards is only known at the end, so the
    shards get their names in `close`.
    """

    def __init__(
        self, folder: Path, split: str, class_names: Sequence[str], *, max_rows: int, max_bytes: int
    ) -> None:
        """Start a split.

        Args:
            folder: made when the first shard is written.
            split: first part of the shards' names.
            class_names: recorded for `label`.
            max_rows: most rows of a shard.
            max_bytes: most bytes of a shard's PNGs, unless one image alone has more.
        """
        self._folder, self._split, self._class_names = folder, split, tuple(class_names)
        self._max_rows, self._max_bytes = max_rows, max_bytes
        self._written: list[Path] = []
        self._encoded: list[bytes] = []
        self._labels: list[int] = []
        self._image_ids: list[str] = []
        self._size = 0

    def add(self, pixels: Pixels, label: int, image_id: str) -> None:
        """Append one image, (H, W, 3) uint8."""
        data = encode_png(pixels)
        full = len(self._encoded) >= self._max_rows or self._size + len(data) > self._max_bytes
        if self._encoded and full:
            self._flush()
        self._encoded.append(data)
        self._labels.append(label)
        self._image_ids.append(image_id)
        self._size += len(data)

    def close(self) -> list[Path]:
        """Write what is left, name all shards and return their paths."""
        if self._encoded:
            self._flush()
        total = len(self._written)
        named = [self._folder / f"{self._split}-{n:05d}-of-{total:05d}.parquet" for n in range(total)]
        for staging, path in zip(self._written, named, strict=True):
            staging.replace(path)
        return named

    def _flush(self) -> None:
        path = self._folder / f".{self._split}-{len(self._written):05d}.parquet"
        _write_encoded(path, self._encoded, self._labels, self._image_ids, self._class_names)
        self._written.append(path)
        self._encoded, self._labels, self._image_ids, self._size = [], [], [], 0


def _write_encoded(
    path: Path,
    encoded: Sequence[bytes],
    labels: Sequence[int],
    image_ids: Sequence[str],
    class_names: Sequence[str],
) -> None:
    cells = [{"bytes": data, "path": f"{key}.png"} for data, key in zip(encoded, image_ids, strict=True)]
    table = pa.table(
        {
            "image_id": pa.array(image_ids, pa.string()),
            IMAGE: pa.array(cells, IMAGE_TYPE),
            LABEL: pa.array(labels, pa.int64()),
        }
    ).replace_schema_metadata(image_features(("image_id",), class_names))
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="none", row_group_size=500)
    atomic_write(path, buffer.getvalue())
