"""The Tikhonov split of a batch, in micro-batches of a fixed shape."""

from functools import partial

from torch import Tensor

from acsr_ray.purification.micro_batches import in_micro_batches
from acsr_ray.sparse.tikhonov import TikhonovConfig, tikhonov_split


def split_bands(images: Tensor, config: TikhonovConfig) -> tuple[Tensor, Tensor]:
    """Split images (N, 3, H, W) into (lowpass, highpass), each the same whatever its neighbours."""
    lowpass, highpass = in_micro_batches(partial(tikhonov_split, config=config), images)
    return lowpass, highpass
