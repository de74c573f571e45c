"""Ray Data steps that keep one block = one unit: whole blocks in, whole blocks out."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, Dataset, TaskPoolStrategy

from acsr_ray.columns import UNIT
from acsr_ray.corpus.units import Unit
from acsr_ray.distributed.runtime import StageShares


def unit_blocks(units: Sequence[Unit]) -> Dataset:
    """Return a dataset with one block of one row per unit; also stops Ray Data from splitting blocks."""
    context = ray.data.DataContext.get_current()
    context.target_max_block_size = None
    # Jobs print their own progress; Ray Data's plan and memory advice stay in its log files.
    context.enable_progress_bars = False
    context.issue_detectors_config.detectors = []
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)
    # Not from_arrow: it looks at every block in a task of a whole CPU, which waits for ever where training
    # workers hold all but a part of one.
    rows = [{UNIT: unit.to_json()} for unit in units]
    return ray.data.from_items(rows, override_num_blocks=len(rows))


def map_in_tasks(blocks: Dataset, stage: Callable[[pa.Table], pa.Table], shares: StageShares) -> Dataset:
    """Apply a stage without state to every block, in short-lived tasks."""
    return blocks.map_batches(
        stage,
        batch_size=None,
        batch_format="pyarrow",
        num_cpus=shares.task_cpus,
        compute=TaskPoolStrategy(shares.tasks),
    )


def map_in_actors(
    blocks: Dataset,
    stage: type[Callable[[pa.Table], pa.Table]],
    options: dict[str, Any],
    *,
    actors: int,
    cpus: float,
    gpus: float = 0.0,
) -> Dataset:
    """Apply a stage that loads a model to every block, in a pool of actors of fixed size."""
    # Not map_batches: with GPUs it insists on a number of rows per call, and a call here is a whole block.
    return blocks.map_batches_internal(
        stage,
        fn_constructor_kwargs=options,
        batch_size=None,
        batch_format="pyarrow",
        num_cpus=cpus,
        num_gpus=gpus or None,
        compute=ActorPoolStrategy(size=actors),
    )
