"""Units of work: a run of rows of one shard, planned from Parquet footers or tar headers alone.

A unit is what is read, purified, published and skipped as a whole. Its content key changes when the shard's
bytes do, so a rewritten shard is redone and an untouched one is not.
"""

import hashlib
import json
import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Self

import pyarrow as pa

from acsr_ray.artifacts import json_digest
from acsr_ray.columns import IMAGE, LABEL
from acsr_ray.corpus.container_errors import ContainerError
from acsr_ray.corpus.containers import check_schema, open_parquet
from acsr_ray.corpus.schema import IMAGE_TYPE, image_features
from acsr_ray.corpus.sources import CHAIN, CorpusError, ImageFile, ImageFolder, Shard, find_source, version_of
from acsr_ray.corpus.webdataset import TarIndex, index_tar, read_samples, tell_left_out
from acsr_ray.storage import open_filesystem

logger = logging.getLogger(__name__)

EXPANSION = 8
"""Decoded bytes per encoded byte assumed when sizing units; photos expand 6 to 15 times."""


@dataclass(frozen=True)
class Unit:
    """Rows `first`..`last` (inclusive) of one shard, or a run of an image folder's sorted files."""

    uri: str
    relative: str
    first: int
    last: int
    content: str
    """Digest of what decides the input pixels."""
    files: tuple[tuple[str, str, int | None], ...] = ()
    """(uri, relative path, label) of each image; empty for shards."""
    class_names: tuple[str, ...] = ()
    """Names of an image folder's sub-folders."""
    version: str = ""
    """Size and time of the shard when it was planned; tells that `content` still holds without reading."""
    generation: int = 0
    """Number of the retry that asked for these rows again after they had been published; 0: none did."""
    span: tuple[int, ...] = ()
    """Where its rows are in a tar: the bytes of their start and end, and the row at the start. Empty for
    others."""

    @property
    def num_rows(self) -> int:
        """Rows of the unit."""
        return self.last - self.first + 1

    def output_name(self, fingerprint: str) -> str:
        """Return the path of the unit's output below `data/`; sorts in input order.

        Args:
            fingerprint: digest of the run's result-affecting settings.
        """
        parts = [fingerprint, self.relative, self.first, self.last, self.content]
        # A retried unit stands beside the one it replaces until the snapshot lists it.
        key = json_digest([*parts, self.generation] if self.generation else parts)[:8]
        return f"{self.relative}.rows-{self.first:07d}-{self.last:07d}.{key}.parquet"

    def halves(self) -> tuple["Unit", "Unit"]:
        """Return the unit's two halves; it has two rows at least."""
        rows = self.num_rows // 2
        second = replace(self, first=self.first + rows, files=self.files[rows:])
        return _shortened(self, rows), second

    def to_json(self) -> str:
        """Serialise, to travel through the pipeline as one cell."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Restore from `to_json`."""
        fields = json.loads(text)
        files = tuple(tuple(file) for file in fields["files"])
        names, span = tuple(fields["class_names"]), tuple(fields["span"])
        return cls(**{**fields, "files": files, "class_names": names, "span": span})


@dataclass(frozen=True)
class UnitPlan:
    """How a corpus is cut into units."""

    image_column: str = IMAGE
    """Name of the image column in Parquet shards; tars and folders have `image`."""
    unit_rows: int = 256
    """Most rows of a unit."""
    unit_megabytes: float = 32.0
    """Decoded MiB aimed at; units of large images have fewer rows."""
    purified: bool = False
    """Whether shards that were purified before will do."""


class ShardChangedError(CorpusError):
    """A shard that is not what it was when it was planned: its units are planned anew."""


def plan_units(
    location: str,
    *,
    image_column: str,
    unit_rows: int,
    unit_megabytes: float,
    limit: int | None,
    purified: bool = False,
) -> list[Unit]:
    """Cut a corpus into units in input order.

    Args:
        location: path or URI of the corpus.
        image_column: name of the image column in Parquet shards.
        unit_rows: most rows of a unit.
        unit_megabytes: decoded MiB aimed at; units of large images have fewer rows.
        limit: only the first so many rows of the corpus.
        purified: whether shards that were purified before will do.

    Raises:
        ContainerError: a shard that is damaged, hostile or has an unusable schema.
        CorpusError: nothing to read.
        OSError: a shard that the store does not deliver.
    """
    plan = UnitPlan(image_column, unit_rows, unit_megabytes, purified)
    source = find_source(location)
    check_source(source, location, image_column)
    if isinstance(source, ImageFolder):
        planned = folder_units(source, plan)
    else:
        planned = (unit for shard in source for unit in shard_units(shard, plan))
    units = list(limited(planned, limit))
    if not units:
        raise CorpusError(f"input {location} has no rows")
    return units


def check_source(source: list[Shard] | ImageFolder, location: str, image_column: str) -> None:
    """Raise `CorpusError` if images are asked for by a column that this kind of corpus has not."""
    if isinstance(source, ImageFolder):
        if source.num_skipped:
            logger.info("%d files of %s are not images by their names", source.num_skipped, location)
        kind = "a folder of images"
    elif source[0].is_tar:
        kind = "made of tars"
    else:
        return
    if image_column != IMAGE:
        raise CorpusError(f"{location} is {kind}, whose column is always {IMAGE!r}")


def limited(units: Iterable[Unit], limit: int | None) -> Iterator[Unit]:
    """Yield units up to so many rows, the last one cut."""
    left = limit
    for unit in units:
        if left == 0:
            return
        if left is not None and unit.num_rows > left:
            unit = _shortened(unit, left)
        yield unit
        left = None if left is None else left - unit.num_rows


def _shortened(unit: Unit, rows: int) -> Unit:
    return replace(unit, last=unit.first + rows - 1, files=unit.files[:rows])


def shard_units(shard: Shard, plan: UnitPlan, content: str = "") -> Iterator[Unit]:
    """Cut one shard into units.

    Args:
        shard: a Parquet file or a tar.
        plan: how.
        content: digest of its bytes where that is known; else the store's own, else all of it is read.

    Raises:
        ContainerError: it is damaged, hostile, or has no images to purify.
        OSError: the store does not deliver it.
    """
    if shard.is_tar:
        index = tar_facts(shard, plan)
        if index.runs:
            yield from tar_units(shard, index, content or shard.digest or _file_digest(shard.uri))
        return
    facts = parquet_facts(shard, plan)
    if not facts.num_rows:
        return
    yield from parquet_units(shard, plan, facts, content or shard.digest or _file_digest(shard.uri))


@dataclass(frozen=True)
class ParquetFacts:
    """What the footer of a Parquet shard tells."""

    num_rows: int
    image_bytes: int
    """Of the image column, not compressed by Parquet."""
    row_groups: int


def parquet_facts(shard: Shard, plan: UnitPlan) -> ParquetFacts:
    """Read and check the footer of a Parquet shard; raises as `shard_units`."""
    with open_parquet(shard.uri) as file:
        check_schema(file.schema_arrow, plan.image_column, shard.uri, plan.purified)
        encoded = file.column_bytes(plan.image_column)
        return ParquetFacts(file.metadata.num_rows, encoded, file.metadata.num_row_groups)


def parquet_units(shard: Shard, plan: UnitPlan, facts: ParquetFacts, content: str) -> Iterator[Unit]:
    """Cut a Parquet shard, by its footer's facts, into units whose content has that digest."""
    fitting = int(plan.unit_megabytes * 2**20 * facts.num_rows / max(1, facts.image_bytes * EXPANSION))
    step = max(1, min(plan.unit_rows, fitting))
    for first in range(0, facts.num_rows, step):
        last = min(first + step, facts.num_rows) - 1
        yield Unit(shard.uri, shard.relative, first, last, content, version=shard.version)


def tar_facts(shard: Shard, plan: UnitPlan) -> TarIndex:
    """Read and check the headers of a tar; raises as `shard_units`."""
    index = index_tar(shard.uri, plan.unit_rows, plan.unit_megabytes * 2**20 / EXPANSION)
    tell_left_out(index, shard.uri)
    return index


def tar_units(shard: Shard, index: TarIndex, content: str) -> Iterator[Unit]:
    """Yield the units of a tar, by its index, whose content has that digest."""
    for run in index.runs:
        span = (run.start, run.end, run.first)
        yield Unit(shard.uri, shard.relative, run.first, run.last, content, version=shard.version, span=span)


def _file_digest(uri: str) -> str:
    fs, path = open_filesystem(uri)
    with fs.open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(2**22):
            digest.update(block)
    return digest.hexdigest()


def folder_units(folder: ImageFolder, plan: UnitPlan) -> Iterator[Unit]:
    """Cut a folder of images into runs of its sorted files."""
    first = 0
    for files in _runs(folder.files, plan.unit_rows, plan.unit_megabytes * 2**20 / EXPANSION):
        rows = tuple((file.uri, file.path, folder.label(file)) for file in files)
        # Without a version the content is unknown; the time of planning then stands for it. Labels are in the
        # output's rows and class names in its metadata: where a class comes or goes, both are others.
        versions = [[file.path, file.version or time.time_ns()] for file in files]
        content = json_digest([versions, [label for _, _, label in rows], folder.class_names])
        last = first + len(files) - 1
        yield Unit(folder.name, folder.name, first, last, content, rows, class_names=folder.class_names)
        first = last + 1


def _runs(files: Sequence[ImageFile], most: int, most_bytes: float) -> Iterator[list[ImageFile]]:
    """Cut files into runs of at most `most`, and of at most `most_bytes` unless one file alone is more."""
    run: list[ImageFile] = []
    size = 0
    for file in files:
        if run and (len(run) == most or size + file.num_bytes > most_bytes):
            yield run
            run, size = [], 0
        run.append(file)
        size += file.num_bytes
    yield run


def read_unit(unit: Unit) -> pa.Table:
    """Read a unit's rows with all their columns and the shard's schema metadata.

    Raises:
        ContainerError: the shard is damaged, or no longer one that would be planned.
        ShardChangedError: the shard is not what it was when it was planned.
        FileNotFoundError: it is no longer there.
    """
    if unit.files:
        return _read_files(unit)
    try:
        table = _read_tar(unit) if unit.span else _read_parquet(unit)
    except ContainerError:
        # What is damaged at places that were planned may be another file by now.
        if unit.span and _is_changed(unit):
            raise _changed(unit) from None
        raise
    # After the rows, so that what was read is of the version that was planned.
    if table.num_rows != unit.num_rows or _is_changed(unit):
        raise _changed(unit)
    return table


def _is_changed(unit: Unit) -> bool:
    return bool(unit.version) and version_of(unit.uri) != unit.version


def _changed(unit: Unit) -> ShardChangedError:
    return ShardChangedError(f"{unit.uri} changed after it was planned: rows {unit.first}..{unit.last}")


def _read_tar(unit: Unit) -> pa.Table:
    start, end, row = unit.span
    return read_samples(unit.uri, (start, end, row), unit.first, unit.last)


def _read_parquet(unit: Unit) -> pa.Table:
    with open_parquet(unit.uri) as file:
        metadata, groups, skipped, start = file.metadata, [], 0, 0
        for group in range(metadata.num_row_groups):
            end = start + metadata.row_group(group).num_rows
            if end <= unit.first:
                skipped = end
            elif start <= unit.last:
                groups.append(group)
            start = end
        table: pa.Table = file.read_row_groups(groups).slice(unit.first - skipped, unit.num_rows)
    return table


def _read_files(unit: Unit) -> pa.Table:
    cells = [{"bytes": _file_bytes(uri), "path": path} for uri, path, _ in unit.files]
    columns = {IMAGE: pa.array(cells, IMAGE_TYPE)}
    if unit.class_names:
        columns[LABEL] = pa.array([label for _, _, label in unit.files], pa.int64())
    return pa.table(columns).replace_schema_metadata(image_features((), unit.class_names))


def _file_bytes(uri: str) -> bytes | None:
    """Return a file's bytes, None for one that vanished or may not be read: its row is quarantined."""
    if CHAIN in uri:
        logger.warning("%s cannot be read: its name has %r", uri, CHAIN)
        return None
    try:
        fs, path = open_filesystem(uri)
        with fs.open(path, "rb") as file:
            data: bytes = file.read()
            return data
    except (FileNotFoundError, PermissionError) as error:
        if "://" in uri.removeprefix("file://") and isinstance(error, PermissionError):
            raise  # credentials expire; the next try may have others
        logger.warning("%s cannot be read: %s", uri, error)
        return None
