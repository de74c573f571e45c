"""Labelled shards as the units of a training run, from their footers and label columns alone."""

from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow.compute as pc

from acsr_ray.columns import IMAGE, LABEL
from acsr_ray.corpus.containers import open_parquet
from acsr_ray.corpus.labelled import label_names, numbered_names, parquet_shards
from acsr_ray.corpus.sources import CorpusError
from acsr_ray.corpus.units import Unit, plan_units

UNIT_ROWS = 500
UNIT_MEGABYTES = 32.0
UNITS_PER_LANE = 8
"""With fewer, the last unit of an epoch would leave out a large share of the images."""


@dataclass(frozen=True)
class TrainingShards:
    """The units of labelled shards, and what their labels mean."""

    units: tuple[Unit, ...]
    class_names: tuple[str, ...]

    @property
    def num_rows(self) -> int:
        """Images."""
        return sum(unit.num_rows for unit in self.units)


def plan_training(locations: Sequence[str], lanes: int, *, purified: bool = False) -> TrainingShards:
    """Cut labelled shards into units small enough for every lane to have several.

    Args:
        locations: Parquet files or folders of them, with columns `image` and `label`.
        lanes: see `acsr_ray.training.order`.
        purified: whether shards that were purified before will do; a row that was refused there counts as
            unreadable.

    Raises:
        CorpusError: no shard, a missing column, a null label, or one that has no name.
    """
    names: tuple[str, ...] = ()
    total, largest = 0, -1
    shards = parquet_shards(locations)
    for uri in shards:
        with open_parquet(uri) as file:
            missing = {IMAGE, LABEL} - set(file.schema_arrow.names)
            if missing:
                raise CorpusError(f"{uri} has no column {', '.join(sorted(missing))}")
            names = names or label_names(file.schema_arrow)
            labels = file.read(columns=[LABEL])[LABEL]
        if labels.null_count:
            raise CorpusError(f"{uri} has rows without a label")
        total += len(labels)
        if len(labels):
            extremes = pc.min_max(labels).as_py()
            lowest, highest = extremes["min"], extremes["max"]
            if lowest < 0 or (names and highest >= len(names)):
                raise CorpusError(f"{uri} has labels {lowest} to {highest} for {len(names)} class names")
            largest = max(largest, highest)
    rows = max(1, min(UNIT_ROWS, total // (lanes * UNITS_PER_LANE)))
    units = [
        unit
        for uri in shards
        for unit in plan_units(
            uri,
            image_column=IMAGE,
            unit_rows=rows,
            unit_megabytes=UNIT_MEGABYTES,
            limit=None,
            purified=purified,
        )
    ]
    return TrainingShards(tuple(units), names or numbered_names(largest + 1))
