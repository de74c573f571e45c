"""What was planned for a run beside what came."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from acsr_ray.reporting.record import RunRecord


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
    """Return rate and seconds beside the plan; nothing where the plan was for another number of images.

    A plan stays with the output until the next one, and the start of Ray and of the workers decides the rate
    of a small night: beside the plan of a whole corpus it would always look slow.
    """
    if not record.images or not record.elapsed_s or not same_images(record):
        return []
    rate = record.images / record.elapsed_s
    found = [
        _comparison(record.plan, "images_per_s", rate),
        _comparison(record.plan, "seconds", record.elapsed_s),
    ]
    return [comparison for comparison in found if comparison is not None]


def planned_images(plan: Mapping[str, Any] | None) -> int | None:
    """Return how many images the plan was for."""
    count = (plan or {}).get("images_to_do")
    return count if isinstance(count, int) else None


def same_images(record: RunRecord) -> bool:
    """Return whether the run did as many images as the plan was for, to within one in a hundred."""
    planned, done = planned_images(record.plan), record.images
    return planned is not None and done is not None and abs(planned - done) <= max(1, planned // 100)


def _comparison(plan: Mapping[str, Any] | None, quantity: str, actual: float) -> Comparison | None:
    estimate = (plan or {}).get("estimate")
    spread = estimate.get(quantity) if isinstance(estimate, dict) else None
    if not isinstance(spread, dict):
        return None
    values = [spread.get(key) for key in ("low", "mean", "high")]
    if not all(isinstance(value, int | float) and math.isfinite(value) and value >= 0 for value in values):
        return None
    low, mean, high = (float(value) for value in values if value is not None)
    return Comparison(quantity, low, mean, high, actual) if mean > 0 and low <= high else None
