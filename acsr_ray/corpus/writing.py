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
    cells = [
        {"bytes": encode_png(image), "path": f"{key}.png"}
        for image, key in zip(pixels, image_ids, strict=True)
    ]
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
