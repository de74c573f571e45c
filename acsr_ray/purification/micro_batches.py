"""Calls of a fixed shape over images, for what a library may compute otherwise for another number of them."""

from collections.abc import Callable

import torch
from torch import Tensor

from acsr_ray.models.classifier import pad_batch
from acsr_ray.sparse.admm import SMALL_PIXELS

MICRO_BATCH = {"cpu": 8, "cuda": 256}
"""Images per call; on CPUs, those above `SMALL_PIXELS` go one by one.

Fixed, because an FFT library may choose another algorithm for another number of images, and a GPU adds up
in another order. Measured on one core, splitting 8 images of 32 pixels costs least: half of what each costs
alone.
"""
GPU_PIXELS = 2**20
"""Most pixels per call on GPUs, unless a single image has more."""


def micro_batch(height: int, width: int, device: str) -> int:
    """Return the images per call; it depends on nothing but the size of the images and the device."""
    most = MICRO_BATCH[device]
    if device == "cpu":
        return most if height * width <= SMALL_PIXELS else 1
    return max(1, min(most, GPU_PIXELS // (height * width)))


def in_micro_batches(function: Callable[..., tuple[Tensor, ...]], *images: Tensor) -> list[Tensor]:
    """Return what a function gives for each image, computed in calls of a fixed shape.

    Args:
        function: arrays (n, C, H, W) to arrays (n, ...).
        images: arrays (N >= 1, C, H, W) of one shape; calls are filled up with zeros.
    """
    height, width = images[0].shape[-2:]
    size = micro_batch(height, width, images[0].device.type)
    parts = []
    for part in zip(*(batch.split(size) for batch in images), strict=True):
        # Contiguous, because filling up changes the memory layout, which the library may look at too.
        results = function(*(pad_batch(batch, size).contiguous() for batch in part))
        parts.append([result[: len(part[0])] for result in results])
    return [torch.cat(columns) for columns in zip(*parts, strict=True)]
