"""The sample of a plan on Ray: as many processes at once as the job would have, with the same shares."""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import ray

from acsr_ray.config import Device, FailedError
from acsr_ray.corpus.sampling import draw_sample
from acsr_ray.corpus.units import Unit
from acsr_ray.distributed.runtime import (
    GPU_DEVICE,
    RaySettings,
    StageShares,
    cluster_resources,
    divide_resources,
    node_resources,
    ray_session,
    takes_gpus,
)
from acsr_ray.filesystems import Connection, connect, current_connection
from acsr_ray.purification.sizing import Sample, SampleTimer, StageRecipe, Work, merged
from acsr_ray.purification.stages import BATCH_SIZE

logger = logging.getLogger(__name__)

MOST_PROCESSES = 64
"""As many as the cores of a large node: enough to see what cores take from each other."""
REPEAT_S = 6.0
"""So long the model's stages are run again on a part of the sample."""
PATIENCE = 4
"""Times the sample's own time limit after which its processes are given up."""


@dataclass(frozen=True)
class Machine:
    """A cluster, or this machine."""

    cpus: float
    gpus: float
    nodes: int

    def as_json(self) -> dict[str, float]:
        """Return it as plain values."""
        return asdict(self)


@dataclass(frozen=True)
class SampleSize:
    """How much to sample."""

    images: int
    most_seconds: float
    unit_rows: int


@dataclass(frozen=True)
class SampleRun:
    """The sample, and what Ray needed for it."""

    sample: Sample
    machine: Machine
    """Where it ran."""
    device: str
    work: Work
    """How it was cut into batches there."""
    processes: int
    seconds: float
    """Of the sample alone."""
    start_s: float
    """To start or join Ray."""
    pools_s: float
    """For as many actors as the job has to get ready."""


class Timer(SampleTimer):
    """A `SampleTimer` on any node."""

    def reach(self, connection: Connection) -> None:
        """Reach stores so; an argument of a call, because Ray keeps those of constructors."""
        connect(connection)


class Bystander:
    """Stands for an actor of the job that reads or writes: takes as long to start, then waits."""

    def ready(self) -> bool:
        """Import what such an actor imports."""
        import acsr_ray.purification.stages

        return bool(acsr_ray.purification.stages)


def run_sample(
    settings: RaySettings,
    device: Device,
    recipe: StageRecipe,
    work: Work,
    units: Sequence[Unit],
    size: SampleSize,
    check: Callable[[Machine], object],
) -> SampleRun:
    """Start Ray as the job would, start as many actors, and time the sample in them.

    Args:
        settings: of Ray.
        device: as the job's.
        recipe: how the stages are made; its device is replaced by the one found.
        work: how rows are cut into batches; likewise.
        units: what is to be done.
        size: how much of it to sample.
        check: sees the cluster before anything is done there, and may raise.

    Raises:
        FailedError: every process of the sample died.
        ResourceError: a cluster that cannot be joined, or GPUs asked for where there are none.
    """
    began = time.perf_counter()
    with ray_session(settings):
        start_s = time.perf_counter() - began
        there = cluster_resources()
        nodes = [node for node in node_resources() if node.get("CPU", 0.0) > 0]
        machine = Machine(there.get("CPU", 1.0), there.get("GPU", 0.0), max(1, len(nodes)))
        gpus = machine.gpus if takes_gpus(device) else 0.0
        found = GPU_DEVICE if gpus else "cpu"
        check(machine)
        shares = divide_resources(machine.cpus, gpus, settings, len(units))
        began = time.perf_counter()
        rows = recipe.batch_size or BATCH_SIZE[found]
        work = replace(work, device=found, batch_size=rows)
        timers, others = _start(shares, replace(recipe, device=found, batch_size=rows), work)
        pools_s = time.perf_counter() - began
        for actor in others:
            ray.kill(actor)
        logger.info("%d processes take the sample, on %s", len(timers), found)
        ray.get([actor.reach.remote(current_connection()) for actor in timers])
        began = time.perf_counter()
        sample = _take(timers, units, size)
        seconds = time.perf_counter() - began
        for actor in timers:
            ray.kill(actor)
    return SampleRun(sample, machine, found, work, len(timers), seconds, start_s, pools_s)


def _start(shares: StageShares, recipe: StageRecipe, work: Work) -> tuple[list[Any], list[Any]]:
    """Start the sample's actors, and others so that there are as many as in the job; wait for all."""
    timer: Any = ray.remote(Timer).options(
        num_cpus=shares.encode_cpus + shares.purify_cpus,
        num_gpus=shares.encode_gpus + shares.purify_gpus or None,
    )
    bystander: Any = ray.remote(Bystander).options(num_cpus=shares.codec_cpus)
    timers = [timer.remote(recipe, work) for _ in range(min(shares.purify_actors, MOST_PROCESSES))]
    others = [bystander.remote() for _ in range(2 * shares.codec_actors + shares.encode_actors)]
    ray.get([actor.ready.remote() for actor in [*timers, *others]])
    return timers, others


def _take(timers: Sequence[Any], units: Sequence[Unit], size: SampleSize) -> Sample:
    """Deal the sample out to the processes and let all of them begin at once."""
    draws = draw_sample(units, size.images)
    parts = [draws[at :: len(timers)] or draws[at % len(draws) :][:1] for at in range(len(timers))]
    limits = (REPEAT_S, size.most_seconds, size.unit_rows)
    pending = [timer.take.remote(part, *limits) for timer, part in zip(timers, parts, strict=True)]
    samples, deaths = [], []
    for reference in pending:
        try:
            samples.append(ray.get(reference, timeout=PATIENCE * size.most_seconds + 60))
        except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError) as error:
            # An image may bring a worker down; the job finds out which one, a plan goes on without.
            deaths.append(str(error).strip().splitlines()[-1])
    if not samples:
        raise FailedError(f"every process of the sample died: {deaths[0]}")
    sample = merged(samples)
    return replace(sample, unreadable=(*sample.unreadable, *deaths))
