"""The stages of the purification pipeline as plain callables from table to table; no Ray here.

One table is one unit. Every stage keeps rows and their order and adds columns; a row that was refused stays,
with a null image and a reason. Pixels travel as raw bytes with height and width. Docstrings name the columns
of `acsr_ray.columns` that a stage reads and adds.
"""

import json
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from acsr_ray.clustering.selection import Selection
from acsr_ray.columns import (
    CLASS,
    CLUSTER,
    DISTANCE,
    DOUBT,
    HEIGHT,
    INDEX,
    LATENT,
    ORIGINAL,
    OUTCOME,
    PASSED_THROUGH,
    PIXELS,
    PURIFIED,
    QUARANTINED,
    REASON,
    RESIDUAL,
    STATUS,
    TRAVELLING,
    UNIT,
    WIDTH,
)
from acsr_ray.corpus.facts import outcome_facts, with_facts
from acsr_ray.corpus.images import (
    DecodeLimits,
    ImageError,
    Pixels,
    encode_png,
    to_unit_range,
)
from acsr_ray.corpus.isolated import DEFAULT_DECODER, DecoderSettings, IsolatedDecoder
from acsr_ray.corpus.labelled import image_bytes
from acsr_ray.corpus.ledger import Ledger, counts
from acsr_ray.corpus.schema import extend_features
from acsr_ray.corpus.sources import CorpusError
from acsr_ray.corpus.units import Unit, read_unit
from acsr_ray.purification.options import PurifyOptions
from acsr_ray.purification.purifier import Purifier
from acsr_ray.storage import patiently

OnFailure = Literal["low_band", "pass_through"]

BATCH_SIZE = {"cpu": 64, "cuda": 1024}
"""Rows per call where nothing else is asked for. On a GPU, whole units: calls are filled up to micro-batches
of hundreds."""
BATCH_PIXELS = 2**24
"""Most pixels per call, whatever the batch size: a memory limit for large images."""


UNIT_BYTES = 2**29
"""Most bytes of a unit's pixels. Units are sized by their files, and an image of one colour may be small as a
file and very large as pixels."""


class UnitTooLargeError(CorpusError):
    """A unit whose pixels are too many to be held at once."""


class ReadUnits:
    """Read each unit's rows.  Reads UNIT.  Replaces the table by the shard's columns plus UNIT."""

    def __call__(self, units: pa.Table) -> pa.Table:
        """Read the unit named in the only row of the table."""
        (text,) = units[UNIT].to_pylist()
        unit = Unit.from_json(text)
        table = patiently(lambda: read_unit(unit), f"reading {unit.uri}")
        # One value in a dictionary: the unit reaches the writer without a copy per row.
        indices = pa.array(np.zeros(table.num_rows, np.int32))
        return table.append_column(UNIT, pa.DictionaryArray.from_arrays(indices, [text]))


class DecodeImages:
    """Decode images to RGB, in a child process that an image may crash.

    Reads the image column.  Adds PIXELS, HEIGHT, WIDTH, STATUS, REASON.

    Args:
        image_column: name of the image column.
        limits: what is refused before it is decoded.
        decoder: bounds on the child process.
        seconds: after which a unit of several rows is given back, since images that hang add up.
    """

    def __init__(
        self,
        image_column: str,
        limits: DecodeLimits,
        decoder: DecoderSettings = DEFAULT_DECODER,
        seconds: float = math.inf,
    ) -> None:
        self.image_column = image_column
        self.seconds = seconds
        self.decoder = IsolatedDecoder(limits, decoder)

    def __call__(self, table: pa.Table) -> pa.Table:
        """Decode every row; a row that cannot be decoded gets a reason instead of pixels.

        Raises:
            UnitTooLargeError: the unit's pixels are more than a worker should hold; its halves may not be.
        """
        rows, size, began = [], 0, time.monotonic()
        for image in self.decoder.decode_all(image_bytes(table[self.image_column])):
            rows.append(_decoded(image))
            size += 0 if isinstance(image, ImageError) else image.nbytes
            if size > UNIT_BYTES and table.num_rows > 1:
                raise UnitTooLargeError(f"{table.num_rows} rows are more than {UNIT_BYTES // 2**20} MiB")
            if time.monotonic() - began > self.seconds and len(rows) < table.num_rows:
                raise UnitTooLargeError(f"{len(rows)} of {table.num_rows} rows took {self.seconds:g} s")
        for name, kind, values in zip(
            (PIXELS, HEIGHT, WIDTH, STATUS, REASON),
            (pa.large_binary(), pa.int32(), pa.int32(), pa.string(), pa.string()),
            zip(*rows, strict=True),
            strict=True,
        ):
            table = table.append_column(name, pa.array(values, kind))
        return table


def _decoded(image: Pixels | ImageError) -> tuple[Any, ...]:
    if isinstance(image, ImageError):
        return None, None, None, QUARANTINED, image.reason
    return image.tobytes(), *image.shape[:2], PURIFIED, None


class EncodeImages:
    """Compute robust latents.  Reads PIXELS, HEIGHT, WIDTH.  Adds LATENT.

    Args:
        bundle: directory or name.
        device: `cpu` or `cuda`.
        batch_size: most rows per call of the encoder; decides memory, never pixels.
        options: of the purifier.
    """

    def __init__(
        self, bundle: str, device: str, batch_size: int, threads: int, options: PurifyOptions | None = None
    ) -> None:
        torch.set_num_threads(threads)
        self.purifier = Purifier.load(bundle, device, options)
        self.batch_size = batch_size

    @torch.inference_mode()
    def __call__(self, table: pa.Table) -> pa.Table:
        """Add the latent of every decoded row, null elsewhere."""
        parts, order = [], []
        for rows, images in batches_by_size(table, self.batch_size):
            parts.append(self.purifier.latents(images.to(self.purifier.device)).cpu().numpy())
            order += rows
        position: list[int | None] = [None] * table.num_rows
        for place, row in enumerate(order):
            position[row] = place
        values = np.concatenate(parts) if parts else np.zeros((0, 1), np.float32)
        ends = np.arange(len(values) + 1, dtype=np.int32) * values.shape[1]
        latents = pa.ListArray.from_arrays(pa.array(ends), pa.array(values.reshape(-1)))
        return table.append_column(LATENT, latents.take(pa.array(position, pa.int64())))


class SelectClusters:
    """Choose each image's cluster.  Reads LATENT.  Adds INDEX (of the k best), CLASS, CLUSTER, DISTANCE."""

    def __init__(
        self, bundle: str, threads: int, options: PurifyOptions | None = None, device: str = "cpu"
    ) -> None:
        torch.set_num_threads(threads)
        self.purifier = Purifier.load(bundle, device, options)

    @torch.inference_mode()
    def __call__(self, table: pa.Table) -> pa.Table:
        """Add the chosen cluster of every row that has a latent, null elsewhere."""
        rows = np.flatnonzero(table[LATENT].is_valid().to_numpy())
        latents = table[LATENT].take(rows).combine_chunks().flatten().to_numpy()
        count = len(self.purifier.gaussians.mean[0])
        chosen = self.purifier.select(torch.tensor(latents).view(-1, count))
        gaussians = self.purifier.gaussians
        for name, kind, values in (
            (INDEX, pa.list_(pa.int32()), chosen.candidates),
            (CLASS, pa.int32(), gaussians.class_id[chosen.index]),
            (CLUSTER, pa.int32(), gaussians.cluster_id[chosen.index]),
            (DISTANCE, pa.float32(), chosen.distance),
        ):
            column = _scatter(table.num_rows, rows, values.tolist())
            table = table.append_column(name, pa.array(column, kind))
        return table


class PurifyImages:
    """Reconstruct with the chosen dictionary.

    Reads PIXELS, INDEX, DISTANCE.  Replaces PIXELS, adds RESIDUAL.

    Args:
        bundle: directory or name.
        device: `cpu` or `cuda`.
        batch_size: most rows per call; decides memory, never pixels.
        options: of the purifier.
        on_failure: what becomes of a row that the solver has no finite result for: its low band, or itself.
    """

    def __init__(
        self,
        bundle: str,
        device: str,
        batch_size: int,
        threads: int,
        options: PurifyOptions | None = None,
        on_failure: OnFailure = "low_band",
    ) -> None:
        torch.set_num_threads(threads)
        self.purifier = Purifier.load(bundle, device, options)
        self.batch_size = batch_size
        self.on_failure = on_failure

    @torch.inference_mode()
    def __call__(self, table: pa.Table) -> pa.Table:
        """Purify every decoded row; where the solver fails, the low band stands and the reason says so."""
        pixels: list[bytes | None] = [None] * table.num_rows
        residual: list[float | None] = [None] * table.num_rows
        reasons, statuses = table[REASON].to_pylist(), table[STATUS].to_pylist()
        indices, distances = table[INDEX].to_pylist(), table[DISTANCE].to_pylist()
        before = table[PIXELS].to_pylist() if self.on_failure == "pass_through" else []
        for rows, images in batches_by_size(table, self.batch_size):
            nearest = torch.tensor([indices[row] for row in rows]).to(self.purifier.device)
            distance = torch.tensor([distances[row] for row in rows]).to(self.purifier.device)
            selection = Selection(nearest[:, 0], distance, nearest)
            outcome = self.purifier.reconstruct(images.to(self.purifier.device), selection)
            if not torch.isfinite(outcome.images).all():
                raise ArithmeticError("an image's low band is not finite")
            # Where they were computed: from a GPU, a quarter of the bytes.
            levels = (outcome.images * 255).round().to(torch.uint8)
            purified = levels.permute(0, 2, 3, 1).contiguous().cpu().numpy()
            columns = (rows, purified, outcome.residual.tolist(), outcome.solved.tolist())
            for row, image, change, solved in zip(*columns, strict=True):
                pixels[row], residual[row] = image.tobytes(), change
                if not solved:
                    reasons[row] = "solver_fallback"
                    if self.on_failure == "pass_through":
                        pixels[row], residual[row], statuses[row] = before[row], 0.0, PASSED_THROUGH
        table = _replace(table, PIXELS, pa.array(pixels, pa.large_binary()))
        table = _replace(table, STATUS, pa.array(statuses, pa.string()))
        known = [
            distance is not None and math.isfinite(distance) and status != QUARANTINED
            for distance, status in zip(distances, statuses, strict=True)
        ]
        for name in (CLASS, CLUSTER, DISTANCE):
            # A distance that is not finite chose nothing, and a row that is refused later keeps nothing.
            column = table[name]
            kept = pa.array([row if there else None for row, there in enumerate(known)], pa.int64())
            table = _replace(table, name, column.take(kept))
        table = _replace(table, REASON, pa.array(reasons, pa.string()))
        return table.append_column(RESIDUAL, pa.array(residual, pa.float32()))


class WriteUnits:
    """Encode PNG and publish the unit.  Reads everything.  Gives a row: name, receipt and FACTS as JSON.

    Args:
        output: the output folder.
        fingerprint: digest of the run's result-affecting settings.
        image_column: name of the image column.
        keep_original: also write the original image as `acsr_original`.
        parked: shards with superseded files, whose new units stay hidden until the snapshot is committed.
        lease: number of the run's lease; 0 publishes without one.
    """

    def __init__(
        self,
        output: str,
        fingerprint: str,
        image_column: str,
        keep_original: bool,
        parked: frozenset[str] = frozenset(),
        lease: int = 0,
    ) -> None:
        self.lease = lease
        self.ledger = Ledger(output)
        self.fingerprint = fingerprint
        self.image_column = image_column
        self.keep_original = keep_original
        self.parked = parked

    def __call__(self, table: pa.Table) -> pa.Table:
        """Publish the table's unit."""
        (text,) = table[UNIT].unique().to_pylist()
        unit = Unit.from_json(text)
        if table.num_rows != unit.num_rows:
            raise RuntimeError(f"{table.num_rows} rows reached the writer of {unit.num_rows} of {unit.uri}")
        name = unit.output_name(self.fingerprint)
        original = table[self.image_column]
        encoded = [
            None if pixels is None else encode_png(_array(pixels, height, width))
            for pixels, height, width in _pixel_rows(table)
        ]
        passed = [status == PASSED_THROUGH for status in table[STATUS].to_pylist()]
        if any(passed):
            # What was not touched is not encoded again.
            whole = zip(encoded, image_bytes(original), passed, strict=True)
            encoded = [data if through else new for new, data, through in whole]
        quarantine = self._quarantine(table, unit)
        # Last, however early it was added.
        ours = [*OUTCOME.names, *({DOUBT} & set(table.column_names))]
        outcome = table.select(ours)
        purified = table.drop_columns([*TRAVELLING, *ours])
        purified = _replace(purified, self.image_column, replace_bytes(original, encoded))
        for field in outcome.schema:
            purified = purified.append_column(field, outcome[field.name])
        if self.keep_original:
            kept = pa.array([i if e is not None else None for i, e in enumerate(encoded)], pa.int64())
            purified = purified.append_column(ORIGINAL, original.take(kept))
        schema = extend_features(purified.schema, {ORIGINAL: self.image_column})
        purified = purified.replace_schema_metadata(schema.metadata)
        receipt = self.ledger.publish(
            name,
            purified,
            quarantine,
            parked=unit.relative in self.parked,
            first=unit.first,
            lease=self.lease,
        )
        if (receipt.statuses, receipt.reasons) != counts(outcome):
            # An earlier attempt was first, and had refused other rows: what it published is what counts.
            outcome = self.ledger.outcome(name)
        told = {"name": receipt.name, "rows": receipt.rows, "receipt": json.dumps(asdict(receipt))}
        return with_facts(pa.table({key: [value] for key, value in told.items()}), outcome_facts(outcome))

    def _quarantine(self, table: pa.Table, unit: Unit) -> pa.Table:
        rows = [i for i, status in enumerate(table[STATUS].to_pylist()) if status == QUARANTINED]
        data = list(image_bytes(table[self.image_column].take(pa.array(rows, pa.int64()))))
        paths = image_paths(table[self.image_column])
        columns = {
            "shard": pa.array([unit.uri] * len(rows), pa.string()),
            "row": pa.array([unit.first + row for row in rows], pa.int64()),
            "path": pa.array([paths[row] for row in rows], pa.string()),
            "reason": table[REASON].take(pa.array(rows, pa.int64())),
            "bytes": pa.array(data, pa.large_binary()),
        }
        return pa.table(columns)


def image_paths(column: pa.ChunkedArray) -> list[str | None]:
    """Return the paths of a `{bytes, path}` column, Nones where there are none."""
    kind = column.type
    if not pa.types.is_struct(kind) or kind.get_field_index("path") < 0:
        return [None] * len(column)
    paths: list[str | None] = column.combine_chunks().field("path").to_pylist()
    return paths


def batches_by_size(table: pa.Table, batch_size: int) -> Iterator[tuple[list[int], torch.Tensor]]:
    """Yield (row numbers, images (n, 3, H, W) in [0, 1]) of decoded rows, grouped by size, in order."""
    groups: dict[tuple[int, int], list[tuple[int, bytes]]] = {}
    for row, (pixels, height, width) in enumerate(_pixel_rows(table)):
        if pixels is not None:
            groups.setdefault((height, width), []).append((row, pixels))
    for (height, width), members in groups.items():
        step = rows_per_call(height, width, batch_size)
        for start in range(0, len(members), step):
            part = members[start : start + step]
            stacked = np.stack([_array(pixels, height, width) for _, pixels in part])
            yield [row for row, _ in part], torch.from_numpy(to_unit_range(stacked))


def rows_per_call(height: int, width: int, batch_size: int) -> int:
    """Return the most images of a size that `batches_by_size` puts in one batch."""
    return max(1, min(batch_size, BATCH_PIXELS // (height * width)))


def replace_bytes(column: pa.ChunkedArray, encoded: Sequence[bytes | None]) -> pa.Array:
    """Return an image column of the same type with new bytes; a None makes the whole cell null."""
    if not pa.types.is_struct(column.type):
        return pa.array(encoded, column.type)
    whole = column.combine_chunks()
    fields = [field.with_nullable(True) for field in column.type]
    values = [
        pa.array(encoded, field.type) if field.name == "bytes" else child
        for field, child in zip(fields, whole.flatten(), strict=True)
    ]
    absent = pa.array([data is None for data in encoded], pa.bool_())
    return pa.StructArray.from_arrays(values, fields=fields, mask=absent)


def _pixel_rows(table: pa.Table) -> Iterable[tuple[bytes | None, int, int]]:
    columns = (table[name].to_pylist() for name in (PIXELS, HEIGHT, WIDTH))
    return zip(*columns, strict=True)


def _array(pixels: bytes, height: int, width: int) -> NDArray[np.uint8]:
    return np.frombuffer(pixels, np.uint8).reshape(height, width, 3)


def _scatter(length: int, rows: NDArray[Any], values: Sequence[Any]) -> list[Any]:
    column: list[Any] = [None] * length
    for row, value in zip(rows.tolist(), values, strict=True):
        column[row] = value
    return column


def _replace(table: pa.Table, name: str, values: pa.Array) -> pa.Table:
    # The old field keeps the column's own metadata; a refused image may be null even where none was.
    field = pa.field(name, values.type, nullable=True, metadata=table.schema.field(name).metadata)
    return table.set_column(table.column_names.index(name), field, values)
