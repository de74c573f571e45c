"""Ray Data steps that keep one block = one unit: whole blocks in, whole blocks out."""

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, Dataset, TaskPoolStrategy
from ray.data._internal.execution.execution_callback import ExecutionCallback

from acsr_ray.columns import UNIT
from acsr_ray.corpus.units import Unit
from acsr_ray.distributed.runtime import StageShares

REST_SECONDS = 0.03


class Rest(ExecutionCallback):
    """A pause after each step of Ray Data's control loop.

    Where tasks are done and the consumer is busy, the loop of Ray 2.60 may wait for nothing: measured, in a
    training worker that was fed by it the loop's thread took almost as much CPU as the training.
    """

    def on_execution_step(self, executor: object) -> None:
        """Sleep; a unit takes many times as long."""
        time.sleep(REST_SECONDS)


def unit_blocks(units: Sequence[Unit]) -> Dataset:
    """Return a dataset with one block of one row per unit; also stops Ray Data from splitting blocks."""
    context = ray.data.DataContext.get_current()
    context.target_max_block_size = None
    # Jobs print their own progress; Ray Data's plan and memory advice stay in its log files.
    context.enable_progress_bars = False
    context.issue_detectors_config.detectors = []
    context.custom_execution_callback_classes = [Rest]
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
