"""Which rows of an output a report looks at: few units, the same ones each time.

The numbers of a row are read without its image. From them the rows to be shown are chosen: the extremes of
the change and of the distance, and the middle one of each cluster, none of them by how good it looks.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import pyarrow as pa

from acsr_ray.artifacts import json_digest
from acsr_ray.columns import (
    CLASS,
    CLUSTER,
    DISTANCE,
    OUTCOME,
    PURIFIED,
    QUARANTINED,
    REASON,
    RESIDUAL,
    STATUS,
)
from acsr_ray.config import ResumableStop
from acsr_ray.corpus.containers import ContainerError, open_parquet
from acsr_ray.corpus.ledger import DATA, QUARANTINE
from acsr_ray.corpus.snapshot import Receipt, ShardEntry, Snapshot

logger = logging.getLogger(__name__)

SCANNED_UNITS = 24
"""Units whose numbers are read."""
SHOWN_UNITS = 10
"""Units whose images are read, of those."""
LISTED_UNITS = 24
"""Units whose refused rows are listed."""
LISTED_ROWS = 300
READERS = 8

RowT = TypeVar("RowT")

ClusterKey = tuple[int, int]
"""Class and cluster within it."""

UNREADABLE = (ContainerError, OSError, KeyError, ValueError, ResumableStop)
"""What one file of an output may fail with, without harm to the report."""


@dataclass(frozen=True)
class Place:
    """A published unit and the shard that it was made of."""

    relative: str
    entry: ShardEntry
    receipt: Receipt


@dataclass(frozen=True, eq=False)
class SampledRow:
    """The numbers of one row of the output; None where purification left none."""

    place: Place
    position: int
    """Row of the unit."""
    path: str | None
    """What the corpus calls the image."""
    status: str
    reason: str | None
    class_id: int | None
    cluster_id: int | None
    distance: float | None
    residual: float | None

    @property
    def number(self) -> int:
        """Row of the shard."""
        return self.place.receipt.first + self.position

    @property
    def key(self) -> ClusterKey | None:
        """Cluster that was chosen for it."""
        if self.class_id is None or self.cluster_id is None:
            return None
        return self.class_id, self.cluster_id

    @property
    def order(self) -> str:
        """A mark that orders rows as if at random, always alike."""
        return json_digest([self.place.receipt.name, self.position])


@dataclass(frozen=True)
class RefusedRow:
    """One image that was quarantined; never its bytes."""

    shard: str
    number: int
    path: str | None
    reason: str


def places(snapshot: Snapshot, names: Sequence[str] = ()) -> list[Place]:
    """Return the published units in order; only those named, where some of the named ones are there."""
    every = [
        Place(relative, entry, receipt)
        for relative, entry in sorted(snapshot.shards.items())
        for receipt in entry.receipts
    ]
    wanted = frozenset(names)
    return [place for place in every if place.receipt.name in wanted] or every


def spread(units: Sequence[Place], most: int) -> list[Place]:
    """Return at most so many units, evenly over all of them, the first and the last included."""
    if len(units) <= most:
        return list(units)
    step = (len(units) - 1) / (most - 1)
    return [units[round(step * position)] for position in range(most)]


def scan(output: str, units: Sequence[Place], image_column: str) -> list[SampledRow]:
    """Read the numbers of units' rows, no image; a unit that cannot be read is left out."""
    return _each(partial(_scan_unit, output, image_column), units)


def list_refused(output: str, units: Sequence[Place]) -> list[RefusedRow]:
    """Read keys and reasons of refused rows, from the first units that have some; no image."""
    holding = [place for place in units if place.receipt.statuses.get(QUARANTINED)]
    return _each(partial(_refused_rows, output), holding[:LISTED_UNITS])[:LISTED_ROWS]


def choose(rows: Sequence[SampledRow], count: int) -> dict[str, list[SampledRow]]:
    """Choose purified rows to be shown, of at most `SHOWN_UNITS` units.

    Args:
        rows: of the scanned units.
        count: rows in all.

    Returns:
        Rows by why they were chosen: a quarter with the largest change, an eighth each with the smallest and
        farthest from its cluster, the others near the middle of their cluster's changes.
    """
    measured = [
        row for row in rows if row.status == PURIFIED and row.residual is not None and row.key is not None
    ]
    measured.sort(key=lambda row: row.order)
    by_change = sorted(measured, key=lambda row: row.residual or 0.0)
    by_distance = sorted(measured, key=lambda row: row.distance or 0.0, reverse=True)
    wanted: list[tuple[str, Sequence[SampledRow], int]] = [
        ("largest", by_change[::-1], count // 4),
        ("farthest", by_distance, count // 8),
        ("smallest", by_change, count // 8),
    ]
    wanted.append(("typical", list(_typical(measured)), count - sum(number for *_, number in wanted)))
    units: set[str] = set()
    taken: set[str] = set()
    chosen: dict[str, list[SampledRow]] = {}
    for why, candidates, number in wanted:
        own = chosen.setdefault(why, [])
        for row in candidates:
            if len(own) == number:
                break
            name = row.place.receipt.name
            if row.order in taken or (name not in units and len(units) == SHOWN_UNITS):
                continue
            units.add(name)
            taken.add(row.order)
            own.append(row)
    return {why: own for why, own in chosen.items() if own}


def montage(
    rows: Sequence[SampledRow], units: frozenset[str], usage: Mapping[ClusterKey, int], most: int, each: int
) -> dict[ClusterKey, list[SampledRow]]:
    """Choose purified rows of the most used clusters from units whose images are read anyway.

    Args:
        rows: of the scanned units.
        units: names of the units whose images are read.
        usage: images per cluster.
        most: clusters.
        each: rows of a cluster.
    """
    by_cluster = _by_cluster(
        [row for row in rows if row.status == PURIFIED and row.place.receipt.name in units]
    )
    used = sorted(by_cluster, key=lambda key: (-usage.get(key, 0), key))[:most]
    return {key: sorted(by_cluster[key], key=lambda row: row.order)[:each] for key in used}


def _typical(rows: Sequence[SampledRow]) -> Iterator[SampledRow]:
    """Yield rows from the middle of each cluster's changes outwards, one cluster after the other."""
    waiting = []
    for _, own in sorted(_by_cluster(rows).items()):
        own.sort(key=lambda row: row.residual or 0.0)
        middle = own[len(own) // 2].residual or 0.0
        waiting.append(sorted(own, key=lambda row: abs((row.residual or 0.0) - middle)))
    for turn in range(max(map(len, waiting), default=0)):
        yield from (own[turn] for own in waiting if turn < len(own))


def _by_cluster(rows: Sequence[SampledRow]) -> dict[ClusterKey, list[SampledRow]]:
    found: dict[ClusterKey, list[SampledRow]] = {}
    for row in rows:
        if row.key is not None:
            found.setdefault(row.key, []).append(row)
    return found


def _each(read: Callable[[Place], list[RowT]], units: Sequence[Place]) -> list[RowT]:
    def attempt(place: Place) -> list[RowT]:
        try:
            return read(place)
        except UNREADABLE as error:
            logger.warning("%s is not in the report: %s", place.receipt.name, error)
            return []

    with ThreadPoolExecutor(READERS) as pool:
        return [row for rows in pool.map(attempt, units) for row in rows]


def _scan_unit(output: str, image_column: str, place: Place) -> list[SampledRow]:
    with open_parquet(f"{output}/{DATA}/{place.receipt.name}") as file:
        names = file.schema_arrow.names
        named = image_column in names and pa.types.is_struct(file.schema_arrow.field(image_column).type)
        # A part of a struct alone: the bytes beside it stay where they are.
        table = file.read(columns=[*OUTCOME.names, *([f"{image_column}.path"] if named else [])])
        outcome = table.select(OUTCOME.names).cast(OUTCOME)
    paths: list[str | None] = [None] * table.num_rows
    if image_column in table.column_names:
        paths = [(cell or {}).get("path") for cell in table[image_column].to_pylist()]
    numbers = zip(*(outcome[name].to_pylist() for name in (CLASS, CLUSTER, DISTANCE, RESIDUAL)), strict=True)
    told = outcome[STATUS].to_pylist(), outcome[REASON].to_pylist()
    return [
        SampledRow(place, position, path, status, reason, *values)
        for position, (path, status, reason, values) in enumerate(zip(paths, *told, numbers, strict=True))
    ]


def _refused_rows(output: str, place: Place) -> list[RefusedRow]:
    with open_parquet(f"{output}/{QUARANTINE}/{place.receipt.name}") as file:
        table = file.read(columns=["shard", "row", "path", "reason"])
    columns = (table[name].to_pylist() for name in ("shard", "row", "path", "reason"))
    return [RefusedRow(*row) for row in zip(*columns, strict=True)]
