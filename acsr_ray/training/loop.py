"""One training loop for every network: shuffled epochs, crop-and-flip augmentation, one-cycle SGD."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from acsr_ray.config import Described
from acsr_ray.corpus.images import Pixels, to_unit_range

EVALUATION_BATCH = 250

Objective = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(images (N, 3, S, S), labels (N,), indices (N,) into the training set) -> scalar loss."""


class OptimizerConfig(Described):
    """Schedule and optimiser of one training run."""

    epochs: int = Field(10, gt=0)
    """Passes over the training images."""
    batch_size: int = Field(128, gt=0)
    """Images per step."""
    peak_lr: float = Field(0.1, gt=0)
    """Learning rate at the top of the one-cycle schedule (SGD, Nesterov momentum 0.9)."""
    weight_decay: float = Field(5e-4, ge=0)
    """Weight of the squared parameter norm (Eq. 1)."""
    crop_padding: int = Field(4, ge=0)
    """Largest random shift in pixels, with reflection; 0 switches it off."""
    flip: bool = True
    """Mirror half of the images; wrong for digits and text."""


@dataclass(frozen=True)
class EpochStats:
    """What one epoch did."""

    epoch: int
    loss: float
    elapsed_s: float


def augment(images: Tensor, config: OptimizerConfig, generator: torch.Generator) -> Tensor:
    """Shift each image by up to `crop_padding` pixels and mirror half of them."""
    size, pad = images.shape[-1], config.crop_padding
    if config.flip:
        mirrored = torch.rand(len(images), generator=generator) < 0.5
        images = torch.where(mirrored.view(-1, 1, 1, 1), images.flip(-1), images)
    if pad:
        padded = F.pad(images, (pad,) * 4, mode="reflect")
        corner = torch.randint(2 * pad + 1, (2, len(images)), generator=generator)
        span = torch.arange(size)
        rows = (corner[0][:, None] + span)[:, None, :, None]
        columns = (corner[1][:, None] + span)[:, None, None, :]
        image, channel = torch.arange(len(images)).view(-1, 1, 1, 1), torch.arange(3).view(-1, 1, 1)
        images = padded[image, channel, rows, columns]
    return images


def fit(
    model: nn.Module,
    pixels: Pixels,
    labels: np.ndarray,
    objective: Objective,
    config: OptimizerConfig,
    *,
    device: str,
    seed: int,
    on_epoch: Callable[[EpochStats], None],
) -> None:
    """Train a model in place.

    Args:
        model: the network; left in evaluation mode.
        pixels: (N, S, S, 3) uint8.
        labels: (N,) int.
        objective: loss of one augmented batch.
        config: schedule and optimiser.
        device: where to train.
        seed: fixes shuffling and augmentation.
        on_epoch: called after each epoch.
    """
    generator = torch.Generator().manual_seed(seed)
    model.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(
        model.parameters(),
        config.peak_lr,
        momentum=0.9,
        nesterov=True,
        weight_decay=config.weight_decay,
    )
    batches = max(1, len(pixels) // config.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.peak_lr, total_steps=batches * config.epochs, pct_start=0.3
    )
    targets = torch.as_tensor(labels)
    for epoch in range(config.epochs):
        started, losses = time.perf_counter(), 0.0
        order = torch.randperm(len(pixels), generator=generator)
        for chosen in order[: batches * config.batch_size].chunk(batches):
            images = torch.from_numpy(to_unit_range(pixels[chosen.numpy()]))
            images = augment(images, config, generator).to(device, memory_format=torch.channels_last)
            model.train()
            loss = objective(images, targets[chosen].to(device), chosen)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses += loss.item()
        on_epoch(EpochStats(epoch + 1, losses / batches, time.perf_counter() - started))
    model.eval()


@torch.inference_mode()
def predict(model: Callable[[Tensor], Tensor], pixels: Pixels, device: str = "cpu") -> Tensor:
    """Return logits (N, J) of uint8 pixels (N, S, S, 3)."""
    parts = [
        model(torch.from_numpy(to_unit_range(pixels[start : start + EVALUATION_BATCH])).to(device))
        for start in range(0, len(pixels), EVALUATION_BATCH)
    ]
    return torch.cat(parts).cpu()


def accuracy(logits: Tensor, labels: np.ndarray) -> float:
    """Return the share of rows whose largest logit is the label's."""
    return (logits.argmax(1).numpy() == labels).mean().item()


def resolve_device(device: str) -> str:
    """Turn `auto` into `cuda` or `cpu`, whichever this process has."""
    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"
