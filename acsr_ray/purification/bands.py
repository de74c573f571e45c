"""The Tikhonov split of a batch, in micro-batches of a fixed shape."""

import torch
from torch import Tensor

from acsr_ray.models.classifier import pad_batch
from acsr_ray.sparse.admm import SMALL_PIXELS
from acsr_ray.sparse.tikhonov import TikhonovConfig, tikhonov_split

SPLIT_MICRO_BATCH = {"cpu": 8, "cuda": 256}
"""Images per split; on CPUs, those above `SMALL_PIXELS` go one by one.

Fixed, because an FFT library may choose another algorithm for another number of images. Measured on one core,
8 images of 32 pixels cost least: half of what each costs alone.
"""
GPU_PIXELS = 2**20
"""Most pixels per split on GPUs, unless a single image has more."""


def split_bands(images: Tensor, config: TikhonovConfig) -> tuple[Tensor, Tensor]:
    """Split images (N, 3, H, W) into (lowpass, highpass), each the same whatever its neighbours."""
    height, width = images.shape[-2:]
    size = split_micro_batch(height, width, images.device.type)
    bands = [_split_filled_up(part, size, config) for part in images.split(size)]
    return torch.cat([low for low, _ in bands]), torch.cat([high for _, high in bands])


def split_micro_batch(height: int, width: int, device: str) -> int:
    """Return the images per split; it depends on nothing but the size of the images and the device."""
    most = SPLIT_MICRO_BATCH[device]
    if device == "cpu":
        return most if height * width <= SMALL_PIXELS else 1
    return max(1, min(most, GPU_PIXELS // (height * width)))


def _split_filled_up(images: Tensor, size: int, config: TikhonovConfig) -> tuple[Tensor, Tensor]:
    # Contiguous, because filling up changes the memory layout, which the FFT may depend on too.
    lowpass, highpass = tikhonov_split(pad_batch(images, size).contiguous(), config)
    return lowpass[: len(images)], highpass[: len(images)]
