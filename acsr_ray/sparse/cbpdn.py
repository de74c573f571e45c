"""Convolutional basis pursuit denoising (Eq. 6) by ADMM with fixed penalty and iterations.

Shapes: N images, C channels, H x W pixels, h x w atom support, M atoms. One coefficient map per atom is
shared by the channels. Convolution is circular, so the x-step is diagonal over frequencies up to a C x C
system (Woodbury), which is factored once per image size.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from acsr_ray.config import Described
from acsr_ray.sparse.fourier import RealDft
from acsr_ray.sparse.prox import soft_threshold

CACHED_PIXELS = 64 * 64
"""Factors of images up to this size are kept between calls; larger ones cost more memory than time."""
CACHED_SIZES = 2
"""Most sizes whose factors one solver keeps; each takes 24 C M (H + 1) W bytes or less in float32."""


class CbpdnConfig(Described):
    """Settings of the solver. Iterations and rho are fixed, so an image never depends on its neighbours."""

    lmbda: float = Field(0.1, gt=0)
    """Weight of the l1 term for images in [0, 1]."""
    iterations: int = Field(60, ge=1)
    """ADMM iterations."""
    rho: float | None = Field(None, gt=0)
    """ADMM penalty; None stands for 50 lmbda + 1, sporco's starting value."""
    relaxation: float = Field(1.8, ge=1, lt=2)
    """Over-relaxation of ADMM."""

    @property
    def penalty(self) -> float:
        """The rho in use."""
        return 50 * self.lmbda + 1 if self.rho is None else self.rho

    def stronger(self, factor: float) -> "CbpdnConfig":
        """Return sparse coding with lmbda times a factor, and rho scaled like sporco's rule 50 lmbda + 1.

        The ratio of the two is the threshold of an iteration; with rho left as it was, a fixed number of
        iterations would end far from the optimum.
        """
        lmbda = self.lmbda * factor
        rho = None if self.rho is None else self.rho * (50 * lmbda + 1) / (50 * self.lmbda + 1)
        return self.model_copy(update={"lmbda": lmbda, "rho": rho})


@dataclass(frozen=True)
class CbpdnResult:
    """Sparse codes of a batch.

    `maps` (N, M, H, W) are the sparse iterate, `reconstruction` (N, C, H, W) is their convolution with
    the atoms, and `objective` (N,) is the functional at exactly these maps (of the padded image, where it is
    smaller than an atom).
    """

    maps: Tensor
    reconstruction: Tensor
    objective: Tensor


@dataclass(frozen=True)
class _Factor:
    """The x-step of one image size: its DFT, D (2, F, M, 2C) and the regularised adjoint (2, F, 2C, M).

    Complex products are written as real ones on (real | imaginary) blocks.
    """

    dft: RealDft
    forward: Tensor
    adjoint: Tensor

    def images(self, spectrum: Tensor) -> Tensor:
        """Return D times the maps' spectrum (2, F, N, M) as (F, N, 2C)."""
        return (spectrum @ self.forward).sum(0)


class Cbpdn:
    """Solve min over maps of 1/2 ||sum_m d_m * x_m - s||^2 + lmbda ||x||_1, per image.

    Args:
        atoms: (M, C, h, w) real.
        config: solver settings.

    Raises:
        ValueError: atoms are not a finite 4-d array.
    """

    def __init__(self, atoms: Tensor, config: CbpdnConfig) -> None:
        if atoms.ndim != 4 or not torch.isfinite(atoms).all():
            raise ValueError(f"atoms must be finite (M, C, h, w), got shape {tuple(atoms.shape)}")
        self.atoms = atoms
        self.config = config
        self._factors: dict[tuple[int, int, torch.dtype, torch.device], _Factor] = {}

    def solve(self, highpass: Tensor, strength: Tensor | None = None) -> CbpdnResult:
        """Sparse-code a batch; differentiable in it.

        Args:
            highpass: (N, C, H, W), float32 or float64, with the atoms' C; computed in its dtype.
            strength: (N,) factor on each image's lmbda; 1 when omitted.

        Raises:
            ValueError: wrong shape or channels.
        """
        _, channels, *support = self.atoms.shape
        if highpass.ndim != 4 or highpass.shape[1] != channels:
            raise ValueError(f"highpass must be (N, {channels}, H, W), got {tuple(highpass.shape)}")
        height, width = highpass.shape[2:]
        # An image smaller than an atom gets zeros to the right and below, and loses them again.
        size = (max(height, support[0]), max(width, support[1]))
        signal = F.pad(highpass, (0, size[1] - width, 0, size[0] - height))
        maps, reconstruction = self._iterate(signal, size, strength)
        fidelity = 0.5 * (reconstruction - signal).square().sum((1, 2, 3))
        lmbda = self.config.lmbda * (1.0 if strength is None else strength)
        objective = fidelity + lmbda * maps.abs().sum((1, 2, 3))
        return CbpdnResult(maps[..., :height, :width], reconstruction[..., :height, :width], objective)

    def reconstruct(self, highpass: Tensor, strength: Tensor | None = None) -> Tensor:
        """Return only the reconstruction (N, C, H, W) of a batch; see `solve`."""
        return self.solve(highpass, strength).reconstruction

    def _iterate(
        self, signal: Tensor, size: tuple[int, int], strength: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Run ADMM; maps live as (H, W, N, M), so that every frequency is one small matrix product."""
        factor = self._factor(size, signal)
        dft, relaxation = factor.dft, self.config.relaxation
        threshold: float | Tensor = self.config.lmbda / self.config.penalty
        if strength is not None:
            threshold = threshold * strength[:, None]
        signal_f = _joined(dft.forward(signal.permute(2, 3, 0, 1)))
        y = signal.new_zeros((*size, len(signal), len(self.atoms)))
        u = torch.zeros_like(y)
        for _ in range(self.config.iterations):
            # x-step: x = v + D^H (rho I + D D^H)^-1 (s - D v), v = y - u (Woodbury).
            v_f = dft.forward(y - u)
            x = dft.inverse(v_f + (signal_f - factor.images(v_f)) @ factor.adjoint)
            relaxed = relaxation * x + (1 - relaxation) * y + u
            y = soft_threshold(relaxed, threshold)
            u = relaxed - y
        channels = signal.shape[1]
        product = factor.images(dft.forward(y)).unflatten(-1, (2, channels)).movedim(-2, 0)
        return y.permute(2, 3, 0, 1), dft.inverse(product).permute(2, 3, 0, 1)

    def _factor(self, size: tuple[int, int], like: Tensor) -> _Factor:
        key = (*size, like.dtype, like.device)
        if key not in self._factors:
            # Outside of any inference mode, or a later call with gradients could not use the factor.
            with torch.inference_mode(False):
                factor = self._build_factor(size, like.dtype, like.device)
            if math.prod(size) > CACHED_PIXELS:
                return factor
            newest = list(self._factors.items())[1 - CACHED_SIZES :]
            self._factors = {**dict(newest), key: factor}
        return self._factors[key]

    def _build_factor(self, size: tuple[int, int], dtype: torch.dtype, device: torch.device) -> _Factor:
        atoms = self.atoms.to(device, dtype).permute(2, 3, 0, 1)
        padding = (0, 0, 0, 0, 0, size[1] - atoms.shape[1], 0, size[0] - atoms.shape[0])
        dft = RealDft(*size, dtype, device)
        real, imaginary = dft.forward(F.pad(atoms, padding))
        forward = torch.complex(real, imaginary)
        identity = torch.eye(forward.shape[-1], dtype=forward.dtype, device=forward.device)
        # Images are rows here, so products run from the right and the adjoint stays untransposed.
        gram = forward.mH @ forward + self.config.penalty * identity
        # C x C and well conditioned: the inverse is several times cheaper than solving for M columns.
        adjoint = torch.linalg.inv(gram) @ forward.mH
        return _Factor(
            dft,
            torch.stack(
                (
                    torch.cat((forward.real, forward.imag), -1),
                    torch.cat((-forward.imag, forward.real), -1),
                )
            ),
            torch.stack(
                (
                    torch.cat((adjoint.real, -adjoint.imag), -2),
                    torch.cat((adjoint.imag, adjoint.real), -2),
                )
            ),
        )


def _joined(spectrum: Tensor) -> Tensor:
    """Return (2, F, N, C) as (F, N, 2C), real parts first."""
    return torch.cat((spectrum[0], spectrum[1]), -1)
