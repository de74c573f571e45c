"""One training run in plain torch: what a worker does with its batches, wherever they come from."""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from acsr_ray.corpus.units import Unit
from acsr_ray.training.feed import AUGMENTATION, Batch
from acsr_ray.training.loop import OptimizerConfig, Stepper, augment
from acsr_ray.training.objectives import Objective
from acsr_ray.training.order import Step


class Training(Protocol):
    """What is trained: a network, its loss, and how. Small and picklable; it travels to every worker."""

    optimizer: OptimizerConfig
    seed: int
    image_size: int

    def build(self) -> nn.Module:
        """Return the network with its initial weights, the same in every worker."""
        ...

    def network(self, model: nn.Module) -> nn.Module:
        """Return what the loss calls and what is made distributed; mostly `model` itself."""
        ...

    def objective(self, model: nn.Module, network: nn.Module, units: Sequence[Unit]) -> Objective:
        """Return the loss, its constants on the model's device."""
        ...


def train_steps(
    training: Training,
    objective: Objective,
    stepper: Stepper,
    batches: Iterable[Batch],
    device: torch.device,
) -> Iterator[tuple[Step, Tensor]]:
    """Make a step per batch and yield its number and loss.

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
        with torch.autocast(device.type, torch.bfloat16, enabled=half_precision(config, device)):
            parts = zip(*(column.chunk(config.accumulate) for column in columns), strict=True)
            loss = stepper.update([partial(objective.loss, *part) for part in parts])
        yield batch.step, loss


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
