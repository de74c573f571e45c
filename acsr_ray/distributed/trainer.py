"""Training runs on Ray Train: workers, storage and retries around `training_worker`."""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
from ray.train.v2.api.exceptions import TrainingFailedError
from torch import Tensor

from acsr_ray.artifacts import json_digest
from acsr_ray.config import AcsrError, ConfigError, Device
from acsr_ray.corpus.sources import absolute_uri
from acsr_ray.distributed.journal import journal
from acsr_ray.distributed.runtime import (
    GPU_DEVICE,
    RaySettings,
    ResourceError,
    node_resources,
    ray_session,
    takes_gpus,
)
from acsr_ray.distributed.training_worker import HELD_OUT, WorkerTask, train_worker
from acsr_ray.training.checkpoint import final_weights, read_checkpoint
from acsr_ray.training.loop import resolve_device
from acsr_ray.training.order import Order
from acsr_ray.training.run import Training, train_here
from acsr_ray.training.settings import RunSettings
from acsr_ray.training.shards import TrainingShards

logger = logging.getLogger(__name__)

READING_SHARE = 0.25
"""Share of the CPUs that is left to the tasks that read and decode."""
MOST_READERS = 16
"""Reading tasks of one worker at a time."""


class TrainingError(AcsrError, RuntimeError):
    """A run that failed more often than it may; the same command goes on from its last checkpoint."""


@dataclass(frozen=True)
class Trained:
    """Weights to save and closing metrics of a finished run."""

    weights: dict[str, Tensor]
    metrics: dict[str, Any]


@dataclass(frozen=True)
class Placement:
    """What a run takes of the cluster."""

    device: str
    workers: int
    cpus: float
    gpus: float
    threads: int
    decode_cpus: float
    decode_tasks: int


def run_training(
    training: Training,
    shards: TrainingShards,
    *,
    validation: Sequence[str],
    output: Path,
    device: Device,
    run: RunSettings,
    settings: RaySettings,
) -> Trained:
    """Train to the end, going on where a run of the same name stopped.

    Args:
        training: what is trained.
        shards: training images.
        validation: shards of the closing metrics.
        output: folder of the artifact, which names the run and, by default, holds its storage beside it.
        device: `auto` takes the cluster's GPUs if it has some.
        run: workers, checkpoints, retries.
        settings: where Ray runs.

    Raises:
        ConfigError: batch, lanes and workers that do not fit each other or the images.
        ResourceError: the cluster has too little for the workers.
        TrainingError: the run failed too often.
    """
    # Ray Train's workers run in a folder of their own.
    validation = [absolute_uri(location) for location in validation]
    if run.workers == 0:
        order = training_order(training, shards, 1)
        weights, metrics = train_here(training, shards.units, order, validation, resolve_device(device))
        return Trained(weights, metrics)
    storage = run.storage or str(output.parent / ".runs")
    if "://" not in storage:
        storage = str(Path(storage).resolve())
    with ray_session(settings):
        placement = place_workers(device, run)
        order = training_order(training, shards, placement.workers)
        identity = run_identity(training, shards, order)
        name = run.name or f"{output.name}-{identity[:8]}"
        logger.info(
            "run %s: %d workers on %s, %g CPUs and %g GPUs each, %d threads; checkpoints in %s",
            *(name, placement.workers, placement.device, placement.cpus, placement.gpus, placement.threads),
            storage,
        )
        with journal() as lines:
            task = WorkerTask(
                training=training,
                units=shards.units,
                order=order,
                validation=tuple(validation),
                identity=identity,
                checkpoint_seconds=run.checkpoint_seconds,
                checkpoint_steps=run.checkpoint_steps,
                device=placement.device,
                threads=placement.threads,
                decode_cpus=placement.decode_cpus,
                decode_tasks=placement.decode_tasks,
                journal=lines,
                tensorboard=None if "://" in storage else str(Path(storage) / name / "tensorboard"),
            )
            return _finished(_fit(task, placement, run, name, storage), identity)


def training_order(training: Training, shards: TrainingShards, workers: int) -> Order:
    """Return the order of a run, which does not depend on the number of workers.

    A batch that the lanes do not divide gets fewer lanes, a small corpus also.

    Raises:
        ConfigError: the workers do not divide the lanes, or the parts of a worker's share are not equal.
    """
    config = training.optimizer
    batch = min(config.batch_size, shards.num_rows)
    unit_rows = tuple(unit.num_rows for unit in shards.units)
    for lanes in range(min(config.lanes, batch, len(unit_rows)), 0, -1):
        if batch % lanes:
            continue
        order = Order(unit_rows, batch, lanes, max(1, config.shuffle_rows // lanes), training.seed)
        # A deal of few units may leave a lane too short.
        if all(order.serves(epoch) for epoch in range(config.epochs)):
            break
    if lanes % workers:
        raise ConfigError(
            f"{workers} workers cannot divide the {lanes} lanes of batches of {batch} of {shards.num_rows} "
            f"images; choose --run.workers and --optimizer.lanes (now {config.lanes}) so that they can"
        )
    if batch // workers % config.accumulate:
        raise ConfigError(
            f"--optimizer.accumulate {config.accumulate} does not divide a worker's {batch // workers} images"
        )
    return order


def run_identity(training: Training, shards: TrainingShards, order: Order) -> str:
    """Return a digest of what decides the trained weights; workers and machines are not in it."""
    units = [[unit.content, unit.first, unit.last] for unit in shards.units]
    batches = [order.batch_size, order.lanes, order.window_rows]
    return json_digest([type(training).__name__, training.describe(), units, batches])


def place_workers(device: Device, run: RunSettings) -> Placement:
    """Divide the connected cluster between workers and the tasks that read for them.

    A worker lives on one node, so what counts is each node's room, not their sum.

    Raises:
        ResourceError: the workers do not fit, or two of them would share a card, which NCCL refuses.
    """
    on_gpu = takes_gpus(device)
    share = (run.gpus_per_worker or 1.0) if on_gpu else 0.0
    rooms = [
        (node.get("CPU", 0.0), _shares(node.get("GPU", 0.0), share) if on_gpu else None)
        for node in node_resources()
    ]
    cards = sum(slots or 0 for _, slots in rooms)
    workers = run.workers or (max(1, cards) if on_gpu else 1)
    if workers > 1 and on_gpu and share <= 0.5 and GPU_DEVICE == "cuda":
        raise ResourceError(f"{workers} workers of {share:g} GPUs could share a card, which NCCL refuses")
    each = run.cpus_per_worker or _cpus_per_worker(rooms, workers)
    if not each or _fitting(rooms, each) < workers:
        sizes = ", ".join(f"{cpus:g} CPUs" + (f" and {s} such shares" if on_gpu else "") for cpus, s in rooms)
        raise ResourceError(
            f"{workers} workers{f' of {share:g} GPUs' if on_gpu else ''}"
            f"{f' of {each:g} CPUs' if each else ''} do not fit the cluster's nodes, which have {sizes}"
        )
    cpus = sum(cpus for cpus, _ in rooms)
    left = cpus - workers * each
    # What a node's workers divide is that node's CPUs, not the cluster's.
    node = max(cpus for cpus, _ in rooms)
    threads = max(1, int(node / math.ceil(workers / sum(cpus >= each for cpus, _ in rooms))))
    tasks = min(MOST_READERS, threads)
    if left <= 0:
        raise ResourceError(
            f"{workers} workers of {each:g} CPUs leave nothing of {cpus:g} CPUs to the tasks that read"
        )
    return Placement(
        device=GPU_DEVICE if on_gpu else "cpu",
        workers=workers,
        cpus=each,
        gpus=share,
        threads=run.threads or threads,
        decode_cpus=min(1.0, int(1000 * left / (workers * tasks)) / 1000),
        decode_tasks=tasks,
    )


def _shares(gpus: float, share: float) -> int:
    """Return how many shares a node's cards hold; a part of a card lies on one card."""
    return int(gpus) * int(1 / share + 1e-9) if share <= 1 else int(gpus / share + 1e-9)


def _fitting(rooms: Sequence[tuple[float, int | None]], each: float) -> int:
    """Return how many workers of `each` CPUs the nodes (CPUs, GPU shares or None) hold."""
    by_cpus = [(int(cpus / each + 1e-9), slots) for cpus, slots in rooms]
    return sum(fitting if slots is None else min(fitting, slots) for fitting, slots in by_cpus)


def _cpus_per_worker(rooms: Sequence[tuple[float, int | None]], workers: int) -> float | None:
    """Return the most CPUs that all workers can have while their readers keep some; None if none does."""
    shares = [_spare(cpus, here) / here for cpus, _ in rooms for here in range(1, workers + 1)]

    def hold(each: float) -> int:
        return sum(
            max(
                (
                    k
                    for k in range(1, min(workers, slots or workers) + 1)
                    if k * each <= _spare(cpus, k) + 1e-9
                ),
                default=0,
            )
            for cpus, slots in rooms
            if slots != 0
        )

    return max(
        (math.floor(1000 * each) / 1000 for each in shares if each > 0 and hold(each) >= workers),
        default=None,
    )


def _spare(cpus: float, here: int) -> float:
    """Return the CPUs of a node that so many workers may take together.

    Ray Data divides what they leave among their readers in whole CPUs, so a node with enough keeps one per
    worker or a quarter, whichever is more; a smaller one keeps a quarter.
    """
    kept = max(here, math.ceil(cpus * READING_SHARE))
    return cpus - kept if cpus > kept else (1 - READING_SHARE) * cpus


def _fit(
    task: WorkerTask, placement: Placement, run: RunSettings, name: str, storage: str
) -> ray.train.Checkpoint:
    resources = {"CPU": placement.cpus}
    if placement.gpus:
        resources["GPU"] = placement.gpus
    trainer = ray.train.torch.TorchTrainer(
        train_worker,
        train_loop_config={"task": task},
        torch_config=ray.train.torch.TorchConfig(backend="nccl" if placement.device == "cuda" else "gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=placement.workers, use_gpu=placement.gpus > 0, resources_per_worker=resources
        ),
        run_config=ray.train.RunConfig(
            name=name,
            storage_path=storage,
            failure_config=ray.train.FailureConfig(max_failures=run.max_failures),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=run.keep),
        ),
    )
    try:
        result = trainer.fit()
    except TrainingFailedError as error:
        raise TrainingError(f"run {name} failed: {str(error).strip().splitlines()[-1]}") from error
    if result.checkpoint is None:
        raise TrainingError(f"run {name} ended without a checkpoint in {storage}")
    return result.checkpoint


def _finished(checkpoint: ray.train.Checkpoint, identity: str) -> Trained:
    with checkpoint.as_directory() as folder:
        found = read_checkpoint(Path(folder), identity)
        if found.metrics is None:
            raise TrainingError(f"the last checkpoint, {checkpoint.path}, is not of the end of the run")
        metrics = {**found.metrics, "epoch_losses": list(found.position.losses)}
        del metrics[HELD_OUT]
        return Trained(final_weights(Path(folder)), metrics)
