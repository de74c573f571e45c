"""Everything a report says, gathered in bounds: the record, and what a few files of the output add to it."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import ValidationError

from acsr_ray.columns import IMAGE, PURIFIED
from acsr_ray.corpus.images import DecodeLimits
from acsr_ray.corpus.snapshot import Snapshot
from acsr_ray.corpus.units import UnitPlan
from acsr_ray.reporting.naming import ClusterNames, cluster_names, deciding_settings
from acsr_ray.reporting.pictures import Located, Picture, take_pictures
from acsr_ray.reporting.record import Bins, RunRecord
from acsr_ray.reporting.sampling import (
    SCANNED_UNITS,
    ClusterKey,
    RefusedRow,
    SampledRow,
    choose,
    list_refused,
    montage,
    places,
    scan,
    spread,
)
from acsr_ray.reporting.wording import counted
from acsr_ray.storage import Storage

BINS = 40
MONTAGE_CLUSTERS, MONTAGE_IMAGES = 12, 6


@dataclass(frozen=True)
class Measure:
    """A histogram and what it is of."""

    bins: Bins
    source: str
    """`all images of the run`, or the sample."""


@dataclass(frozen=True)
class ClusterUse:
    """How often one cluster was chosen."""

    label: str
    images: int


@dataclass(frozen=True)
class Contents:
    """What a report says."""

    record: RunRecord
    names: ClusterNames
    residual: Measure
    distance: Measure
    usage: tuple[ClusterUse, ...]
    """Every cluster that is known, by class and cluster."""
    usage_source: str
    examples: Mapping[str, tuple[Picture, ...]]
    """By why they were chosen, as `sampling.choose` has it."""
    montage: Mapping[str, tuple[Picture, ...]]
    """By label of the cluster."""
    refused: tuple[RefusedRow, ...]
    sample: str
    """What the pictures were chosen from."""


def gather(
    storage: Storage, snapshot: Snapshot, record: RunRecord, *, images: int = 24, source: str | None = None
) -> Contents:
    """Gather what a report says; files that cannot be read are left out.

    Args:
        storage: of the output.
        snapshot: the current one.
        record: of the run.
        images: examples with their original.
        source: where the corpus is now, if it was moved.
    """
    bound = deciding_settings(storage)
    column = str(record.settings.get("image_column") or bound.get("image_column") or IMAGE)
    names = cluster_names(storage, record)
    units = places(snapshot, record.unit_names)
    scanned = spread(units, SCANNED_UNITS)
    rows = scan(storage.root, scanned, column)
    purified = [row for row in rows if row.status == PURIFIED]
    sample = _sampled(len(purified), len(scanned), len(units), snapshot, record)
    keyed, usage_source = _usage(record, names, purified, sample)
    chosen = choose(rows, images)
    shown = [row for own in chosen.values() for row in own]
    own_units = frozenset(row.place.receipt.name for row in shown)
    strips = montage(rows, own_units, dict(keyed), MONTAGE_CLUSTERS, MONTAGE_IMAGES)
    pictures = take_pictures(
        storage.root,
        column,
        [*shown, *(row for own in strips.values() for row in own)],
        Located(record.input or str(bound.get("input") or ""), source, _plan({**bound, **record.settings})),
        _limits(record.settings.get("decode"), bound.get("decode")),
        frozenset(shown),
    )
    return Contents(
        record,
        names,
        _measure(record.residual, (row.residual for row in purified), sample),
        _measure(record.distance, (row.distance for row in purified), sample),
        tuple(ClusterUse(names.label(key), count) for key, count in keyed),
        usage_source,
        _pictured(chosen, pictures),
        _pictured({names.label(key): own for key, own in strips.items()}, pictures),
        tuple(list_refused(storage.root, units)),
        sample,
    )


def _sampled(images: int, scanned: int, units: int, snapshot: Snapshot, record: RunRecord) -> str:
    """Say what was looked into: a record names some units of its run, all of a short one."""
    every = sum(len(entry.receipts) for entry in snapshot.shards.values())
    whose, files = "the output", units
    if units < every:
        whose, files = "this run", max(units, record.units or 0)
    if scanned == files:
        return f"all {counted(images, 'purified image')} of {whose}"
    return f"a sample, {counted(images, 'purified image')} in {scanned:,} of the {files:,} files of {whose}"


def _usage(
    record: RunRecord, names: ClusterNames, rows: Sequence[SampledRow], sample: str
) -> tuple[list[tuple[ClusterKey, int]], str]:
    counts: Counter[ClusterKey] = Counter()
    for recorded, count in record.clusters.items():
        key = names.key(recorded)
        if key is not None:
            counts[key] += count
    source = "all images of the run"
    if not counts:
        counts.update(row.key for row in rows if row.key is not None)
        source = sample
    every = sorted({*names.clusters, *counts})
    return [(key, counts[key]) for key in every], source


def _measure(recorded: Bins, values: Iterable[float | None], sample: str) -> Measure:
    if recorded.total:
        return Measure(recorded, "all images of the run")
    finite = np.array([value for value in values if value is not None and np.isfinite(value)])
    if not len(finite):
        return Measure(Bins(), sample)
    # The last bin also holds the few beyond, which would squeeze all others into one.
    low, high = float(finite.min()), float(np.quantile(finite, 0.995))
    if high <= low:
        high = low + max(abs(low), 1.0) * 1e-3
    counts, edges = np.histogram(np.clip(finite, low, high), BINS, (low, high))
    return Measure(Bins(edges=tuple(edges.tolist()), counts=tuple(counts.tolist())), sample)


def _plan(settings: Mapping[str, Any]) -> UnitPlan:
    rows, size = settings.get("unit_rows"), settings.get("unit_megabytes")
    usual = UnitPlan()
    return UnitPlan(
        unit_rows=rows if isinstance(rows, int) and rows > 0 else usual.unit_rows,
        unit_megabytes=size if isinstance(size, int | float) and size > 0 else usual.unit_megabytes,
    )


def _limits(*recorded: object) -> DecodeLimits:
    for settings in recorded:
        if settings:
            try:
                return DecodeLimits.model_validate(settings)
            except ValidationError:
                continue
    return DecodeLimits()


def _pictured(
    rows: Mapping[str, Sequence[SampledRow]], pictures: Mapping[SampledRow, Picture]
) -> dict[str, tuple[Picture, ...]]:
    found = {why: tuple(pictures[row] for row in own if row in pictures) for why, own in rows.items()}
    return {why: own for why, own in found.items() if own}
