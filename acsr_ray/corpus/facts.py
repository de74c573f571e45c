"""What a unit tells beside its rows: counts of its outcome columns, and what its stages cost.

The stages note facts in one column of the unit's table, a value that all its rows share, and the last one
gives them to the driver together with the receipt. Facts add up: those of two parts of a unit are the unit's,
and those of a run's units are the run's. Nothing here grows with the number of rows.
"""

import json
import resource
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from acsr_ray.columns import CLASS, CLUSTER, DISTANCE, FACTS, REASON, RESIDUAL, STATUS

RESIDUAL_EDGES = tuple(step / 100 for step in range(51))
"""Edges of the histogram of `acsr_residual`, a relative change; 0.5 and more is in the last bin."""
DISTANCE_EDGES = tuple(float(step) for step in range(65))
"""Edges of the histogram of `acsr_distance`; latents of L numbers have distances near the root of L. 64 and
more is in the last bin."""


@dataclass(frozen=True)
class UnitFacts:
    """Sums over rows, and over the calls of stages that worked on them."""

    statuses: Mapping[str, int] = field(default_factory=dict)
    reasons: Mapping[str, int] = field(default_factory=dict)
    """Rows per `acsr_reason`, those of rows that are not quarantined too."""
    clusters: Mapping[str, int] = field(default_factory=dict)
    """Rows per `<acsr_class>/<acsr_cluster>`."""
    residual: tuple[int, ...] = ()
    """Rows per bin of `RESIDUAL_EDGES`; empty is nothing but zeros."""
    distance: tuple[int, ...] = ()
    """Rows per bin of `DISTANCE_EDGES`."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Of work, per stage; tries that failed in a process that lived on are in it."""
    rows_given: int = 0
    """Rows that encoder and solver were called with."""
    rows_room: int = 0
    """Rows that they could have been called with."""
    peak_mib: float = 0.0
    """Most memory of a process that worked on them; of a sum the larger."""

    def __add__(self, other: "UnitFacts") -> "UnitFacts":
        return UnitFacts(
            _sum(self.statuses, other.statuses),
            _sum(self.reasons, other.reasons),
            _sum(self.clusters, other.clusters),
            _sum_bins(self.residual, other.residual),
            _sum_bins(self.distance, other.distance),
            _sum(self.seconds, other.seconds),
            self.rows_given + other.rows_given,
            self.rows_room + other.rows_room,
            max(self.peak_mib, other.peak_mib),
        )

    @property
    def images(self) -> int:
        """Rows of any status."""
        return sum(self.statuses.values())

    @property
    def batch_fill(self) -> float | None:
        """Share of the room in calls of encoder and solver that rows filled; None where there was no call."""
        return self.rows_given / self.rows_room if self.rows_room else None

    def to_json(self) -> str:
        """Serialise."""
        return json.dumps(vars(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> "UnitFacts":
        """Restore from `to_json`."""
        content: dict[str, Any] = json.loads(text)
        for name in ("residual", "distance"):
            content[name] = tuple(content[name])
        return cls(**content)


def outcome_facts(table: pa.Table) -> UnitFacts:
    """Count a table's outcome columns, `acsr_ray.columns.OUTCOME`."""
    pairs = zip(table[CLASS].to_pylist(), table[CLUSTER].to_pylist(), strict=True)
    return UnitFacts(
        statuses=dict(Counter(table[STATUS].to_pylist())),
        reasons=dict(Counter(reason for reason in table[REASON].to_pylist() if reason is not None)),
        clusters=dict(Counter(f"{of}/{cluster}" for of, cluster in pairs if cluster is not None)),
        residual=_binned(table[RESIDUAL], RESIDUAL_EDGES),
        distance=_binned(table[DISTANCE], DISTANCE_EDGES),
    )


def facts_in(table: pa.Table) -> UnitFacts:
    """Return what was noted in a unit's table so far."""
    if FACTS not in table.column_names or not table.num_rows:
        return UnitFacts()
    return UnitFacts.from_json(table[FACTS][0].as_py())


def without_facts(table: pa.Table) -> pa.Table:
    """Return a unit's table without the column of facts."""
    return table.drop_columns([FACTS]) if FACTS in table.column_names else table


def with_facts(table: pa.Table, facts: UnitFacts) -> pa.Table:
    """Return a unit's table with facts in place of what was noted before."""
    table = without_facts(table)
    # One value in a dictionary, as for the unit: no copy per row.
    indices = pa.array(np.zeros(table.num_rows, np.int32))
    return table.append_column(FACTS, pa.DictionaryArray.from_arrays(indices, [facts.to_json()]))


def process_peak_mib() -> float:
    """Return the most memory that this process has held so far, what it shares with others included."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)


def _binned(column: pa.ChunkedArray, edges: tuple[float, ...]) -> tuple[int, ...]:
    """Count values between edges, the lower of which belongs to the bin; nulls and NaNs count nowhere."""
    values = column.drop_null().to_numpy().astype(np.float64)
    values = values[~np.isnan(values)]
    bins = np.searchsorted(edges, values, side="right") - 1
    counts = np.bincount(bins.clip(0, len(edges) - 2), minlength=len(edges) - 1)
    return tuple(counts.tolist())


def _sum(one: Mapping[str, Any], two: Mapping[str, Any]) -> dict[str, Any]:
    total = dict(one)
    for key, value in two.items():
        total[key] = total.get(key, 0) + value
    return total


def _sum_bins(one: tuple[int, ...], two: tuple[int, ...]) -> tuple[int, ...]:
    if not one or not two:
        return one or two
    return tuple(a + b for a, b in zip(one, two, strict=True))
