"""The images of sampled rows: purified from the output, original from the input shard or `acsr_original`.

The input is hostile and the output may have been touched, so every image is decoded in the isolated decoder.
An original is shown only if it is the one that was purified: the shard is of the recorded version, the row
has the same name, and the image the same size.
"""

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import pyarrow as pa

from acsr_ray.columns import ORIGINAL
from acsr_ray.corpus.containers import ContainerError
from acsr_ray.corpus.images import DecodeLimits, ImageError, Pixels
from acsr_ray.corpus.isolated import DecoderSettings, DecoderStartError, IsolatedDecoder
from acsr_ray.corpus.labelled import image_bytes
from acsr_ray.corpus.ledger import DATA
from acsr_ray.corpus.rows import read_cells
from acsr_ray.corpus.sources import CHAIN, SHARD_SUFFIX, Shard, version_of
from acsr_ray.corpus.units import Unit, UnitPlan, read_unit, shard_units
from acsr_ray.filesystems import open_filesystem
from acsr_ray.purification.stages import image_paths
from acsr_ray.reporting.sampling import UNREADABLE, SampledRow

logger = logging.getLogger(__name__)

MOST_GROUP_BYTES = 2**28
"""Of a row group's images; a report does not read gigabytes to show one picture."""
SIDE = 160
"""Pixels of an image that are shown, around its centre."""
DECODER = DecoderSettings(timeout_s=10.0)
"""Each of these images was decoded before, so none should take long."""
USUAL_PLAN = UnitPlan()
OTHER_IMAGE = "not the image that was purified"


@dataclass(frozen=True)
class Located:
    """Where the corpus is now, if it was moved since the run."""

    recorded: str
    """As the run had it."""
    given: str | None = None
    """Where it is now; None: where it was."""
    plan: UnitPlan = USUAL_PLAN
    """How the run cut it."""

    def of(self, uri: str) -> str:
        """Return where a shard of the corpus is now."""
        if self.given is None:
            return uri
        old, new = self.recorded.removeprefix("file://").rstrip("/"), self.given.rstrip("/")
        rest = uri.removeprefix("file://")
        return new + rest[len(old) :] if old and rest.startswith(old) else uri


@dataclass(frozen=True)
class Picture:
    """One row's image after purification and, where it could be had, before."""

    row: SampledRow
    after: Pixels
    """(h, w, 3) uint8, at most SIDE by SIDE from the centre."""
    before: Pixels | None
    """The same part of the original."""
    height: int
    """Of the whole image, in pixels."""
    width: int
    missing: str = ""
    """Why there is no original."""

    @property
    def is_part(self) -> bool:
        """Whether not all of it is shown."""
        return (self.height, self.width) != self.after.shape[:2]


Cell = tuple[bytes | None, str]
"""An encoded image, or why there is none."""


def take_pictures(
    output: str,
    image_column: str,
    rows: Sequence[SampledRow],
    source: Located,
    limits: DecodeLimits,
    with_originals: frozenset[SampledRow],
) -> dict[SampledRow, Picture]:
    """Read and decode the images of rows; rows whose purified image cannot be read are left out.

    Args:
        output: root of the output.
        image_column: name of the column in input and output.
        rows: of few units.
        source: where the input is.
        limits: on what is decoded, as in the run.
        with_originals: rows whose original is wanted too.
    """
    pictures: dict[SampledRow, Picture] = {}
    with IsolatedDecoder(limits, DECODER) as decoder:
        ordered = sorted(set(rows), key=lambda row: (row.place.receipt.name, row.position))
        for _, group in groupby(ordered, key=lambda row: row.place.receipt.name):
            own = list(group)
            try:
                after, kept = _purified(output, image_column, own)
                before = _originals(own, kept, image_column, source, with_originals)
                taken = _decode(decoder, own, after, before)
                pictures |= {picture.row: picture for picture in taken}
            except DecoderStartError as error:
                logger.warning("no pictures: %s", error)
                return pictures
            except UNREADABLE as error:
                logger.warning("pictures of %s are left out: %s", own[0].place.receipt.name, error)
    return pictures


def _purified(
    output: str, image_column: str, rows: Sequence[SampledRow]
) -> tuple[list[bytes | None], list[bytes | None]]:
    """Return the purified images and the kept originals, Nones where they were not kept."""
    uri = f"{output}/{DATA}/{rows[0].place.receipt.name}"
    table = read_cells(uri, [row.position for row in rows], (image_column, ORIGINAL), MOST_GROUP_BYTES)
    kept: list[bytes | None] = [None] * len(rows)
    if ORIGINAL in table.column_names:
        kept = list(image_bytes(table[ORIGINAL]))
    return list(image_bytes(table[image_column])), kept


def _originals(
    rows: Sequence[SampledRow],
    kept: Sequence[bytes | None],
    image_column: str,
    source: Located,
    wanted: frozenset[SampledRow],
) -> list[Cell]:
    cells: list[Cell] = [(data, "") for data in kept]
    open_rows = [at for at, row in enumerate(rows) if row in wanted and kept[at] is None]
    if open_rows:
        asked = [rows[at] for at in open_rows]
        try:
            found = list(_from_input(asked, image_column, source))
        except ContainerError as error:
            found = [(None, f"the shard is refused ({error.code})")] * len(asked)
        except (*UNREADABLE, ImageError) as error:
            logger.info("originals of %s: %s", asked[0].place.entry.uri, error)
            found = [(None, "the input is no longer there, or cannot be read")] * len(asked)
        for at, cell in zip(open_rows, found, strict=True):
            cells[at] = cell
    return cells


def _from_input(rows: Sequence[SampledRow], image_column: str, source: Located) -> Iterator[Cell]:
    entry = rows[0].place.entry
    uri = source.of(entry.uri)
    # Files of a folder have contents of their own, their shard has none.
    if not entry.content and not _is_parquet(uri):
        yield from (_file(source.given or source.recorded, row.path) for row in rows)
        return
    if source.given is None and entry.version and version_of(uri) != entry.version:
        yield from [(None, "the shard has changed since")] * len(rows)
        return
    numbers = [row.number for row in rows]
    if _is_parquet(uri):
        cells = read_cells(uri, numbers, (image_column,), MOST_GROUP_BYTES)[image_column]
    else:
        version = entry.version if source.given is None else ""
        shard = Shard(uri, rows[0].place.relative, version)
        cells = _rows_of_units(shard_units(shard, source.plan, entry.content), numbers, image_column)
    for row, data, path in zip(rows, image_bytes(cells), image_paths(cells), strict=True):
        yield (data, "") if path == row.path else (None, OTHER_IMAGE)


def _rows_of_units(units: Iterable[Unit], numbers: Sequence[int], image_column: str) -> pa.ChunkedArray:
    """Return chosen rows of a shard, ascending, reading only the units that hold them."""
    parts: list[pa.Array] = []
    for unit in units:
        inside = [number - unit.first for number in numbers if unit.first <= number <= unit.last]
        if inside:
            parts += read_unit(unit)[image_column].take(pa.array(inside, pa.int64())).chunks
    return pa.chunked_array(parts)


def _is_parquet(uri: str) -> bool:
    return uri.endswith(SHARD_SUFFIX)


def _file(base: str, path: str | None) -> Cell:
    """Return a file of an image folder; its path comes from the output, so it must stay inside."""
    if not path or ".." in path.split("/") or path.startswith("/") or CHAIN in path or "\\" in path:
        return None, OTHER_IMAGE
    try:
        fs, name = open_filesystem(f"{base.rstrip('/')}/{path}")
        with fs.open(name, "rb") as file:
            return file.read(MOST_GROUP_BYTES), ""
    except OSError:
        return None, "the file is no longer there, or cannot be read"


def _decode(
    decoder: IsolatedDecoder,
    rows: Sequence[SampledRow],
    after: Sequence[bytes | None],
    before: Sequence[Cell],
) -> Iterator[Picture]:
    # An original that is not there is not an image that is refused.
    there = [at for at, (data, _) in enumerate(before) if data is not None]
    images = [*after, *(before[at][0] for at in there)]
    # Cut one by one: whole images may be large, and there are several.
    seen = [
        image if isinstance(image, ImageError) else (_centre(image), image.shape)
        for image in decoder.decode_all(images)
    ]
    originals = dict(zip(there, seen[len(rows) :], strict=True))
    for at, (row, purified) in enumerate(zip(rows, seen, strict=False)):
        if isinstance(purified, ImageError):
            logger.warning("%s row %d is no picture: %s", row.place.receipt.name, row.position, purified)
            continue
        original, missing = originals.get(at), before[at][1]
        shown = None
        if isinstance(original, ImageError):
            missing = f"the original is refused now ({original.reason})"
        elif original is not None and original[1] != purified[1]:
            missing = OTHER_IMAGE
        elif original is not None:
            shown = original[0]
        height, width, _ = purified[1]
        yield Picture(row, purified[0], shown, height, width, missing)


def _centre(pixels: Pixels) -> Pixels:
    height, width = pixels.shape[:2]
    top, left = max(0, (height - SIDE) // 2), max(0, (width - SIDE) // 2)
    return np.ascontiguousarray(pixels[top : top + SIDE, left : left + SIDE])
