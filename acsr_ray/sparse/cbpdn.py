"""Convolutional basis pursuit denoising (Eq. 6): settings, and one front for both solvers.

Shapes: N images, C channels, H x W pixels, h x w atom support, M atoms, K dictionaries. One coefficient map
per atom is shared by the channels. Convolution is circular; an image may be padded symmetrically before.

Two solvers of the same convex problem: coordinate descent over an active set (`acsr_ray.sparse.descent`),
which on CPUs costs a tenth, and ADMM on whole maps (`acsr_ray.sparse.admm`) for every device. Neither lets
an image depend on its neighbours.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from acsr_ray.config import Described
from acsr_ray.sparse.admm import Admm
from acsr_ray.sparse.codes import Codes, sparse_code
from acsr_ray.sparse.descent import Entries, PatchDictionary
from acsr_ray.sparse.tikhonov import pad_symmetrically


class CbpdnConfig(Described):
    """Settings of the solver. An image stops for itself or after fixed iterations, never with others."""

    lmbda: float = Field(0.1, gt=0)
    """Weight of the l1 term for images in [0, 1]."""
    solver: Literal["auto", "admm", "descent"] = "auto"
    """`descent`: coordinate descent to a tolerance, on CPUs; `admm`: fixed iterations, on any device; `auto`:
    descent on a CPU, else ADMM. The two end a little apart: name one where CPUs and GPUs must give the same
    pixels."""
    iterations: int = Field(60, ge=1)
    """Iterations of ADMM."""
    rho: float | None = Field(None, gt=0)
    """Penalty of ADMM; None stands for 50 lmbda + 1, see `acsr_ray.sparse.admm`."""
    relaxation: float = Field(1.8, ge=1, lt=2)
    """Over-relaxation of ADMM."""
    tolerance: float = Field(0.1, gt=0, le=1)
    """Violation of the optimality conditions at which descent stops, as a share of lmbda."""
    rounds: int = Field(8, ge=1)
    """Most searches for violators in descent. Measured on CIFAR-10 at lmbda 0.1, 4, 5, 6 and 8 end 0.5,
    0.16, 0.07 and 0.05 % above the optimum; 60 iterations of ADMM 0.27 %."""
    padding: int = Field(0, ge=0)
    """Symmetric padding in pixels on each side of an image, against wrap-around; 0 is circular."""

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

    `maps` (N, M, H', W') are sparse and belong to the padded image, where padding was asked for or the
    image is smaller than an atom; `reconstruction` (N, C, H, W) is their convolution with the atoms, cut to
    the image; `objective` (N,) is the functional at exactly these maps, of the padded image.
    """

    maps: Tensor
    reconstruction: Tensor
    objective: Tensor


@dataclass(frozen=True)
class CodedBatch:
    """Sparse codes as entries: each image's, with `reconstruction` and `objective` as in `CbpdnResult`."""

    entries: list[Entries]
    reconstruction: Tensor
    objective: Tensor


class Cbpdn:
    """Solve min over maps of 1/2 ||sum_m d_m * x_m - s||^2 + lmbda ||x||_1, per image.

    Args:
        atoms: (M, C, h, w), or (K, M, C, h, w) dictionaries of which each image names one.
        config: solver settings.

    Raises:
        ValueError: atoms are not finite arrays of these shapes.
    """

    def __init__(self, atoms: Tensor, config: CbpdnConfig) -> None:
        if atoms.ndim not in (4, 5) or not torch.isfinite(atoms).all():
            raise ValueError(f"atoms must be finite ([K,] M, C, h, w), got shape {tuple(atoms.shape)}")
        self.atoms = atoms
        self.config = config
        self._dictionaries = atoms[None] if atoms.ndim == 4 else atoms
        self._admm = Admm(self._dictionaries, config.penalty, config.relaxation, config.iterations)
        self._patches: dict[tuple[int, torch.dtype], PatchDictionary] = {}

    def solve(
        self,
        highpass: Tensor,
        strength: Tensor | None = None,
        *,
        index: Tensor | None = None,
        start: Tensor | None = None,
    ) -> CbpdnResult:
        """Sparse-code a batch; differentiable in it and in the strength.

        Args:
            highpass: (N >= 1, C, H, W), float32 or float64, with the atoms' C; computed in its dtype.
            strength: (N,) factor on each image's lmbda; 1 when omitted.
            index: (N,) int64, each image's dictionary; the first when omitted.
            start: maps (N, M, H', W') to start from, as an earlier result has them.

        Raises:
            ValueError: wrong shape, channels or device.
            IndexError: no such dictionary.
        """
        signal, lmbda = self._prepare(highpass, strength)
        if self._descends(highpass):
            first = None
            if start is not None:
                first = [Entries.of_maps(own) for own in start.detach().to(signal.dtype).numpy()]
            codes, values = self._descend(signal, lmbda, index, first)
            maps, whole = codes.maps(values), codes.synthesise(values)
        else:
            whole, maps = self._iterate(signal, lmbda, index, start)
        fidelity = 0.5 * (whole - signal).square().sum((1, 2, 3))
        objective = fidelity + lmbda * maps.abs().sum((1, 2, 3))
        return CbpdnResult(maps, self._cut(whole, highpass), objective)

    @torch.no_grad()
    def code(
        self, highpass: Tensor, start: Sequence[Entries] | None = None, *, index: Tensor | None = None
    ) -> CodedBatch:
        """Sparse-code a batch to entries, which take a hundredth of the memory of maps.

        Args:
            highpass: (N >= 1, C, H, W), see `solve`.
            start: entries of each image to start from.
            index: as for `solve`.

        Raises:
            ValueError: as `solve`.
        """
        signal, lmbda = self._prepare(highpass, None)
        if self._descends(highpass):
            codes, values = self._descend(signal, lmbda, index, start)
            entries, whole = codes.entries, codes.synthesise(values)
            size = torch.tensor([abs(own.values).sum() for own in entries]).to(signal)
        else:
            shape = (self.atoms.shape[-4], signal.shape[2], signal.shape[3])
            dense = None if start is None else torch.stack([own.maps(shape) for own in start]).to(signal)
            whole, maps = self._iterate(signal, lmbda, index, dense)
            entries = [Entries.of_maps(own) for own in maps.cpu().numpy()]
            size = maps.abs().sum((1, 2, 3))
        objective = 0.5 * (whole - signal).square().sum((1, 2, 3)) + lmbda * size
        return CodedBatch(entries, self._cut(whole, highpass), objective)

    def reconstruct(
        self, highpass: Tensor, strength: Tensor | None = None, *, index: Tensor | None = None
    ) -> Tensor:
        """Return only the reconstruction (N, C, H, W) of a batch; see `solve`."""
        signal, lmbda = self._prepare(highpass, strength)
        if self._descends(highpass):
            codes, values = self._descend(signal, lmbda, index, None)
            whole = codes.synthesise(values)
        else:
            (whole,) = self._iterate(signal, lmbda, index, None, with_maps=False)
        return self._cut(whole, highpass)

    def _descends(self, highpass: Tensor) -> bool:
        on_cpu = highpass.device.type == "cpu"
        if self.config.solver == "descent" and not on_cpu:
            raise ValueError(f"solver descent computes on CPUs only, got images on {highpass.device}")
        return self.config.solver == "descent" or (self.config.solver == "auto" and on_cpu)

    def _prepare(self, highpass: Tensor, strength: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the padded signal and each image's lmbda (N,)."""
        _, channels, *support = self.atoms.shape[-4:]
        if highpass.ndim != 4 or highpass.shape[1] != channels or not len(highpass):
            raise ValueError(f"highpass must be (N >= 1, {channels}, H, W), got {tuple(highpass.shape)}")
        signal = pad_symmetrically(highpass, self.config.padding)
        # An image smaller than an atom gets zeros to the right and below, and loses them again.
        height, width = signal.shape[2:]
        signal = F.pad(signal, (0, max(0, support[1] - width), 0, max(0, support[0] - height)))
        if strength is None:
            return signal, highpass.new_full((len(highpass),), self.config.lmbda)
        return signal, self.config.lmbda * strength

    def _cut(self, whole: Tensor, highpass: Tensor) -> Tensor:
        pad, (height, width) = self.config.padding, highpass.shape[2:]
        return whole[..., pad : pad + height, pad : pad + width]

    def _descend(
        self, signal: Tensor, lmbda: Tensor, index: Tensor | None, start: Sequence[Entries] | None
    ) -> tuple[Codes, Tensor]:
        dictionaries = [self._patch_dictionary(k, signal.dtype) for k in self._chosen(signal, index)]
        return sparse_code(
            signal,
            lmbda,
            dictionaries,
            tolerance=self.config.tolerance,
            rounds=self.config.rounds,
            start=start,
        )

    def _chosen(self, signal: Tensor, index: Tensor | None) -> list[int]:
        chosen: list[int] = [0] * len(signal) if index is None else index.tolist()
        count = len(self._dictionaries)
        if min(chosen) < 0 or max(chosen) >= count:
            raise IndexError(f"index must be in 0..{count - 1}, got {min(chosen)} to {max(chosen)}")
        return chosen

    def _patch_dictionary(self, k: int, dtype: torch.dtype) -> PatchDictionary:
        if (k, dtype) not in self._patches:
            self._patches[k, dtype] = PatchDictionary(self._dictionaries[k].detach().to("cpu", dtype))
        return self._patches[k, dtype]

    def _iterate(
        self,
        signal: Tensor,
        lmbda: Tensor,
        index: Tensor | None,
        start: Tensor | None,
        *,
        with_maps: bool = True,
    ) -> list[Tensor]:
        chosen = self._chosen(signal, index)
        return self._admm.solve(signal, lmbda, chosen, start, with_maps=with_maps)
