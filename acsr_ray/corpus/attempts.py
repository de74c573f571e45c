"""Attempt accounting: which unit is being worked on where, and what to do with one that brings workers down.

A unit that is begun again without having ended took its worker with it, or was taken by what ended the
worker. Parts of it are then tried one after the other, each announced before it begins; then the rows of the
part that fell; and a row that falls alone twice is quarantined. So a guilty row costs four workers, not the
job, and an innocent one would have to be met by chance four times, the last two alone.
"""

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

PARTS = 16
"""Parts that a unit is cut into after it fell."""
MOST_FALLS = 6
"""Falls since a row was last blamed after which a unit is given up; a later run grants two more."""
MOST_POISON = 8
"""Rows of a unit that may be blamed before it is the stage that is to blame."""
MOST_STARTS = 4
"""Starts of a stage in a row that never ended, beyond the size of its pool; then the run stops."""

Refusal = Literal["stopping", "draining", "given_up"]


@dataclass(frozen=True)
class Orders:
    """What a worker has to do with a unit.

    `parts` are ranges (first, behind the last) of rows to be tried one by one, each announced with `narrow`;
    empty: all rows at once. `poison` maps rows to be left out to their reason. `refusal` says why it must not
    begin.
    """

    parts: tuple[tuple[int, int], ...] = ()
    poison: Mapping[int, str] = field(default_factory=dict)
    refusal: Refusal | None = None
    falls: int = 0


@dataclass
class Record:
    """What is known of a unit that fell: how often, the range in flight the last time, and poisoned rows."""

    falls: int = 0
    suspect: tuple[int, int] | None = None
    accused: set[int] = field(default_factory=set)
    """Rows that fell alone once."""
    poison: dict[int, str] = field(default_factory=dict)

    def to_dict(self, unit: str) -> dict[str, Any]:
        """Return a JSON value."""
        poison = {str(row): reason for row, reason in self.poison.items()}
        return {
            "unit": unit,
            "falls": self.falls,
            "suspect": self.suspect,
            "accused": sorted(self.accused),
            "poison": poison,
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "Record":
        """Restore from `to_dict`."""
        suspect = content["suspect"]
        return cls(
            content["falls"],
            None if suspect is None else (suspect[0], suspect[1]),
            set(content["accused"]),
            {int(row): reason for row, reason in content["poison"].items()},
        )


@dataclass
class Flight:
    """A unit that a stage has begun and not ended."""

    unit: str
    stage: str
    rows: tuple[int, int]
    began: float
    node: str
    pid: int
    killed: bool = False


class AttemptBook:
    """The book of all stages' attempts; plain state, kept by one process.

    Args:
        records: of units that fell in earlier runs.
    """

    def __init__(self, records: Iterable[Mapping[str, Any]] = ()) -> None:
        self.records = {content["unit"]: Record.from_dict(content) for content in records}
        for record in self.records.values():
            record.falls = min(record.falls, MOST_FALLS - 2)
        self.stopping = False
        self.draining: frozenset[str] = frozenset()
        self.last_event = time.monotonic()
        self.falls = 0
        """Units that lost their worker, counted each time."""
        self._flights: dict[tuple[str, str], Flight] = {}
        self._beats: dict[tuple[str, int], tuple[str, float]] = {}
        self._starts: dict[str, int] = {}
        self._stillborn: set[str] = set()

    def begin(
        self,
        stage: str,
        unit: str,
        rows: int,
        node: str,
        pid: int,
        *,
        last_stage: bool = False,
        divisible: bool = True,
    ) -> Orders:
        """Note that a worker begins a unit, and tell it how.

        Args:
            stage: name of the stage.
            unit: name of the unit.
            rows: of the unit.
            node: where the worker runs.
            pid: its process; another one than before means that the one before fell.
            last_stage: nothing is left but to publish: neither a stop nor a drain holds it up.
            divisible: whether parts of the unit can be tried alone.
        """
        self.last_event = time.monotonic()
        before = self._flights.pop((stage, unit), None)
        if before is not None and (before.node, before.pid) != (node, pid):
            self._fell(unit, before, divisible)
        record = self.records.get(unit, Record())
        refusal: Refusal | None = None
        blamed = len(record.poison) + len(record.accused)
        if record.falls >= MOST_FALLS or (record.falls > 1 and blamed >= MOST_POISON):
            refusal = "given_up"
        elif self.stopping and not last_stage:
            refusal = "stopping"
        elif node in self.draining and not last_stage:
            refusal = "draining"
        if refusal:
            return Orders(refusal=refusal, falls=record.falls)
        self._flights[stage, unit] = Flight(unit, stage, (0, rows), time.monotonic(), node, pid)
        parts = _parts(record, rows) if divisible else ()
        return Orders(parts, dict(record.poison), None, record.falls)

    def narrow(self, stage: str, unit: str, first: int, behind: int) -> None:
        """Note which rows a worker is about to try."""
        self.last_event = time.monotonic()
        flight = self._flights.get((stage, unit))
        if flight is not None:
            flight.rows = (first, behind)
            flight.began = time.monotonic()

    def end(self, stage: str, unit: str) -> None:
        """Note that a stage is done with a unit, well or not."""
        self.last_event = time.monotonic()
        self._flights.pop((stage, unit), None)

    def overdue(self, seconds: float) -> list[Flight]:
        """Return what has been worked on for longer; each only once."""
        now = time.monotonic()
        late = [f for f in self._flights.values() if not f.killed and now - f.began > seconds]
        for flight in late:
            flight.killed = True
        return late

    def beat(self, stage: str, node: str, pid: int) -> None:
        """Note that a worker is there; one that hangs between two units shows in no flight."""
        self._beats[node, pid] = stage, time.monotonic()

    def silent(self, seconds: float) -> list[tuple[str, str, int]]:
        """Return (stage, node, pid) of workers without a beat for longer; each only once.

        One of them may have ended long ago: that is for whoever looks for the process.
        """
        now = time.monotonic()
        still = [worker for worker, (_, beat) in self._beats.items() if now - beat > seconds]
        return [(self._beats.pop(worker)[0], *worker) for worker in still]

    def forget(self) -> None:
        """Forget what is in flight, without blame."""
        self._flights.clear()
        self._beats.clear()
        self._starts.clear()

    def starting(self, stage: str, actors: int) -> bool:
        """Note that a worker of a stage starts; False when too many in a row never got ready.

        Args:
            stage: name of the stage.
            actors: size of its pool, which starts all of them at once.
        """
        self._starts[stage] = self._starts.get(stage, 0) + 1
        if self._starts[stage] > actors + MOST_STARTS:
            self._stillborn.add(stage)
        return stage not in self._stillborn

    def started(self, stage: str) -> None:
        """Note that a worker got ready."""
        self.last_event = time.monotonic()
        self._starts[stage] = 0

    def stillborn(self) -> list[str]:
        """Return the stages whose workers do not get ready."""
        return sorted(self._stillborn)

    def state_of(self, unit: str) -> dict[str, Any] | None:
        """Return the record of a unit as JSON, None if it never fell."""
        record = self.records.get(unit)
        return None if record is None else record.to_dict(unit)

    def _fell(self, unit: str, flight: Flight, divisible: bool) -> None:
        self.falls += 1
        record = self.records.setdefault(unit, Record())
        record.falls += 1
        if not divisible:
            return
        first, behind = flight.rows
        if behind - first > 1:
            record.suspect = (first, behind)
            return
        # Something was learnt: other rows may be guilty too, and are found in the same way.
        record.falls, record.suspect = 1, None
        if first in record.accused:
            record.accused.remove(first)
            record.poison[first] = "worker_crash"
        else:
            record.accused.add(first)


def _parts(record: Record, rows: int) -> tuple[tuple[int, int], ...]:
    """Return the ranges to try: parts of what is suspected, the rest, and last, one by one, accused rows.

    The suspected first: did another guilty row of the rest fall before, each would hide the other for ever.
    """
    if not record.falls:
        return ()
    first, behind = record.suspect or (0, rows)
    most = -(-rows // PARTS)
    size = 1 if behind - first <= most else most
    inside = [(at, min(at + size, behind)) for at in range(first, behind, size)]
    accused = sorted(record.accused)
    rest = [part for whole in (*inside, (0, first), (behind, rows)) for part in _without(whole, accused)]
    return (*rest, *((row, row + 1) for row in accused))


def _without(part: tuple[int, int], rows: list[int]) -> Iterator[tuple[int, int]]:
    """Yield what is left of a range without some rows, which are in order."""
    first, behind = part
    for row in rows:
        if first <= row < behind:
            if first < row:
                yield first, row
            first = row + 1
    if first < behind:
        yield first, behind
