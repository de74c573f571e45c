"""The Tikhonov split of a batch, in micro-batches of a fixed shape."""

import torch
from torch import Tensor

from acsr_ray.models.classifier import pad_batch
from acsr_ray.sparse.admm import SMALL_PIXELS
from acsr_ray.sparse.tikhonov import TikhonovConfig, tikhonov_split

SPLIT_MICRO_BATCH = {"cpu": 8, "cuda": 256}
"""Images per split up to `SMALL_PIXELS`; larger images go one by one.

Fixed, because an FFT library may choose another algorithm for another number of images. Measured on one core,
8 images of 32 pixels cost least: half of what each costs alone.
"""


def split_bands(images: Tensor, config: TikhonovConfig) -> tuple[Tensor, Tensor]:
    """Split images (N, 3, H, W) into (lowpass, highpass), each the same whatever its neighbours."""
    small = images.shape[-2] * images.shape[-1] <= SMALL_PIXELS
    size = SPLIT_MICRO_BATCH[images.device.type] if small else 1
    bands = [_split_filled_up(part, size, config) for part in images.split(size)]
    return torch.cat([low for low, _ in bands]), torch.cat([high for _, high in bands])


def _split_filled_up(images: Tensor, size: int, config: TikhonovConfig) -> tuple[Tensor, Tensor]:
    # Contiguous, because filling up changes the memory layout, which the FFT may depend on too.
    lowpass, highpass = tikhonov_split(pad_batch(images, size).contiguous(), config)
    return lowpass[: len(images)], highpass[: len(images)]
