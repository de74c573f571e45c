"""A sample of a corpus that is the same every time and spread over all of it, at the price of few reads.

Images lie in units, and a read brings a whole unit. So the sample takes a few rows from each of a number of
units at even distances, and keeps of all other rows of these units the one thing that decides their cost:
their size.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from acsr_ray.corpus.headers import Size, image_size
from acsr_ray.corpus.units import Unit

ROWS_PER_UNIT = 16
"""Rows taken from a unit where there are enough units."""


@dataclass(frozen=True)
class Draw:
    """Rows to take from one unit, by their position in it, ascending."""

    unit: Unit
    rows: tuple[int, ...]


def draw_sample(units: Sequence[Unit], images: int) -> list[Draw]:
    """Choose so many rows, or a few more, spread evenly over the units; fewer only where there are fewer.

    The draws come in an order in which also the first few of them are spread out, for a sample that has to
    stop early.

    Args:
        units: of the corpus, in order.
        images: how many rows.
    """
    ends = np.cumsum([unit.num_rows for unit in units])
    if not len(ends):
        return []
    total = int(ends[-1])
    images = min(images, total)
    places = -(-images // ROWS_PER_UNIT)
    while True:
        targets = (np.arange(places) + 0.5) * total / places
        hits = Counter(np.searchsorted(ends, targets, side="right").tolist())
        per_hit = -(-images // places)
        taken = {at: min(units[at].num_rows, per_hit * count) for at, count in hits.items()}
        # A place per row, at the latest, is enough.
        if sum(taken.values()) >= images:
            break
        places *= 2
    draws = [Draw(units[at], _spread(units[at].num_rows, count)) for at, count in sorted(taken.items())]
    order = np.random.default_rng(0).permutation(len(draws)).tolist()
    needed = np.searchsorted(np.cumsum([len(draws[at].rows) for at in order]), images) + 1
    return [draws[at] for at in order[:needed]]


def _spread(length: int, count: int) -> tuple[int, ...]:
    return tuple(((np.arange(count) + 0.5) * length / count).astype(int).tolist())


def size_counts(cells: Sequence[bytes | None]) -> Counter[Size]:
    """Return how many images of each (height, width) there are, by their headers; others are left out."""
    sizes = (image_size(data) for data in cells)
    return Counter(size for size in sizes if size is not None)
