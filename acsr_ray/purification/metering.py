"""What the stages of a chain cost: seconds of each, and how full the calls of encoder and solver were."""

import time
from collections import Counter, defaultdict
from collections.abc import Callable

import pyarrow as pa

from acsr_ray.columns import HEIGHT, PIXELS, WIDTH
from acsr_ray.corpus.facts import UnitFacts, process_peak_mib
from acsr_ray.purification.stages import rows_per_call


class Meter:
    """Takes the costs of stages that are called through it, until they are read."""

    def __init__(self) -> None:
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._given = self._room = 0

    def call(self, stage: Callable[[pa.Table], pa.Table], table: pa.Table) -> pa.Table:
        """Apply a stage to a table; what a stage that raises has cost counts too."""
        batch_size: int | None = getattr(stage, "batch_size", None)
        if batch_size is not None:
            given, room = batch_room(table, batch_size)
            self._given += given
            self._room += room
        began = time.perf_counter()
        try:
            return stage(table)
        finally:
            self._seconds[type(stage).__name__] += time.perf_counter() - began

    def read(self) -> UnitFacts:
        """Return the costs since the last reading."""
        seconds = {name: round(value, 6) for name, value in self._seconds.items()}
        facts = UnitFacts(
            seconds=seconds, rows_given=self._given, rows_room=self._room, peak_mib=process_peak_mib()
        )
        self._seconds.clear()
        self._given = self._room = 0
        return facts


def batch_room(table: pa.Table, batch_size: int) -> tuple[int, int]:
    """Return the decoded rows of a table, and the rows that there is room for in the calls they take."""
    sizes = zip(*(table[name].to_pylist() for name in (HEIGHT, WIDTH)), strict=True)
    decoded = table[PIXELS].is_valid().to_pylist()
    rows = Counter(size for size, there in zip(sizes, decoded, strict=True) if there)
    room = 0
    for (height, width), count in rows.items():
        step = rows_per_call(height, width, batch_size)
        room += -(-count // step) * step
    return rows.total(), room
