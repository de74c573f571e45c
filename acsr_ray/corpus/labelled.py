"""Labelled Parquet shards as arrays in memory, for training and for fitting clusters."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image

from acsr_ray.columns import IMAGE, LABEL
from acsr_ray.corpus.containers import open_parquet
from acsr_ray.corpus.images import DecodeLimits, ImageError, Pixels, decode_image
from acsr_ray.corpus.sources import CorpusError, ImageFolder, find_source

NO_LIMIT = DecodeLimits()


@dataclass(frozen=True)
class LabelledImages:
    """Images of one size with labels and where they came from.

    `pixels` is (N, S, S, 3) uint8, `labels` (N,) int64; image i is row `rows[i]` of `shards[shard_of[i]]`.
    """

    pixels: Pixels
    labels: NDArray[np.int64]
    shards: tuple[str, ...]
    shard_of: NDArray[np.int32]
    rows: NDArray[np.int64]
    class_names: tuple[str, ...]
    num_unreadable: int

    def __len__(self) -> int:
        """Return N."""
        return len(self.labels)


def image_bytes(column: pa.ChunkedArray | pa.Array) -> Iterator[bytes | None]:
    """Yield the encoded images of an image column, a `{bytes, path}` struct or plain binary."""
    chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
    for chunk in chunks:
        # flatten() applies the struct's own validity, field() would not.
        cells = chunk
        if pa.types.is_struct(chunk.type):
            cells = chunk.flatten()[chunk.type.get_field_index("bytes")]
        yield from (cell.as_py() for cell in cells)


def resize_pixels(pixels: Pixels, size: int) -> Pixels:
    """Return (size, size, 3) pixels, bilinear with antialiasing; unchanged when already that size."""
    if pixels.shape[:2] == (size, size):
        return pixels
    return np.asarray(Image.fromarray(pixels).resize((size, size), Image.Resampling.BILINEAR))


def read_labelled(locations: Sequence[str], image_size: int) -> LabelledImages:
    """Read labelled shards into memory, resized to a square; rows that cannot be decoded are counted.

    Args:
        locations: Parquet files or folders of them, with columns `image` and `label`.
        image_size: side of the square in pixels.

    Raises:
        CorpusError: no shard, a missing column, or a null label.
    """
    pixels, labels, shard_of, rows, unreadable = [], [], [], [], 0
    shards = parquet_shards(locations)
    class_names: tuple[str, ...] = ()
    for number, uri in enumerate(shards):
        with open_parquet(uri) as file:
            missing = {IMAGE, LABEL} - set(file.schema_arrow.names)
            if missing:
                raise CorpusError(f"{uri} has no column {', '.join(sorted(missing))}")
            table = file.read(columns=[IMAGE, LABEL])
        class_names = class_names or label_names(table.schema)
        if table[LABEL].null_count:
            raise CorpusError(f"{uri} has rows without a label")
        for row, (data, label) in enumerate(
            zip(image_bytes(table[IMAGE]), table[LABEL].to_pylist(), strict=True)
        ):
            try:
                pixels.append(resize_pixels(decode_image(data, NO_LIMIT), image_size))
            except ImageError:
                unreadable += 1
                continue
            labels.append(label)
            shard_of.append(number)
            rows.append(row)
    if not pixels:
        raise CorpusError(f"no readable labelled image in {', '.join(locations)}")
    num_classes = max(labels) + 1
    return LabelledImages(
        np.stack(pixels),
        np.asarray(labels, np.int64),
        tuple(shards),
        np.asarray(shard_of, np.int32),
        np.asarray(rows, np.int64),
        class_names or numbered_names(num_classes),
        unreadable,
    )


def parquet_shards(locations: Sequence[str]) -> list[str]:
    """Return the URIs of the Parquet shards behind files and folders, in the order given."""
    shards: list[str] = []
    for location in locations:
        source = find_source(location)
        if isinstance(source, ImageFolder):
            raise CorpusError(f"{location} is an image folder; this job reads Parquet shards")
        if source[0].is_tar:
            raise CorpusError(f"{location} is made of tars; this job reads Parquet shards")
        shards += [shard.uri for shard in source]
    return shards


def label_names(schema: pa.Schema) -> tuple[str, ...]:
    """Return the class names that a Hugging Face schema records for `label`, () if it does not.

    Raises:
        CorpusError: metadata that is no such record.
    """
    metadata = (schema.metadata or {}).get(b"huggingface")
    if not metadata:
        return ()
    try:
        features = json.loads(metadata).get("info", {}).get("features", {})
        names = tuple(features.get(LABEL, {}).get("names", ()))
    except (ValueError, RecursionError, AttributeError, TypeError):
        raise CorpusError("the Hugging Face metadata of a shard cannot be read") from None
    if not all(isinstance(name, str) for name in names):
        raise CorpusError("the Hugging Face metadata of a shard has class names that are no text")
    return names


def sample_rows(count: int, most: int) -> NDArray[np.int64]:
    """Return positions of at most so many rows, in order; always the same ones of the same count."""
    return np.sort(np.random.default_rng(0).permutation(count)[:most])


def numbered_names(count: int) -> tuple[str, ...]:
    """Return the names of classes that are only numbered."""
    return tuple(str(label) for label in range(count))
