"""One training run in plain torch: what a worker does with its batches, wherever they come from."""

import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from acsr_ray.corpus.labelled import LabelledImages, read_labelled
from acsr_ray.corpus.units import Unit
from acsr_ray.training.feed import AUGMENTATION, Batch, batches, decode_unit, needed_units
from acsr_ray.training.loop import EpochStats, OptimizerConfig, Stepper, augment
from acsr_ray.training.objectives import Objective
from acsr_ray.training.order import Order

logger = logging.getLogger(__name__)


class Training(Protocol):
    """What is trained: a network, its loss, and how. Small and picklable; it travels to every worker."""

    @property
    def optimizer(self) -> OptimizerConfig:
        """Schedule and optimiser."""
        ...

    @property
    def seed(self) -> int:
        """Fixes everything random."""
        ...

    @property
    def image_size(self) -> int:
        """Side in pixels of the square images."""
        ...

    def build(self) -> nn.Module:
        """Return the network with its initial weights, the same in every worker."""
        ...

    def network(self, model: nn.Module) -> nn.Module:
        """Return what the loss calls and what is made distributed; mostly `model` itself."""
        ...

    def objective(self, model: nn.Module, network: nn.Module, units: Sequence[Unit]) -> Objective:
        """Return the loss, its constants on the model's device."""
        ...

    def closing_metrics(self, model: nn.Module, held_out: LabelledImages, device: str) -> dict[str, float]:
        """Return what the artifact records of the trained network on validation images."""
        ...

    def describe(self) -> dict[str, Any]:
        """Return everything that decides the run but its data, as JSON values."""
        ...


def train_steps(
    training: Training,
    objective: Objective,
    stepper: Stepper,
    batches: Iterable[Batch],
    device: torch.device,
) -> Iterator[tuple[Batch, Tensor]]:
    """Make a step per batch and yield both its batch and its loss.

    In a distributed run every worker calls this with its own batches; gradients meet in the network.

    Args:
        training: augmentation and seed.
        objective: the loss.
        stepper: optimiser of the model.
        batches: this worker's share.
        device: where the model is.
    """
    config = training.optimizer
    for batch in batches:
        augmented = augmented_batch(batch, config, training.seed)
        extras = objective.extras(augmented)
        images = augmented.images.to(device, memory_format=torch.channels_last)
        columns = (images, augmented.labels.to(device), *(extra.to(device) for extra in extras))
        stepper.model.train()
        with (
            batch.global_generator(training.seed, device),
            torch.autocast(device.type, torch.bfloat16, enabled=half_precision(config, device)),
        ):
            parts = zip(*(column.chunk(config.accumulate) for column in columns), strict=True)
            loss = stepper.update([partial(objective.loss, *part) for part in parts])
        yield batch, loss


def train_here(
    training: Training, units: Sequence[Unit], order: Order, validation: Sequence[str], device: str
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Train in this process, without checkpoints; return the weights to save and the closing metrics.

    The batches are those of a distributed run.
    """
    lanes, epochs = range(order.lanes), training.optimizer.epochs
    steps = [order.steps(epoch) for epoch in range(epochs)]
    where = torch.device(device)
    model = training.build().to(where).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    network = training.network(model)
    stepper = Stepper(model, training.optimizer, sum(steps))
    objective = training.objective(model, network, units)
    means: list[float] = []
    unreadable = 0
    for epoch in range(epochs):
        started, losses = time.perf_counter(), 0.0
        events = list(order.events(lanes, epoch))
        decoded = (decode_unit(units[unit], training.image_size) for unit in needed_units(events))
        fed = batches(order, lanes, events, decoded)
        for batch, loss in train_steps(training, objective, stepper, fed, where):
            losses += loss.item()
            unreadable += batch.unreadable if not epoch else 0
        means.append(losses / steps[epoch])
        elapsed = time.perf_counter() - started
        logger.info("%s", EpochStats(epoch + 1, means[-1], elapsed, steps[epoch] * order.batch_size))
    model.load_state_dict(stepper.weights())
    model.eval()
    metrics: dict[str, Any] = {"unreadable_images": unreadable}
    if validation:
        held_out = read_labelled(validation, training.image_size)
        metrics |= training.closing_metrics(model, held_out, device)
    return model.state_dict(), {**metrics, "epoch_losses": means}


def augmented_batch(batch: Batch, config: OptimizerConfig, seed: int) -> Batch:
    """Return the batch shifted and mirrored by its own random numbers."""
    parts = [
        augment(batch.images[rows], config, generator)
        for rows, generator in batch.by_lane(seed, AUGMENTATION)
    ]
    return batch.with_images(torch.cat(parts))


def half_precision(config: OptimizerConfig, device: torch.device) -> bool:
    """Return whether to compute in bfloat16."""
    if config.precision == "auto":
        return device.type == "cuda"
    return config.precision == "bfloat16"
