"""A sample of a corpus through the real stages, timed: what each costs per image, and why it differs.

Encoder and network see images in calls of a fixed number, filled up with zeros, one size at a time. So what
an image costs depends on how many of its size its unit has: 256 photos of 256 sizes take 256 calls, 256 of
one size 8. `Work` counts that; times are measured per unit of work, not per image.
"""

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa

from acsr_ray.columns import HEIGHT, QUARANTINED, STATUS, UNIT, WIDTH
from acsr_ray.corpus.containers import ContainerError
from acsr_ray.corpus.facts import process_peak_mib
from acsr_ray.corpus.headers import Size
from acsr_ray.corpus.images import DecodeLimits, encode_png
from acsr_ray.corpus.isolated import DEFAULT_DECODER, DecoderSettings
from acsr_ray.corpus.labelled import image_bytes
from acsr_ray.corpus.ledger import Ledger
from acsr_ray.corpus.sampling import Draw, size_counts
from acsr_ray.corpus.units import ShardChangedError, Unit
from acsr_ray.models.classifier import ENCODER_MICRO_BATCH
from acsr_ray.purification.doubt_stage import PurifyWithDoubt
from acsr_ray.purification.options import PurifyOptions
from acsr_ray.purification.stages import (
    BATCH_PIXELS,
    BATCH_SIZE,
    DecodeImages,
    EncodeImages,
    OnFailure,
    PurifyImages,
    ReadUnits,
    SelectClusters,
    UnitTooLargeError,
    WriteUnits,
)
from acsr_ray.purification.unrolled import micro_batch
from acsr_ray.sparse.admm import MICRO_BATCH, SMALL_PIXELS

READING_SHARE = 0.4
"""Of the time that a sample may take, so much is for reading and decoding."""


@dataclass(frozen=True)
class StageRecipe:
    """How the stages of a job are made; fields as the stages' own arguments."""

    bundle: str
    device: str
    threads: int
    batch_size: int | None
    options: PurifyOptions
    image_column: str
    keep_original: bool = False
    on_failure: OnFailure = "low_band"
    limits: DecodeLimits = field(default_factory=DecodeLimits)
    decoder: DecoderSettings = DEFAULT_DECODER
    doubt: str | None = None
    target: str | None = None


@dataclass(frozen=True)
class UnitTiming:
    """One unit of the sample: read as a whole, some of its rows decoded. Seconds are of the clock."""

    rows: int
    read_s: float
    sampled: int
    decode_s: float
    quarantined: int
    encoded_bytes: int
    """Of all its rows."""
    sizes: Mapping[Size, int]
    """Images of each size among all its rows."""


@dataclass(frozen=True)
class ChunkTiming:
    """Images of one size that went through the model's stages in one batch."""

    size: Size
    rows: int
    encode_s: float
    select_s: float
    purify_s: float


@dataclass(frozen=True)
class Sample:
    """What a sample showed."""

    units: tuple[UnitTiming, ...] = ()
    chunks: tuple[ChunkTiming, ...] = ()
    written_rows: int = 0
    written_s: float = 0.0
    written_bytes: int = 0
    clock_s: float = 0.0
    """Of the model's stages, and their CPU seconds: where the first is larger, others use the machine."""
    cpu_s: float = 0.0
    memory_mib: float = 0.0
    """Most memory of a process, what it shares with others included."""
    unreadable: tuple[str, ...] = ()

    @property
    def images(self) -> int:
        """Images that were decoded, or refused."""
        return sum(unit.sampled for unit in self.units)


def merged(samples: Sequence[Sample]) -> Sample:
    """Return the samples that several processes took at the same time as one."""

    def total(name: str) -> Any:  # noqa: ANN401  (int or float)
        return sum(getattr(sample, name) for sample in samples)

    return Sample(
        tuple(unit for sample in samples for unit in sample.units),
        tuple(chunk for sample in samples for chunk in sample.chunks),
        total("written_rows"),
        total("written_s"),
        total("written_bytes"),
        total("clock_s"),
        total("cpu_s"),
        max((sample.memory_mib for sample in samples), default=0.0),
        tuple(text for sample in samples for text in sample.unreadable),
    )


@dataclass(frozen=True)
class Work:
    """Counts what the model's stages do for images of one size.

    Args:
        device: `cpu` or `cuda`.
        batch_size: of the stages.
        reconstruction: `unrolled` or `cbpdn`.
    """

    device: str
    batch_size: int
    reconstruction: str

    def batch(self, size: Size) -> int:
        """Return the rows per batch, as the stages cut them."""
        return max(1, min(self.batch_size, BATCH_PIXELS // (size[0] * size[1])))

    def encoder_images(self, size: Size, rows: int) -> int:
        """Return the images that the encoder sees, zeros included."""
        return self._filled(size, rows, ENCODER_MICRO_BATCH[self.device])

    def solver_pixels(self, size: Size, rows: int) -> int:
        """Return the pixels that the reconstruction sees, zeros included."""
        return self._filled(size, rows, self._micro(size)) * size[0] * size[1]

    def _micro(self, size: Size) -> int:
        if self.reconstruction == "unrolled":
            return micro_batch(*size, self.device)
        # Descent, on CPUs, takes images one by one.
        small = self.device != "cpu" and size[0] * size[1] <= SMALL_PIXELS
        return MICRO_BATCH[self.device] if small else 1

    def _filled(self, size: Size, rows: int, micro: int) -> int:
        whole, rest = divmod(rows, self.batch(size))
        return micro * (whole * -(-self.batch(size) // micro) + -(-rest // micro))


class SampleTimer:
    """Takes a part of the sample through all stages, as an actor of the job would.

    Args:
        recipe: how the stages are made.
        work: how rows are cut into batches.
    """

    def __init__(self, recipe: StageRecipe, work: Work) -> None:
        self._recipe, self._work = recipe, work
        model: dict[str, Any] = {
            "bundle": recipe.bundle,
            "device": recipe.device,
            "threads": recipe.threads,
            "batch_size": recipe.batch_size or BATCH_SIZE[recipe.device],
            "options": recipe.options,
        }
        purifying = {**model, "on_failure": recipe.on_failure}
        self._read = ReadUnits()
        self._decode = DecodeImages(recipe.image_column, recipe.limits, recipe.decoder)
        # Its child process starts with the first image.
        self._decode.decoder.decode(encode_png(np.zeros((8, 8, 3), np.uint8)))
        self._encode = EncodeImages(**model)
        self._select = SelectClusters(recipe.bundle, recipe.threads, recipe.options, recipe.device)
        self._purify: Callable[[pa.Table], pa.Table] = (
            PurifyImages(**purifying)
            if recipe.doubt is None
            else PurifyWithDoubt(purifying, recipe.doubt, recipe.target)
        )

    def ready(self) -> bool:
        """Return True: whoever gets it knows that the stages are made."""
        return True

    def take(self, draws: Sequence[Draw], seconds: float, most_seconds: float, unit_rows: int) -> Sample:
        """Time a part of the sample.

        Args:
            draws: units and their rows; those that there is no time for are left out.
            seconds: so long the model's stages are run again, so that one hiccup does not decide.
            most_seconds: after which nothing new is begun; at least one unit and one batch are taken.
            unit_rows: rows of the files that are written, to a folder that is removed again.
        """
        began = time.perf_counter()
        units: list[UnitTiming] = []
        tables: list[pa.Table] = []
        unreadable: list[str] = []
        for draw in draws:
            if units and time.perf_counter() - began > READING_SHARE * most_seconds:
                break
            try:
                timing, table = self._unit(draw)
            except (ContainerError, ShardChangedError, UnitTooLargeError, FileNotFoundError) as error:
                unreadable.append(str(error))
                continue
            units.append(timing)
            tables.append(table)
        chunks = list(self._chunks(tables))
        cpu, clock = time.process_time(), time.perf_counter()
        timed, done = self._model(chunks, seconds, began + most_seconds)
        sample = Sample(
            tuple(units),
            tuple(timed),
            clock_s=time.perf_counter() - clock,
            cpu_s=time.process_time() - cpu,
            unreadable=tuple(unreadable),
        )
        sample = replace(sample, **self._written(done, unit_rows))
        return replace(sample, memory_mib=process_peak_mib())

    def _unit(self, draw: Draw) -> tuple[UnitTiming, pa.Table]:
        began = time.perf_counter()
        whole = self._read(pa.table({UNIT: [draw.unit.to_json()]}))
        read_s = time.perf_counter() - began
        cells = list(image_bytes(whole[self._recipe.image_column]))
        # A copy, or the whole unit would stay in memory for a few rows of it.
        rows = pa.array(draw.rows, pa.int64())
        began = time.perf_counter()
        table = self._decode(whole.drop_columns([UNIT]).take(rows).combine_chunks())
        timing = UnitTiming(
            len(cells),
            read_s,
            table.num_rows,
            time.perf_counter() - began,
            table[STATUS].to_pylist().count(QUARANTINED),
            sum(len(cell) for cell in cells if cell is not None),
            size_counts(cells),
        )
        return timing, table

    def _chunks(self, tables: Sequence[pa.Table]) -> Iterator[tuple[Size | None, pa.Table]]:
        """Yield rows of one size, batch by batch, and at last those without pixels."""
        for table in _by_schema(tables):
            groups: dict[Size | None, list[int]] = {}
            sizes = zip(table[HEIGHT].to_pylist(), table[WIDTH].to_pylist(), strict=True)
            for row, (height, width) in enumerate(sizes):
                groups.setdefault(None if height is None else (height, width), []).append(row)
            for size, rows in groups.items():
                step = len(rows) if size is None else self._work.batch(size)
                for start in range(0, len(rows), step):
                    yield size, table.take(pa.array(rows[start : start + step], pa.int64()))

    def _model(
        self, chunks: Sequence[tuple[Size | None, pa.Table]], seconds: float, ends: float
    ) -> tuple[list[ChunkTiming], list[pa.Table]]:
        """Time encoder, selection and reconstruction; return also what came of each chunk."""
        timed: list[ChunkTiming] = []
        done: list[pa.Table] = []
        warm: set[Size | None] = set()
        order = np.random.default_rng(0).permutation(len(chunks)).tolist()
        began = time.perf_counter()
        first = True
        while first or (timed and time.perf_counter() - began < seconds):
            for at in order:
                if time.perf_counter() > ends and timed:
                    return timed, done
                size, table = chunks[at]
                if size not in warm:
                    # Kernels are chosen and memory is taken at the first call of each shape.
                    warm.add(size)
                    self._pass(table)
                result, times = self._pass(table)
                if first:
                    done.append(result)
                if size is not None:
                    timed.append(ChunkTiming(size, table.num_rows, *times))
            first = False
        return timed, done

    def _pass(self, table: pa.Table) -> tuple[pa.Table, list[float]]:
        times = []
        for stage in (self._encode, self._select, self._purify):
            began = time.perf_counter()
            table = stage(table)
            times.append(time.perf_counter() - began)
        return table, times

    def _written(self, tables: Sequence[pa.Table], unit_rows: int) -> dict[str, Any]:
        """Write what was purified as units into a folder that is removed, and say how long and how much."""
        rows, seconds = 0, 0.0
        with tempfile.TemporaryDirectory() as folder:
            recipe = self._recipe
            write = WriteUnits(folder, "sample", recipe.image_column, recipe.keep_original)
            for number, table in enumerate(_by_schema(tables)):
                for first in range(0, table.num_rows, unit_rows):
                    piece = table.slice(first, unit_rows)
                    unit = Unit(folder, f"sample-{number}-{first}", 0, piece.num_rows - 1, "sample")
                    indices = pa.array(np.zeros(piece.num_rows, np.int32))
                    names = pa.DictionaryArray.from_arrays(indices, [unit.to_json()])
                    piece = piece.append_column(UNIT, names)
                    began = time.perf_counter()
                    write(piece)
                    seconds += time.perf_counter() - began
                    rows += piece.num_rows
            storage = Ledger(folder).storage
            size = sum(storage.names("").values())
        return {"written_rows": rows, "written_s": seconds, "written_bytes": size}


def _by_schema(tables: Sequence[pa.Table]) -> list[pa.Table]:
    """Return tables of the same columns as one; shards of a corpus may differ in them."""
    groups: list[list[pa.Table]] = []
    for table in tables:
        same = next((group for group in groups if group[0].schema.equals(table.schema)), None)
        if same is None:
            groups.append([table])
        else:
            same.append(table)
    return [pa.concat_tables(group).combine_chunks() for group in groups]
