"""Split of an image into a smooth low band and the rest, by Tikhonov regularisation of the gradient.

low = argmin_l 1/2 ||l - x||^2 + lmbda/2 sum_j ||G_j l||^2, G_j the difference along image axis j, on a
symmetrically padded image with circular boundary, so that the DFT gives it in closed form:
H = 1 / (1 + lmbda (4 sin^2(w_h / 2) + 4 sin^2(w_w / 2))). Source: ACSR paper, Purification; METHOD as in
Garcia-Cardona and Wohlberg 2018.
"""

import math
from functools import lru_cache

import torch
from pydantic import Field
from torch import Tensor

from acsr_ray.config import Described


class TikhonovConfig(Described):
    """Settings of the split."""

    lmbda: float = Field(5.0, gt=0)
    """Weight of the gradient penalty; larger puts less into the low band."""
    padding: int = Field(16, ge=0)
    """Symmetric padding in pixels on each side, against wrap-around."""


def tikhonov_split(images: Tensor, config: TikhonovConfig) -> tuple[Tensor, Tensor]:
    """Split images (N, C, H, W) into (lowpass, highpass) of the same shape; their sum is the image."""
    height, width = images.shape[-2:]
    pad = config.padding
    padded = pad_symmetrically(images, pad)
    response = _response(*padded.shape[-2:], config.lmbda, padded.dtype, padded.device)
    smooth = torch.fft.irfft2(torch.fft.rfft2(padded) * response, s=padded.shape[-2:])
    lowpass = smooth[..., pad : pad + height, pad : pad + width]
    return lowpass, images - lowpass


def pad_symmetrically(images: Tensor, pad: int) -> Tensor:
    """Return images (..., H, W) mirrored by `pad` pixels at each edge, as often as needed."""
    if not pad:
        return images
    rows, columns = (_symmetric_index(side, pad, images.device) for side in images.shape[-2:])
    return images[..., rows[:, None], columns]


@lru_cache(maxsize=4)
def _response(height: int, width: int, lmbda: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return H (height, width // 2 + 1) of the padded size; few are kept, as that of a photo is large."""
    # Outside of any inference mode, or a later call with gradients could not use it.
    with torch.inference_mode(False):
        # Computed in float64 and rounded once, so float32 and float64 split alike.
        frequency = torch.arange(max(height, width), dtype=torch.float64, device=device)
        rows = 4 * torch.sin(frequency[:height] * math.pi / height) ** 2
        columns = 4 * torch.sin(frequency[: width // 2 + 1] * math.pi / width) ** 2
        return (1 / (1 + lmbda * (rows[:, None] + columns))).to(dtype)


def _symmetric_index(size: int, pad: int, device: torch.device) -> Tensor:
    """Return source positions of `size + 2 pad` samples, mirrored at the edges as often as needed."""
    position = torch.arange(-pad, size + pad, device=device) % (2 * size)
    return torch.where(position < size, position, 2 * size - 1 - position)
