"""What a Ray Train worker runs: the training loop between checkpoints, fed by its own Ray Data pipeline."""

import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray.data
import ray.train
import ray.train.torch
import torch
import torch.distributed
from ray.data._internal.execution.execution_callback import ExecutionCallback
from tensorboardX import SummaryWriter
from torch import Tensor, nn

from acsr_ray.artifacts import ArtifactError, json_digest
from acsr_ray.columns import UNIT
from acsr_ray.corpus.labelled import read_labelled
from acsr_ray.corpus.units import Unit
from acsr_ray.distributed.blocks import unit_blocks
from acsr_ray.training.checkpoint import Position, read_checkpoint, restore_checkpoint, save_checkpoint
from acsr_ray.training.feed import Rows, batches, decode_unit, needed_units
from acsr_ray.training.loop import EpochStats, Stepper
from acsr_ray.training.order import Order, lanes_of
from acsr_ray.training.run import Training, train_steps

SPAN_UNITS = 2000
"""Units of one Ray Data pipeline; a new one is started for the next epochs."""
AGREE_EVERY = 10
"""Steps between two looks at the clock; all workers must write a checkpoint at the same step."""


HELD_OUT = "validation_digest"
REST_SECONDS = 0.03


class Rest(ExecutionCallback):
    """A pause after each step of Ray Data's control loop, which shares the process with the training.

    Where tasks are done and the consumer is busy, the loop of Ray 2.60 may wait for nothing: measured, its
    thread took almost as much CPU as the training.
    """

    def on_execution_step(self, executor: object) -> None:
        """Sleep; a unit takes many times as long."""
        time.sleep(REST_SECONDS)


@dataclass(frozen=True)
class WorkerTask:
    """What every worker of a run is told."""

    training: Training
    units: tuple[Unit, ...]
    order: Order
    validation: tuple[str, ...]
    identity: str
    checkpoint_seconds: float
    checkpoint_steps: int | None
    device: str
    threads: int
    decode_cpus: float
    decode_tasks: int
    tensorboard: str | None
    journal: Any
    """Actor of `acsr_ray.distributed.journal`."""


class DecodeUnits:
    """Read and decode the unit named in the only row of a table, for training."""

    def __init__(self, image_size: int) -> None:
        self.image_size = image_size

    def __call__(self, table: pa.Table) -> pa.Table:
        """Return a row per image: pixels, label, row of the unit."""
        (text,) = table[UNIT].to_pylist()
        return rows_to_table(decode_unit(Unit.from_json(text), self.image_size))


def rows_to_table(rows: Rows) -> pa.Table:
    """Return decoded rows as a table, to travel through the object store."""
    flat = np.ascontiguousarray(rows.pixels).reshape(len(rows.labels), -1)
    pixels = pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(flat.shape[1]), len(flat), [None, pa.py_buffer(flat)]
    )
    unreadable = np.full(len(flat), rows.unreadable, np.int32)
    return pa.table({"pixels": pixels, "label": rows.labels, "source": rows.source, "unreadable": unreadable})


def table_to_rows(table: pa.Table, image_size: int) -> Rows:
    """Restore from `rows_to_table`; the pixels are not copied."""
    (pixels,) = (
        table["pixels"].combine_chunks().chunks if table["pixels"].num_chunks > 1 else table["pixels"].chunks
    )
    width = 3 * image_size * image_size
    flat = np.frombuffer(pixels.buffers()[1], np.uint8)[pixels.offset * width :][: len(pixels) * width]
    shape = (len(pixels), image_size, image_size, 3)
    return Rows(
        flat.reshape(shape),
        table["label"].to_numpy(),
        table["source"].to_numpy(),
        table["unreadable"][0].as_py(),
    )


def train_worker(config: dict[str, Any]) -> None:
    """Train from the last good checkpoint to the end; the closing checkpoint holds the metrics."""
    task: WorkerTask = config["task"]
    torch.set_num_threads(task.threads)
    context = ray.train.get_context()
    rank, workers = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device() if task.device == "cuda" else torch.device("cpu")
    _Run(task, rank, workers, device).run()


class _Run:
    """One worker's part of a run."""

    def __init__(self, task: WorkerTask, rank: int, workers: int, device: torch.device) -> None:
        self.task, self.rank, self.workers, self.device = task, rank, workers, device
        training, order = task.training, task.order
        self.epochs = training.optimizer.epochs
        self.lanes = lanes_of(rank, workers, order.lanes)
        self.steps = [order.steps(epoch) for epoch in range(self.epochs)]
        model = training.build().to(device)
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if workers > 1 and device.type == "cuda":
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        network = training.network(model)
        if workers > 1:
            ids = [device] if device.type == "cuda" else None
            network = nn.parallel.DistributedDataParallel(network, device_ids=ids)
        self.model = model
        self.stepper = Stepper(model, training.optimizer, sum(self.steps), network)
        self.objective = training.objective(model, network, task.units)
        self.position = Position()
        self.metrics: dict[str, Any] | None = None
        self.unreadable = 0
        self.board = None
        if task.tensorboard is not None and not rank:
            self.board = SummaryWriter(task.tensorboard)

    def run(self) -> None:
        batch_norm = any(isinstance(part, nn.BatchNorm2d) for part in self.model.modules())
        if self.workers > 1 and batch_norm:
            self._say(
                "batch statistics are each worker's own on CPUs; with a -gn network they would not matter"
            )
        self._restore()
        if self.metrics is not None and self.metrics.get(HELD_OUT) == self._held_out():
            return
        started, saved, images = time.monotonic(), time.monotonic(), 0
        losses = torch.tensor(self.position.loss_sum, device=self.device)
        for batch, loss in train_steps(
            self.task.training, self.objective, self.stepper, self._batches(), self.device
        ):
            step = batch.step
            self.unreadable += batch.unreadable if step.epoch == 0 else 0
            losses = losses + self._mean(loss)
            images += self.task.order.batch_size
            last = step.index + 1 == self.steps[step.epoch]
            self.position = replace(
                self.position,
                epoch=step.epoch + last,
                step=0 if last else step.index + 1,
                taken=self.stepper.taken,
            )
            if last:
                mean = losses.item() / self.steps[step.epoch]
                self.position = replace(self.position, losses=(*self.position.losses, mean), loss_sum=0.0)
                elapsed = time.monotonic() - started
                self._tell(EpochStats(step.epoch + 1, mean, elapsed, images))
                started, images, losses = time.monotonic(), 0, torch.zeros_like(losses)
            if (last and self.position.epoch < self.epochs) or self._due(saved):
                self.position = replace(self.position, loss_sum=losses.item())
                self._count_unreadable()
                self._report()
                saved = time.monotonic()
        self._count_unreadable()
        self.metrics = {
            "unreadable_images": self.position.unreadable,
            HELD_OUT: self._held_out(),
            **self._closing_metrics(),
        }
        self._report()
        if self.board is not None:
            self.board.close()

    def _batches(self) -> Iterator[Any]:
        order, position = self.task.order, self.position
        epoch = position.epoch
        while epoch < self.epochs:
            events = list(order.events(self.lanes, epoch, position.step if epoch == position.epoch else 0))
            count = sum(1 for _ in needed_units(events))
            epoch += 1
            while epoch < self.epochs and count < SPAN_UNITS:
                more = list(order.events(self.lanes, epoch))
                count += sum(1 for _ in needed_units(more))
                events += more
                epoch += 1
            yield from batches(order, self.lanes, events, self._fetch(list(needed_units(events))))

    def _fetch(self, wanted: Sequence[int]) -> Iterator[Rows]:
        """Yield decoded units in order, read ahead by Ray tasks."""
        context = ray.data.DataContext.get_current()
        context.execution_options.preserve_order = True
        context.custom_execution_callback_classes = [Rest]
        context.execution_options.resource_limits = ray.data.ExecutionResources(
            cpu=self.task.decode_cpus * self.task.decode_tasks
        )
        size = self.task.training.image_size
        decoded = unit_blocks([self.task.units[unit] for unit in wanted]).map_batches(
            DecodeUnits(size),
            batch_size=None,
            batch_format="pyarrow",
            num_cpus=self.task.decode_cpus,
            compute=ray.data.TaskPoolStrategy(self.task.decode_tasks),
        )
        for table in decoded.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=2):
            yield table_to_rows(table, size)

    def _held_out(self) -> str:
        """Return what the closing metrics are measured on."""
        return json_digest(list(self.task.validation))

    def _restore(self) -> None:
        """Go on from the newest checkpoint that is whole; older ones stand in for a damaged one.

        The first worker chooses for all: workers that went on from different steps would train nonsense.
        """
        newest = ray.train.get_checkpoint()
        if newest is None:
            return
        reported = [entry.checkpoint for entry in ray.train.get_all_reported_checkpoints()]
        known = {checkpoint.path: checkpoint for checkpoint in [*reported, newest]}
        chosen = [None if self.rank else self._newest_whole(list(reversed(known.values())))]
        if self.workers > 1:
            torch.distributed.broadcast_object_list(chosen, 0)
        if chosen[0] is None:
            return
        with known[chosen[0]].as_directory() as folder:
            found = read_checkpoint(Path(folder), self.task.identity)
            restore_checkpoint(Path(folder), self.stepper, found.position)
        self.position, self.metrics = found.position, found.metrics
        self._say(f"going on at epoch {found.position.epoch + 1}, step {found.position.step + 1}")

    def _newest_whole(self, checkpoints: Sequence[ray.train.Checkpoint]) -> str | None:
        for checkpoint in checkpoints:
            try:
                with checkpoint.as_directory() as folder:
                    read_checkpoint(Path(folder), self.task.identity)
            except (ArtifactError, OSError) as error:
                self._say(f"checkpoint {checkpoint.path} is passed over: {error}")
                continue
            path: str = checkpoint.path
            return path
        return None

    def _due(self, saved: float) -> bool:
        """Return whether all workers write a checkpoint now."""
        taken, every = self.stepper.taken, self.task.checkpoint_steps
        if every is not None:
            return taken % every == 0
        if taken % AGREE_EVERY:
            return False
        due = torch.tensor(float(time.monotonic() - saved > self.task.checkpoint_seconds), device=self.device)
        if self.workers > 1:
            torch.distributed.broadcast(due, 0)
        return bool(due)

    def _mean(self, loss: Tensor) -> Tensor:
        if self.workers > 1:
            torch.distributed.all_reduce(loss)
        return loss / self.workers

    def _count_unreadable(self) -> None:
        """Add what all workers have counted since the last checkpoint."""
        found = torch.tensor(float(self.unreadable), device=self.device)
        if self.workers > 1:
            torch.distributed.all_reduce(found)
        self.position = replace(self.position, unreadable=self.position.unreadable + int(found))
        self.unreadable = 0

    def _report(self) -> None:
        metrics = {
            "epoch": self.position.epoch,
            "step": self.position.step,
            "taken": self.position.taken,
            "losses": list(self.position.losses),
            "lr": self.stepper.optimizer.param_groups[0]["lr"],
            **(self.metrics or {}),
        }
        if self.rank:
            ray.train.report(metrics)
            return
        with tempfile.TemporaryDirectory() as folder:
            save_checkpoint(Path(folder), self.stepper, self.position, self.task.identity, self.metrics)
            ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))

    def _closing_metrics(self) -> dict[str, Any]:
        """Return the metrics on validation shards, measured by the first worker while the others wait."""
        if self.rank or not self.task.validation:
            return {}
        training = self.task.training
        self.model.load_state_dict(self.stepper.weights())
        self.model.eval()
        held_out = read_labelled(self.task.validation, training.image_size)
        return training.closing_metrics(self.model, held_out, str(self.device))

    def _say(self, line: str) -> None:
        if not self.rank:
            self.task.journal.add.remote(line)

    def _tell(self, stats: EpochStats) -> None:
        self._say(str(stats))
        if self.board is not None:
            self.board.add_scalar("loss", stats.loss, stats.epoch)
            self.board.add_scalar("images_per_second", stats.images_per_second, stats.epoch)
            self.board.add_scalar("lr", self.stepper.optimizer.param_groups[0]["lr"], stats.epoch)
            self.board.flush()
