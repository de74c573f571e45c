"""What was planned for a run beside what came."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from acsr_ray.reporting.record import EarlierRuns, RunRecord, with_run

_WHO = {"driver": "the driver", "worker": "a worker"}


@dataclass(frozen=True)
class Comparison:
    """One planned quantity with its range, and the actual value."""

    quantity: str
    low: float
    mean: float
    high: float
    actual: float

    @property
    def ratio(self) -> float:
        """Actual over planned."""
        return self.actual / self.mean

    @property
    def is_inside(self) -> bool:
        """Whether the actual value lies in the planned range."""
        return self.low <= self.actual <= self.high


def compare(record: RunRecord) -> list[Comparison]:
    """Return what came beside the plan; nothing where the plan was for another number of images.

    Runs that were cut short count together with the one that ended their work. A plan stays with the output
    until the next one, and the start of Ray and of the workers decides the rate of a small night: beside the
    plan of a whole corpus it would always look slow.
    """
    done = done_of_plan(record)
    if not record.images or not done.elapsed_s or not same_images(record):
        return []
    actual: dict[str, float | None] = {
        "images_per_s": done.images / done.elapsed_s,
        "seconds": done.elapsed_s,
        "cpu_hours": done.cpu_s / 3600 or None,
        "gpu_hours": done.gpu_s / 3600 or None,
        "quarantined": float(done.quarantined),
    }
    estimate = _mapping((record.plan or {}).get("estimate"))
    spreads = [(name, estimate.get(name), value) for name, value in actual.items()]
    memory = _mapping(estimate.get("memory_mib"))
    spreads += [(f"memory of {_WHO[kind]}", memory.get(kind), done.memory_mib.get(kind)) for kind in _WHO]
    found = [_comparison(*spread) for spread in spreads]
    return [comparison for comparison in found if comparison is not None]


def done_of_plan(record: RunRecord) -> EarlierRuns:
    """Return the sums over a run and those that it goes on from."""
    return with_run(record.earlier, record)


def planned_images(plan: Mapping[str, Any] | None) -> int | None:
    """Return how many images the plan was for."""
    count = (plan or {}).get("images_to_do")
    return count if isinstance(count, int) else None


def same_images(record: RunRecord) -> bool:
    """Return whether as many images were done as the plan was for, to within one in a hundred."""
    planned, done = planned_images(record.plan), record.images and done_of_plan(record).images
    return planned is not None and done is not None and abs(planned - done) <= max(1, planned // 100)


def _mapping(value: Any) -> Mapping[str, Any]:  # noqa: ANN401  (whatever a file has there)
    return value if isinstance(value, dict) else {}


def _comparison(quantity: str, spread: Any, actual: float | None) -> Comparison | None:  # noqa: ANN401
    if not isinstance(spread, dict) or actual is None:
        return None
    values = [spread.get(key) for key in ("low", "mean", "high")]
    if not all(isinstance(value, int | float) and math.isfinite(value) and value >= 0 for value in values):
        return None
    low, mean, high = (float(value) for value in values if value is not None)
    return Comparison(quantity, low, mean, high, actual) if mean > 0 and low <= high else None
