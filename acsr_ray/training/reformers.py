"""Training of the reformers of MagNet (a denoising autoencoder) and of PixelDefend (a PixelCNN)."""

import logging
import math
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from acsr_ray.config import Described
from acsr_ray.corpus.images import Pixels
from acsr_ray.models.autoencoder import Autoencoder, AutoencoderConfig
from acsr_ray.models.pixel_cnn import PixelCnn, PixelCnnConfig, log_likelihood

logger = logging.getLogger(__name__)

HELD_OUT = 50
"""One image in so many is kept out of training, for the closing figures."""
MOST_HELD_OUT = 200
LOG_EVERY = 200


class MagnetTraining(Described):
    """How MagNet's autoencoder is trained: it maps noisy images to the clean ones, in squared error."""

    network: AutoencoderConfig = AutoencoderConfig()
    """Shape of the autoencoder."""
    noise: float = Field(0.025, ge=0)
    """Standard deviation of the Gaussian noise, for images in [0, 1]; the paper's value."""
    steps: int = Field(3000, ge=1)
    """Gradient steps."""
    batch_size: int = Field(32, ge=1)
    """Images per step."""
    peak_lr: float = Field(3e-3, gt=0)
    """Learning rate of Adam at the top of the one-cycle schedule."""


class PixelCnnTraining(Described):
    """How PixelDefend's PixelCNN is trained: maximum likelihood of pixels drawn at random."""

    network: PixelCnnConfig = PixelCnnConfig()
    """Shape of the network."""
    steps: int = Field(6000, ge=1)
    """Gradient steps."""
    images: int = Field(64, ge=1)
    """Images per step."""
    pixels: int = Field(32, ge=1)
    """Pixels of each image per step."""
    peak_lr: float = Field(2e-3, gt=0)
    """Learning rate of Adam at the top of the one-cycle schedule."""


def train_autoencoder(
    pixels: Pixels, training: MagnetTraining, *, device: str, seed: int
) -> tuple[Autoencoder, dict[str, Any]]:
    """Train a denoising autoencoder.

    Args:
        pixels: (N, S, S, 3) uint8.
        training: how.
        device: where to train.
        seed: fixes initialisation, order and noise.

    Returns:
        The network in evaluation mode, and its PSNR in dB on images kept out, clean and noisy.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Autoencoder(training.network).to(device)
    seen, held_out = _split(pixels)

    def noisy(images: Tensor) -> Tensor:
        return images + training.noise * torch.randn(images.shape, generator=generator).to(images)

    optimizer, schedule = _optimizer(model, training.peak_lr, training.steps)
    for step in range(training.steps):
        chosen = torch.randint(len(seen), (training.batch_size,), generator=generator)
        images = _mirrored(_images(seen[chosen]), generator).to(device)
        loss = (model(noisy(images)) - images).square().mean()
        _descend(loss, optimizer, schedule)
        if (step + 1) % LOG_EVERY == 0:
            logger.info("step %d: PSNR %.2f dB", step + 1, _psnr(loss.item()))
    model.eval()
    with torch.no_grad():
        images = _images(held_out).to(device)
        errors = [
            (model(start).clamp(0, 1) - images).square().mean().item() for start in (images, noisy(images))
        ]
    metrics = {"clean_psnr_db": round(_psnr(errors[0]), 2), "noisy_psnr_db": round(_psnr(errors[1]), 2)}
    return model, metrics


def train_pixel_cnn(
    pixels: Pixels, training: PixelCnnTraining, *, device: str, seed: int
) -> tuple[PixelCnn, dict[str, Any]]:
    """Train a PixelCNN.

    Args:
        pixels: (N, S, S, 3) uint8.
        training: how.
        device: where to train.
        seed: fixes initialisation and the pixels drawn.

    Returns:
        The network in evaluation mode, and its bits per value on images kept out.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = PixelCnn(training.network).to(device)
    seen, held_out = _split(pixels)
    optimizer, schedule = _optimizer(model, training.peak_lr, training.steps)
    running = 0.0
    for step in range(training.steps):
        chosen = torch.randint(len(seen), (training.images,), generator=generator)
        levels = _mirrored(_images(seen[chosen]) * 255, generator).to(device)
        loss = _bits(model, levels, training.pixels, generator)
        _descend(loss, optimizer, schedule)
        running += loss.item() / LOG_EVERY
        if (step + 1) % LOG_EVERY == 0:
            logger.info("step %d: %.3f bits per value", step + 1, running)
            running = 0.0
    model.eval()
    with torch.no_grad():
        bits = _bits(model, _images(held_out).to(device) * 255, 256, generator).item()
    return model, {"bits_per_value": round(bits, 3)}


def _bits(model: PixelCnn, levels: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Return the mean bits per value over `count` random pixels of each image (N, 3, H, W)."""
    number, _, height, width = levels.shape
    image = torch.arange(number).repeat_interleave(count).to(levels.device)
    rows = torch.randint(height, (len(image),), generator=generator).to(levels.device)
    columns = torch.randint(width, (len(image),), generator=generator).to(levels.device)
    parameters = model(model.neighbourhoods(model.pad(levels), image, rows, columns))
    likelihood = log_likelihood(parameters, levels[image, :, rows, columns])
    return -likelihood.mean() / (3 * math.log(2))


def _split(pixels: Pixels) -> tuple[Tensor, Tensor]:
    """Return the images to train on and those kept out, uint8 (n, S, S, 3); a lone image is both."""
    everything = torch.from_numpy(pixels)
    out = min(max(1, len(pixels) // HELD_OUT), MOST_HELD_OUT)
    return everything[: max(1, len(pixels) - out)], everything[-out:]


def _images(pixels: Tensor) -> Tensor:
    return pixels.permute(0, 3, 1, 2).float() / 255


def _mirrored(images: Tensor, generator: torch.Generator) -> Tensor:
    mirror = torch.rand(len(images), generator=generator) < 0.5
    return torch.where(mirror.view(-1, 1, 1, 1), images.flip(-1), images)


def _optimizer(
    model: torch.nn.Module, peak_lr: float, steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    optimizer = torch.optim.Adam(model.parameters(), peak_lr)
    # One step more than taken, since the schedule is advanced after the last one too.
    return optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, peak_lr, total_steps=steps + 1)


def _descend(
    loss: Tensor, optimizer: torch.optim.Optimizer, schedule: torch.optim.lr_scheduler.LRScheduler
) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    schedule.step()


def _psnr(error: float) -> float:
    return -10 * math.log10(max(error, 1e-12))
