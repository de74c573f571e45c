"""Two-dimensional real DFT of many maps at once, over the first two axes.

Spectra are real arrays (2, F, ...): real and imaginary part, F = H (W // 2 + 1) frequencies. Up to
`MATMUL_SIDE` pixels the DFT is two matrix products, which on CPUs and GPUs beat an FFT of many small
strided arrays several times; larger images take the FFT.
"""

import math
from functools import lru_cache

import torch
from torch import Tensor

MATMUL_SIDE = 64


class RealDft:
    """DFT of arrays (H, W, ...) for one size, dtype and device.

    Args:
        height: H.
        width: W.
        dtype: float32 or float64.
        device: where the arrays are.
    """

    def __init__(self, height: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
        self.height, self.width, self.half = height, width, width // 2 + 1
        self.by_matmul = max(height, width) <= MATMUL_SIDE
        if self.by_matmul:
            with torch.inference_mode(False):
                matrices = _matrices(height, width)
            self.rows, self.columns, self.rows_back, self.columns_back = (
                matrix.to(device, dtype) for matrix in matrices
            )

    def forward(self, images: Tensor) -> Tensor:
        """Return the spectrum (2, F, ...) of (H, W, ...)."""
        trailing = images.shape[2:]
        if not self.by_matmul:
            spectrum = torch.fft.rfft2(images, dim=(0, 1)).flatten(0, 1)
            return torch.stack((spectrum.real, spectrum.imag))
        by_column = self.columns @ images.reshape(self.height, self.width, -1)
        spectrum = self.rows @ by_column.view(2 * self.height, -1)
        return spectrum.view(2, self.height * self.half, *trailing)

    def inverse(self, spectrum: Tensor) -> Tensor:
        """Return the images (H, W, ...) of a spectrum (2, F, ...)."""
        trailing = spectrum.shape[2:]
        size = (self.height, self.width)
        if not self.by_matmul:
            joined = torch.complex(spectrum[0], spectrum[1])
            joined = joined.reshape(self.height, self.half, *trailing)
            return torch.fft.irfft2(joined, s=size, dim=(0, 1))
        by_row = self.rows_back @ spectrum.reshape(2 * self.height, -1)
        images = self.columns_back @ by_row.view(self.height, 2 * self.half, -1)
        return images.view(*size, *trailing)


@lru_cache(maxsize=32)
def _matrices(height: int, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the real matrices of the DFT, float64.

    rows (2H, 2H) takes (h, re/im) to (re/im, k); columns (2 Wf, W) takes w to (re/im, l). The other two
    invert them; the last counts every frequency once more for its conjugate, where it has one.
    """
    cos_h, sin_h = _waves(height)
    rows = torch.empty(2, height, height, 2, dtype=torch.float64)
    rows[0, ..., 0], rows[0, ..., 1] = cos_h, sin_h
    rows[1, ..., 0], rows[1, ..., 1] = -sin_h, cos_h
    rows = rows.reshape(2 * height, 2 * height)
    half = width // 2 + 1
    cos_w, sin_w = (wave[:half] for wave in _waves(width))
    columns = torch.cat((cos_w, -sin_w))
    weight = torch.full((half,), 2.0, dtype=torch.float64)
    weight[0] = 1
    if width % 2 == 0:
        weight[-1] = 1
    weight /= width
    columns_back = torch.cat((weight[:, None] * cos_w, -weight[:, None] * sin_w)).T
    # The row transform is H times an orthogonal matrix.
    return rows, columns, rows.T / height, columns_back


def _waves(size: int) -> tuple[Tensor, Tensor]:
    index = torch.arange(size)
    angle = (torch.outer(index, index) % size).double() * (2 * math.pi / size)
    return angle.cos(), angle.sin()
