"""Ray Data steps that keep one block = one unit: whole blocks in, whole blocks out."""

import logging
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, Dataset

from acsr_ray.columns import UNIT
from acsr_ray.corpus.units import Unit

Stage = tuple[Callable[..., Callable[[pa.Table], pa.Table]], dict[str, Any]]
"""Class of a stage and its constructor's arguments."""


def unit_blocks(units: Sequence[Unit]) -> Dataset:
    """Return a dataset with one block of one row per unit; also stops Ray Data from splitting blocks."""
    context = ray.data.DataContext.get_current()
    context.target_max_block_size = None
    # Jobs print their own progress; Ray Data's plan and memory advice stay in its log files.
    context.enable_progress_bars = False
    context.issue_detectors_config.detectors = []
    # Ray restarts what dies after its start for ever; what dies before it is ready is tried three times more.
    context.max_consecutive_actor_init_deaths = 3
    context.max_errored_blocks = 0
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)
    # It warns of stages with CPUs and a GPU share, which are what is meant here.
    logging.getLogger("ray.data._internal.execution.operators.map_operator").setLevel(logging.ERROR)
    # Not from_arrow: it looks at every block in a task of a whole CPU, which waits for ever where training
    # workers hold all but a part of one.
    rows = [{UNIT: unit.to_json()} for unit in units]
    return ray.data.from_items(rows, override_num_blocks=len(rows))


class StageChain:
    """Stages of one actor, each applied to what the one before it returned.

    Args:
        stages: class and constructor's arguments of each; they are made where the actor runs.
    """

    def __init__(self, stages: Sequence[Stage]) -> None:
        self.stages = [make(**options) for make, options in stages]

    def __call__(self, table: pa.Table) -> pa.Table:
        """Pass a table through all stages."""
        for stage in self.stages:
            table = stage(table)
        return table


def chain_name(stages: Sequence[Stage]) -> str:
    """Return a name for a chain: those of its stages."""
    return "+".join(make.__name__ for make, _ in stages)


def map_in_actors(
    blocks: Dataset,
    *stages: Stage,
    actors: int,
    cpus: float,
    gpus: float = 0.0,
    chain: type[StageChain] = StageChain,
    options: Mapping[str, Any] = MappingProxyType({}),
) -> Dataset:
    """Apply stages to every block, in a pool of actors of fixed size.

    Args:
        blocks: what to apply them to.
        stages: class and constructor's arguments of each.
        actors: size of the pool.
        cpus: of each actor.
        gpus: share of each actor.
        chain: what runs the stages in an actor.
        options: further arguments of the chain.

    Actors also for stages without a model: beside as many actors as CPUs, Ray ends every idle worker within
    a second, and a task that needs a new one pays for its imports, several seconds.
    """
    # Named after its stages, so that Ray's lists of actors and processes say what runs where.
    named = type(chain_name(stages), (chain,), {})
    # Not map_batches: with GPUs it insists on a number of rows per call, and a call here is a whole block.
    return blocks.map_batches_internal(
        named,
        fn_constructor_kwargs={"stages": stages, **options},
        batch_size=None,
        batch_format="pyarrow",
        num_cpus=cpus,
        num_gpus=gpus or None,
        compute=ActorPoolStrategy(size=actors),
    )
