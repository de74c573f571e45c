"""The order in which training meets its images, the same for every number of workers.

A corpus is cut into units (runs of rows). Each epoch shuffles the units with its own seed and deals them to a
fixed number of lanes; a lane shuffles its rows within windows of several units. A step takes the same number
of rows from every lane. A worker serves whole lanes, so a global batch holds the same images whether one
worker or eight made it, and after a kill any step of any epoch can be found again from its number alone.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Window:
    """Units that a lane shuffles together: `order` (n,) puts their concatenated rows in training order."""

    epoch: int
    lane: int
    units: tuple[int, ...]
    order: NDArray[np.int64]


@dataclass(frozen=True)
class Step:
    """One global step: every lane gives its next rows."""

    epoch: int
    index: int
    """Within the epoch."""


@dataclass(frozen=True)
class Order:
    """Which rows every step of every epoch takes.

    Args:
        unit_rows: rows of each unit.
        batch_size: rows of a global step.
        lanes: streams that a batch is made of; divides `batch_size`, and the number of workers divides it.
        window_rows: rows that one lane shuffles together, at least.
        seed: fixes everything.

    Raises:
        ValueError: lanes do not divide the batch, or there are fewer units than lanes.
    """

    unit_rows: tuple[int, ...]
    batch_size: int
    lanes: int
    window_rows: int
    seed: int

    def __post_init__(self) -> None:
        """Check that every lane can give its share."""
        if self.batch_size % self.lanes:
            raise ValueError(f"{self.lanes} lanes do not divide a batch of {self.batch_size}")
        if len(self.unit_rows) < self.lanes:
            raise ValueError(f"{self.lanes} lanes need as many units, there are {len(self.unit_rows)}")

    @property
    def lane_batch(self) -> int:
        """Rows that a lane gives to a step."""
        return self.batch_size // self.lanes

    def steps(self, epoch: int) -> int:
        """Return the steps of an epoch: as many as its shortest lane can serve.

        Raises:
            ValueError: not even one.
        """
        steps = self._shortest(epoch) // self.lane_batch
        if not steps:
            raise ValueError(
                f"{sum(self.unit_rows)} images in {len(self.unit_rows)} units do not fill a batch of "
                f"{self.batch_size} from {self.lanes} lanes"
            )
        return steps

    def serves(self, epoch: int) -> bool:
        """Return whether an epoch has a step."""
        return self._shortest(epoch) >= self.lane_batch

    def _shortest(self, epoch: int) -> int:
        return min(sum(self.unit_rows[unit] for unit in lane) for lane in self.deal(epoch))

    def deal(self, epoch: int) -> list[list[int]]:
        """Return the units of each lane in an epoch, in order."""
        lanes: list[list[int]] = [[] for _ in range(self.lanes)]
        rows = [0] * self.lanes
        for unit in np.random.default_rng((self.seed, epoch)).permutation(len(self.unit_rows)).tolist():
            shortest = rows.index(min(rows))
            lanes[shortest].append(unit)
            rows[shortest] += self.unit_rows[unit]
        return lanes

    def windows(self, epoch: int, lane: int, units: Sequence[int]) -> Iterator[Window]:
        """Yield the windows of one lane of an epoch."""
        held: list[int] = []
        for position, unit in enumerate(units):
            held.append(unit)
            rows = sum(self.unit_rows[one] for one in held)
            if rows >= self.window_rows or position == len(units) - 1:
                generator = np.random.default_rng((self.seed, epoch, lane, position))
                yield Window(epoch, lane, tuple(held), generator.permutation(rows))
                held = []

    def events(self, lanes: Sequence[int], epoch: int, first: int = 0) -> Iterator[Window | Step]:
        """Yield what a worker of some lanes does in an epoch: load a window, or make a step.

        Args:
            lanes: the lanes that it serves.
            epoch: from 0.
            first: step to begin with; rows of earlier steps are left out of their window's `order`, and
                windows without others are not loaded.
        """
        dealt = self.deal(epoch)
        streams = {lane: self.windows(epoch, lane, dealt[lane]) for lane in lanes}
        skipped = dict.fromkeys(lanes, first * self.lane_batch)
        held = dict.fromkeys(lanes, 0)
        for index in range(first, self.steps(epoch)):
            for lane in lanes:
                while held[lane] < self.lane_batch:
                    window = next(streams[lane])
                    gone = min(skipped[lane], len(window.order))
                    skipped[lane] -= gone
                    left = len(window.order) - gone
                    if left:
                        yield Window(epoch, lane, window.units, window.order[gone:])
                        held[lane] += left
                held[lane] -= self.lane_batch
            yield Step(epoch, index)


def lanes_of(rank: int, workers: int, lanes: int) -> tuple[int, ...]:
    """Return the lanes that a worker serves.

    Raises:
        ValueError: the number of workers does not divide the lanes.
    """
    if lanes % workers:
        raise ValueError(f"{workers} workers do not divide {lanes} lanes")
    return tuple(range(rank, lanes, workers))
