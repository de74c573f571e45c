"""What a run tells about itself: sums over its units, its progress, and its record.

Nothing here reads or writes files, and what is held does not grow with the corpus. `RunTally` is told by the
run and read by another thread. `record` gives `OUT/_acsr/runs/<run>/record.json`,
`progress` gives `OUT/_acsr/progress.json`; `acsr_ray.corpus.observing` writes both.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol

from acsr_ray.corpus.differences import ShardChanges
from acsr_ray.corpus.facts import DISTANCE_EDGES, RESIDUAL_EDGES, UnitFacts, process_peak_mib

SCHEMA_VERSION = 2
"""1 had a number of removed shards, and no names of shards that are new, changed or removed."""
MOST_POINTS = 500
"""Of a timeline; a longer run has a coarser one."""
MOST_NAMED = 1000
"""Of each list of a record, such as refused shards; it counts all."""
MOST_UNITS = 64
"""Units that a record names, evenly over the run."""
RATE_SECONDS = 60.0
"""The rate is that of the last minute, or of as many units as `RATE_UNITS` if they took longer."""
RATE_UNITS = 8

Outcome = Literal["running", "done", "stopped", "failed"]


class Listener(Protocol):
    """What else wants to know of a run, such as metrics."""

    def unit(self, facts: UnitFacts) -> None:
        """Hear of a unit that was published; in the run's own thread."""

    def tick(self, progress: Mapping[str, Any]) -> None:
        """Hear of the progress, about once a second."""


class NoListener:
    """Hears nothing."""

    def unit(self, facts: UnitFacts) -> None:
        """Do nothing."""

    def tick(self, progress: Mapping[str, Any]) -> None:
        """Do nothing."""


@dataclass(frozen=True)
class RunAbout:
    """What is known of a run before it does anything."""

    run: str
    """Its name: when it began, and the number of its lease, which no other run of the output has."""
    started_at: str
    """ISO 8601, UTC."""
    input: str
    output: str
    bundle: str
    settings: Mapping[str, Any]
    plan: Mapping[str, Any] | None = None
    """What was planned for it, if it was."""

    @classmethod
    def now(cls, lease: int, **fields: Any) -> "RunAbout":  # noqa: ANN401  (as the class has them)
        """Return it for a run that begins now.

        Args:
            lease: number of its lease.
            fields: the others.
        """
        now = time.time()
        stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(now))
        return cls(f"{stamp}-{lease:06d}", iso_time(now), **fields)


def iso_time(seconds: float | None = None) -> str:
    """Return a time as ISO 8601 in UTC; now, unless seconds since 1970 are given."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


@dataclass
class Timeline:
    """Images over time, at most `MOST_POINTS` points."""

    points: list[tuple[float, int]] = field(default_factory=lambda: [(0.0, 0)])
    spacing: float = 0.0

    def add(self, seconds: float, images: int) -> None:
        """Note how many images there were after so many seconds, unless that was noted just before."""
        if seconds - self.points[-1][0] < self.spacing:
            return
        self.points.append((round(seconds, 2), images))
        if len(self.points) == MOST_POINTS:
            self.points = self.points[::2]
            self.spacing = 2 * seconds / MOST_POINTS

    def until(self, seconds: float, images: int) -> list[tuple[float, int]]:
        """Return the points, and how it is now as the last one."""
        return [*self.points, (round(max(seconds, self.points[-1][0]), 2), images)]


class RunTally:
    """The sums of a run; every method may be called from any thread.

    Args:
        listener: hears of units and progress too.
        clock: seconds that only go forward.
    """

    def __init__(self, listener: Listener | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.listener = listener or NoListener()
        self.corpus: Callable[[], Mapping[str, Any] | None] = lambda: None
        """Gives the totals of the output's snapshot, None while that is not read; asked seldom."""
        self.changes: Callable[[], ShardChanges] = ShardChanges
        """Gives what the run has changed in the output; asked at its end."""
        self._lock, self._clock = threading.Lock(), clock
        self._began = self._last_unit = clock()
        self._facts, self._units = UnitFacts(), 0
        self._planned = 0
        self._resources: dict[str, float] = {}
        self._limit: int | None = None
        self._shards = self._opened = 0
        self._again = self._fallen = 0
        self._refused, self._failed = _Named(), _Named()
        self._timeline = Timeline()
        self._recent: deque[tuple[float, int]] = deque([(self._began, 0)])
        self._named: list[str] = []
        self._stride = 1

    def shards(self, number: int, limit: int | None = None) -> None:
        """Say how many shards are to be looked into, and how many images are wanted at most."""
        with self._lock:
            self._shards, self._limit = number, limit

    def opened(self) -> None:
        """Say that the units of one more shard are known."""
        with self._lock:
            self._opened += 1

    def plan(self, waiting: int) -> None:
        """Say how many images of the units that are known are still to be done."""
        with self._lock:
            self._planned = self._facts.images + waiting

    def done(self, name: str, facts: UnitFacts) -> None:
        """Add a unit that was published."""
        with self._lock:
            now = self._clock()
            self._facts += facts
            if self._units % self._stride == 0:
                self._named.append(name)
                if len(self._named) > MOST_UNITS:
                    self._named, self._stride = self._named[::2], 2 * self._stride
            self._units += 1
            self._last_unit = now
            self._timeline.add(now - self._began, self._facts.images)
            self._recent.append((now, self._facts.images))
            while len(self._recent) > RATE_UNITS and self._recent[1][0] < now - RATE_SECONDS:
                self._recent.popleft()
            while len(self._recent) > MOST_POINTS:
                self._recent.popleft()
        self.listener.unit(facts)

    def resources(self, cpus: float, gpus: float) -> None:
        """Say what the cluster has; of one that grows, the last word counts."""
        with self._lock:
            self._resources = {"cpus": cpus, "gpus": gpus}

    def spent(self, facts: UnitFacts) -> None:
        """Add what was spent on a unit that was not published; `facts` has costs only."""
        with self._lock:
            self._facts += facts

    def again(self) -> None:
        """Count a unit that failed and is tried again."""
        with self._lock:
            self._again += 1

    def fallen(self, number: int) -> None:
        """Say how often so far a unit was begun again because it lost its worker."""
        with self._lock:
            self._fallen = max(self._fallen, number)

    def refuse(self, uri: str, why: str) -> None:
        """Name a shard that is left out."""
        with self._lock:
            self._refused.add(uri, why)

    def fail(self, name: str, why: str) -> None:
        """Name a unit that is not done."""
        with self._lock:
            self._failed.add(name, why)

    def progress(self, run: str, outcome: Outcome) -> dict[str, Any]:
        """Return what `progress.json` holds."""
        with self._lock:
            now, facts = self._clock(), self._facts
            rate = self._rate(now)
            expected = self._expected()
            left = max(0, expected - facts.images)
            quarantined = facts.statuses.get("quarantined", 0)
            eta = 0.0 if not left and self._planned else left / rate if rate and self._planned else None
            return {
                "run": run,
                "outcome": outcome,
                "images_done": facts.images,
                "images_planned": self._planned,
                "images_expected": expected,
                "units_done": self._units,
                "images_per_s": round(rate, 2),
                "eta_s": None if eta is None else round(eta, 1),
                "quarantined": quarantined,
                "quarantine_rate": quarantined / facts.images if facts.images else 0.0,
                "batch_fill": facts.batch_fill,
                "retries": self._again + self._fallen,
                "refused_shards": self._refused.number,
                "failed_units": self._failed.number,
                "elapsed_s": round(now - self._began, 1),
                "last_unit_s_ago": round(now - self._last_unit, 1),
                "updated_at": iso_time(),
            }

    def record(
        self,
        about: RunAbout,
        outcome: Outcome,
        detail: str,
        corpus: Mapping[str, Any] | None,
        changes: ShardChanges | None = None,
    ) -> dict[str, Any]:
        """Return what `record.json` holds.

        Args:
            about: the run.
            outcome: how it stands.
            detail: why it stopped or failed.
            corpus: totals of the output's snapshot; None where they are not known.
            changes: what the run changed in the output; None while it works.
        """
        with self._lock:
            elapsed, facts = self._clock() - self._began, self._facts
            fields = asdict(about)
            plan = fields.pop("plan")
            return {
                "schema_version": SCHEMA_VERSION,
                **fields,
                "elapsed_s": round(elapsed, 2),
                "outcome": outcome,
                "detail": detail,
                "images": facts.images,
                "units": self._units,
                "statuses": dict(facts.statuses),
                "reasons": dict(facts.reasons),
                "clusters": dict(facts.clusters),
                "residual": _histogram(RESIDUAL_EDGES, facts.residual),
                "distance": _histogram(DISTANCE_EDGES, facts.distance),
                "stage_seconds": {name: round(spent, 3) for name, spent in facts.seconds.items()},
                "resources": dict(self._resources),
                "memory_mib": {"driver": process_peak_mib(), "worker": facts.peak_mib},
                "timeline": self._timeline.until(elapsed, facts.images),
                "retries": self._again + self._fallen,
                "batch_fill": None if facts.batch_fill is None else round(facts.batch_fill, 4),
                "refused_shards": dict(self._refused.first),
                "refused_shards_total": self._refused.number,
                "failed_units": dict(self._failed.first),
                "failed_units_total": self._failed.number,
                **told_changes(changes or ShardChanges()),
                "unit_names": list(self._named),
                "corpus": corpus
                and {
                    "images": corpus["rows"],
                    "statuses": corpus["statuses"],
                    "quarantined": corpus["quarantined"],
                },
                "plan": plan,
            }

    def _rate(self, now: float) -> float:
        before, images = self._recent[0]
        return (self._facts.images - images) / (now - before) if now > before else 0.0

    def _expected(self) -> int:
        """Return the planned images, and of shards that were not looked into as many as the others have."""
        unopened = max(0, self._shards - self._opened)
        expected = self._planned + (round(unopened * self._planned / self._opened) if self._opened else 0)
        return expected if self._limit is None else min(expected, max(self._limit, self._planned))


@dataclass
class _Named:
    """The first of what may be many, and how many there are."""

    first: dict[str, str] = field(default_factory=dict)
    number: int = 0

    def add(self, name: str, why: str) -> None:
        self.number += name not in self.first
        if name in self.first or len(self.first) < MOST_NAMED:
            self.first[name] = why


def told_changes(changes: ShardChanges) -> dict[str, Any]:
    """Return changes as a record has them: of each kind the first names, and how many there are."""
    told: dict[str, Any] = {}
    for kind, names in asdict(changes).items():
        told |= {f"{kind}_shards": list(names[:MOST_NAMED]), f"{kind}_shards_total": len(names)}
    return told


def _histogram(edges: tuple[float, ...], counts: tuple[int, ...]) -> dict[str, list[Any]]:
    return {"edges": list(edges), "counts": list(counts) or [0] * (len(edges) - 1)}
