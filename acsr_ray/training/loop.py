"""What every training shares: settings, augmentation, a step of SGD with its schedule, `fit` in memory."""

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

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
    lanes: int = Field(8, ge=1)
    """Streams that every batch is made of; the number of workers divides it and changes no batch."""
    shuffle_rows: int = Field(16384, ge=1)
    """Images that are shuffled together, over all lanes; readers hold them in memory."""
    peak_lr: float = Field(0.1, gt=0)
    """Largest learning rate (SGD, Nesterov momentum 0.9; one-cycle moves it between 0.95 and 0.85)."""
    weight_decay: float = Field(5e-4, ge=0)
    """Weight of the squared parameter norm (Eq. 1)."""
    crop_padding: int = Field(4, ge=0)
    """Largest random shift in pixels, with reflection; 0 switches it off."""
    flip: bool = True
    """Mirror half of the images; wrong for digits and text."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """`auto` computes in bfloat16 on GPUs and in float32 on CPUs; weights are float32 everywhere."""
    schedule: Literal["one_cycle", "cosine"] = "one_cycle"
    """`one_cycle` rises for 30 % of the steps, `cosine` for 5 %; both fall to nearly zero along a cosine."""
    accumulate: int = Field(1, ge=1)
    """Parts that each worker cuts its share of a batch into, one after the other, to save memory."""
    ema_decay: float | None = Field(None, gt=0, lt=1)
    """Average the weights exponentially, by 0.999 or so, and save the average; None: the last weights."""
    clip_norm: float | None = Field(None, gt=0)
    """Largest norm of a step's gradient, over all parameters; None: as it is."""

    def make(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """Return the optimiser."""
        return torch.optim.SGD(
            parameters, self.peak_lr, momentum=0.9, nesterov=True, weight_decay=self.weight_decay
        )


class AdamConfig(OptimizerConfig):
    """The same with Adam, which networks with thresholds need."""

    batch_size: int = Field(64, gt=0)
    """Images per step."""
    peak_lr: float = Field(1.5e-3, gt=0)
    """Largest learning rate (Adam; one-cycle moves beta_1 between 0.95 and 0.85)."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay."""
    clip_norm: float | None = Field(1.0, gt=0)
    """Largest norm of a step's gradient, over all parameters; None: as it is."""

    def make(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """Return the optimiser."""
        return torch.optim.AdamW(parameters, self.peak_lr, weight_decay=self.weight_decay)


@dataclass(frozen=True)
class EpochStats:
    """What one epoch did."""

    epoch: int
    loss: float
    elapsed_s: float
    images: int
    """Images trained on since the start of the epoch, or since the run went on within it."""

    @property
    def images_per_second(self) -> float:
        """Throughput of all workers together."""
        return self.images / self.elapsed_s

    def __str__(self) -> str:
        """Return the line that is logged."""
        return (
            f"epoch {self.epoch}: loss {self.loss:.4f}, {self.elapsed_s:.0f} s, "
            f"{self.images_per_second:.0f} images/s"
        )


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


class Stepper:
    """Optimiser, schedule and averaged weights of one training run.

    Args:
        model: the network, on its device.
        config: schedule and optimiser.
        total_steps: of the whole run.
        network: what the losses call when it is not `model` itself (`DistributedDataParallel`); its
            `no_sync` keeps gradients at home until the last part of a step.
    """

    def __init__(
        self, model: nn.Module, config: OptimizerConfig, total_steps: int, network: nn.Module | None = None
    ) -> None:
        self.model = model
        self.averaged: AveragedModel | None = None
        if config.ema_decay is not None:
            self.averaged = AveragedModel(
                model, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay), use_buffers=True
            )
        self.taken = 0
        self.clip_norm = config.clip_norm
        self.optimizer = config.make(model.parameters())
        self.schedule = _schedule(self.optimizer, config, total_steps)
        self._alone = getattr(network, "no_sync", contextlib.nullcontext)

    def update(self, losses: Sequence[Callable[[], Tensor]]) -> Tensor:
        """Make one step along the mean loss of equal parts of a batch; return that mean, detached."""
        self.optimizer.zero_grad()
        total = torch.zeros(())
        for position, loss_of in enumerate(losses):
            last = position == len(losses) - 1
            with contextlib.nullcontext() if last else self._alone():
                loss = loss_of() / len(losses)
                loss.backward()
            total = total.to(loss) + loss.detach()
        if self.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm)
        self.optimizer.step()
        self.schedule.step()
        if self.averaged is not None:
            self.averaged.update_parameters(self.model)
        self.taken += 1
        return total

    def weights(self) -> dict[str, Tensor]:
        """Return what should be saved and evaluated: the averaged weights where there are some."""
        return (self.model if self.averaged is None else self.averaged.module).state_dict()

    def tensors(self) -> dict[str, Tensor]:
        """Return everything that `restore` needs but the number of steps."""
        state = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        if self.averaged is not None:
            state |= {f"averaged.{name}": t for name, t in self.averaged.module.state_dict().items()}
        for name, parameter in self.model.named_parameters():
            for kind, tensor in self.optimizer.state[parameter].items():
                if tensor is not None:
                    state[f"optimizer.{kind}.{name}"] = tensor
        return state

    def restore(self, tensors: Mapping[str, Tensor], taken: int) -> None:
        """Go on after `taken` steps from what `tensors` returned then."""
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "averaged": {}, "optimizer": {}}
        for name, tensor in tensors.items():
            kind, _, rest = name.partition(".")
            parts[kind][rest] = tensor
        self.model.load_state_dict(parts["model"])
        if self.averaged is not None:
            self.averaged.module.load_state_dict(parts["averaged"])
            self.averaged.n_averaged.fill_(taken)
        parameters = dict(self.model.named_parameters())
        for key, tensor in parts["optimizer"].items():
            kind, _, name = key.partition(".")
            # Adam counts its steps on the CPU.
            where = parameters[name].device if tensor.ndim else tensor.device
            kept = tensor.to(where).clone(memory_format=torch.preserve_format)
            self.optimizer.state[parameters[name]][kind] = kept
        self.taken = taken
        # Both schedules are functions of the step's number alone.
        self.schedule.last_epoch = taken - 1
        self.schedule.step()


def _schedule(
    optimizer: torch.optim.Optimizer, config: OptimizerConfig, total_steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    if config.schedule == "one_cycle":
        return torch.optim.lr_scheduler.OneCycleLR(
            optimizer, config.peak_lr, total_steps=total_steps, pct_start=0.3
        )
    rising = max(1, round(0.05 * total_steps))

    def share(step: int) -> float:
        if step < rising:
            return (step + 1) / rising
        return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, total_steps - rising)))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, share)


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
    batches = max(1, len(pixels) // config.batch_size)
    stepper = Stepper(model, config, batches * config.epochs)
    targets = torch.as_tensor(labels)
    for epoch in range(config.epochs):
        started, losses = time.perf_counter(), 0.0
        order = torch.randperm(len(pixels), generator=generator)
        for chosen in order[: batches * config.batch_size].chunk(batches):
            images = torch.from_numpy(to_unit_range(pixels[chosen.numpy()]))
            images = augment(images, config, generator).to(device, memory_format=torch.channels_last)
            model.train()
            loss = partial(objective, images, targets[chosen].to(device), chosen)
            losses += stepper.update([loss]).item()
        on_epoch(EpochStats(epoch + 1, losses / batches, time.perf_counter() - started, len(order)))
    model.load_state_dict(stepper.weights())
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
