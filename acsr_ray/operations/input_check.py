"""Whether an output holds the rows of its input: all of them, once each, and in their order."""

from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from acsr_ray.config import AcsrError
from acsr_ray.corpus.changes import Refused, ShardWork, folder_work, inspect_shards, list_corpus
from acsr_ray.corpus.retrying import Generations
from acsr_ray.corpus.snapshot import Receipt, ShardEntry, Snapshot
from acsr_ray.corpus.sources import ImageFolder
from acsr_ray.corpus.units import Unit, UnitPlan, limited, read_unit
from acsr_ray.operations.unit_check import Problem
from acsr_ray.storage import patiently


def check_coverage(relative: str, entry: ShardEntry) -> Iterator[Problem]:
    """Yield gaps and overlaps between the rows of a shard's units."""
    behind = 0
    for receipt in sorted(entry.receipts, key=lambda receipt: (receipt.first, receipt.rows)):
        if receipt.first > behind and entry.complete:
            yield Problem("gap", relative, f"rows {behind} to {receipt.first - 1} are in no unit")
        elif receipt.first < behind:
            yield Problem("overlap", relative, f"row {receipt.first} is in more than one unit")
        behind = max(behind, receipt.first + receipt.rows)


class InputIndex:
    """An input as it is now, beside the snapshot of an output.

    Args:
        location: of the input.
        bound: settings of the output.
        snapshot: of the output.
        fingerprint: that names the output's units.

    Raises:
        CorpusError: there is no such input.
    """

    def __init__(self, location: str, bound: Mapping[str, Any], snapshot: Snapshot, fingerprint: str) -> None:
        self._source = list_corpus(location)
        self._snapshot, self._fingerprint = snapshot, fingerprint
        self._limit: int | None = bound.get("limit")
        self._as_before: dict[str, list[Unit]] = {}
        """Shards with the content that was purified, from `check`; of tars the units, which alone know where
        in the tar their rows are."""
        plan = UnitPlan()
        self._plan = UnitPlan(
            bound.get("image_column", plan.image_column),
            bound.get("unit_rows", plan.unit_rows),
            bound.get("unit_megabytes", plan.unit_megabytes),
        )
        self._shards = (
            {} if isinstance(self._source, ImageFolder) else {shard.relative: shard for shard in self._source}
        )

    def check(self) -> Iterator[Problem]:
        """Yield shards that the output lacks, should not have, or has in another state or length."""
        source, known = self._source, self._snapshot.shards
        here = {source.name} if isinstance(source, ImageFolder) else self._shards.keys()
        for relative in sorted(known.keys() - here):
            yield Problem("input", relative, "it is no longer in the input; the next run removes its rows")
        if isinstance(source, ImageFolder):
            work = folder_work(source, self._plan, self._fingerprint)
            yield from self._compare(work)
            yield from self._changed_images(source, work)
            return
        for found in inspect_shards(source, self._plan, self._snapshot, self._fingerprint):
            yield from self._compare(found)

    def unit(self, relative: str, entry: ShardEntry, receipt: Receipt) -> Unit | None:
        """Return the input of a published unit, None where the input is not what it was; after `check`."""
        first, behind = receipt.first, receipt.first + receipt.rows
        if isinstance(self._source, ImageFolder):
            folder = self._source
            files = tuple((file.uri, file.path, folder.label(file)) for file in folder.files[first:behind])
            names = folder.class_names
            return Unit(folder.name, relative, first, behind - 1, "", files, names) if files else None
        if relative not in self._as_before:
            return None
        shard = self._shards[relative]
        # A unit that was published in parts lies inside of the planned one.
        planned, last = self._as_before[relative], behind - 1
        span = next((unit.span for unit in planned if unit.first <= first and last <= unit.last), ())
        if shard.is_tar and not span:
            return None
        return Unit(shard.uri, relative, first, last, entry.content, version=shard.version, span=span)

    def _changed_images(self, folder: ImageFolder, work: ShardWork) -> Iterator[Problem]:
        """Yield units that the next run would make again, as other files than those they were made of."""
        entry = self._snapshot.shards.get(work.relative)
        if entry is None or not all(file.version for file in folder.files):
            return  # a store that tells neither times nor tags: every run makes all of it again
        generations = Generations(self._snapshot, self._fingerprint, self._snapshot.names(), None)
        units = [part for unit in limited(work.units, self._limit) for part in generations.cut(unit)]
        expected = {unit.output_name(self._fingerprint) for unit in units}
        for receipt in entry.receipts:
            if receipt.name not in expected:
                where = f"{work.relative} rows {receipt.first} to {receipt.first + receipt.rows - 1}"
                detail = "of their files, some are others or were written again since they were purified"
                yield Problem("input", where, detail)

    def _compare(self, work: ShardWork | Refused) -> Iterator[Problem]:
        if isinstance(work, Refused):
            if work.uri not in self._snapshot.refused:
                yield Problem("input", work.relative, f"it cannot be read now: {work.reason}")
            return
        rows = sum(unit.num_rows for unit in work.units)
        entry = self._snapshot.shards.get(work.relative)
        done = 0 if entry is None else sum(receipt.rows for receipt in entry.receipts)
        if entry is not None and entry.content != work.content:
            yield Problem("input", work.relative, "it has changed since it was purified")
            return
        if entry is not None:
            self._as_before[work.relative] = [unit for unit in work.units if unit.span]
        if done > rows or (done < rows and self._limit is None):
            yield Problem("input", work.relative, f"{done} of its {rows} rows are in the output")


def check_columns(unit: Unit, table: pa.Table, image_column: str) -> Iterator[Problem]:
    """Yield what is beside the images and not as in the input, row for row.

    Args:
        unit: rows of the input.
        table: the published rows.
        image_column: name of the image column.
    """
    where = f"{unit.relative} rows {unit.first} to {unit.last}"
    try:
        before = patiently(lambda: read_unit(unit), f"reading {unit.uri}")
    except (AcsrError, OSError) as error:
        yield Problem("input", where, f"it cannot be compared: {error}")
        return
    if before.num_rows != table.num_rows:
        return  # told already
    for name in before.column_names:
        if name not in table.column_names:
            yield Problem("input", where, f"column {name!r} is missing")
            continue
        old, new = before[name], table[name]
        if name == image_column:
            # A quarantined image has no path any more.
            there = new.is_valid()
            old, new = _paths(old).filter(there), _paths(new).filter(there)
        if not _same(old, new):
            yield Problem("input", where, f"column {name!r} is not that of the input")


def _paths(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return what identifies the images of a column besides their bytes."""
    if pa.types.is_struct(column.type) and column.type.get_field_index("path") >= 0:
        return pc.struct_field(column, "path")
    return pa.chunked_array([pa.nulls(len(column))])


def _same(before: pa.ChunkedArray, after: pa.ChunkedArray) -> bool:
    # To Arrow, not a number is not equal to itself; as text it is.
    return before.equals(after) or repr(before.to_pylist()) == repr(after.to_pylist())
