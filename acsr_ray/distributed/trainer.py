"""Training runs on Ray Train: workers, storage and retries around `training_worker`."""

import logging
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
from acsr_ray.distributed.journal import journal
from acsr_ray.distributed.runtime import (
    GPU_DEVICE,
    RaySettings,
    ResourceError,
    cluster_resources,
    ray_session,
    takes_gpus,
)
from acsr_ray.distributed.training_worker import WorkerTask, train_worker
from acsr_ray.training.checkpoint import final_weights, read_checkpoint
from acsr_ray.training.loop import resolve_device
from acsr_ray.training.order import Order
from acsr_ray.training.run import Training, train_here
from acsr_ray.training.settings import RunSettings
from acsr_ray.training.shards import TrainingShards

logger = logging.getLogger(__name__)

READING_SHARE = 0.25
"""Share of the CPUs that is left to the tasks that read and decode."""


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
    if run.workers == 0:
        order = training_order(training, shards, 1)
        weights, metrics = train_here(training, shards.units, order, validation, resolve_device(device))
        return Trained(weights, metrics)
    storage = run.storage or str(output.resolve().parent / ".runs")
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
    """Return the order of a run; a batch that the lanes do not divide gets fewer, a small corpus also.

    Raises:
        ConfigError: no number of lanes suits batch, workers and images.
    """
    config = training.optimizer
    batch = min(config.batch_size, shards.num_rows)
    unit_rows = tuple(unit.num_rows for unit in shards.units)
    for lanes in range(min(config.lanes, batch, len(unit_rows)), 0, -1):
        if batch % lanes or lanes % workers:
            continue
        order = Order(unit_rows, batch, lanes, max(1, config.shuffle_rows // lanes), training.seed)
        # A deal of few units may leave a lane too short.
        if all(order.serves(epoch) for epoch in range(config.epochs)):
            return order
    raise ConfigError(
        f"{workers} workers cannot share batches of {batch} of {shards.num_rows} images in at most "
        f"{config.lanes} lanes: a number of lanes must divide the batch, and the workers the lanes"
    )


def run_identity(training: Training, shards: TrainingShards, order: Order) -> str:
    """Return a digest of what decides the trained weights; workers and machines are not in it."""
    units = [[unit.content, unit.first, unit.last] for unit in shards.units]
    batches = [order.batch_size, order.lanes, order.window_rows]
    return json_digest([type(training).__name__, training.describe(), units, batches])


def place_workers(device: Device, run: RunSettings) -> Placement:
    """Divide the connected cluster between workers and the tasks that read for them."""
    total = cluster_resources()
    cpus, gpus = total.get("CPU", 0.0), total.get("GPU", 0.0)
    on_gpu = takes_gpus(device)
    share = run.gpus_per_worker or 1.0
    workers = run.workers or (max(1, int(gpus / share)) if on_gpu else 1)
    each = run.cpus_per_worker or max(0.1, round((1 - READING_SHARE) * cpus / workers, 3))
    if workers * each >= cpus or (on_gpu and workers * share > gpus):
        raise ResourceError(
            f"{workers} workers of {each:g} CPUs{f' and {share:g} GPUs' if on_gpu else ''} do not fit, with "
            f"their readers, a cluster of {cpus:g} CPUs and {gpus:g} GPUs"
        )
    tasks = max(1, int(cpus / workers))
    return Placement(
        device=GPU_DEVICE if on_gpu else "cpu",
        workers=workers,
        cpus=each,
        gpus=share if on_gpu else 0.0,
        threads=run.threads or max(1, int(cpus / workers)),
        decode_cpus=int(1000 * (cpus - workers * each) / (workers * tasks)) / 1000,
        decode_tasks=tasks,
    )


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
        return Trained(final_weights(Path(folder)), metrics)
