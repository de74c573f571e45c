"""Convolutional dictionary learning (Eq. 5), online with second-order statistics.

Mini-batches are sparse-coded with the current dictionary; the sums A = Z^H Z and B = Z^H S over the batches,
with the past slowly forgotten, are a quadratic surrogate of the objective in the atoms, which a few FISTA
steps with projection minimise. Source: Liu, Garcia-Cardona, Wohlberg and Yin 2018, the surrogate-splitting
method that the ACSR paper cites for scale. Shapes: N images, C channels, M atoms, F frequencies.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from acsr_ray.config import Described
from acsr_ray.sparse.cbpdn import Cbpdn, CbpdnConfig
from acsr_ray.sparse.prox import project_atoms


class CdlConfig(Described):
    """Settings of dictionary learning."""

    num_atoms: int = Field(64, ge=1)
    """M."""
    support: int = Field(8, ge=2)
    """Side h = w of an atom in pixels."""
    code: CbpdnConfig = CbpdnConfig(iterations=30, rho=4.0)
    """Sparse coding inside; lmbda as the purifier's."""
    epochs: int = Field(3, ge=1)
    """Passes over the images."""
    batch_size: int = Field(8, ge=1)
    """Images per dictionary update."""
    update_steps: int = Field(8, ge=1)
    """FISTA steps per dictionary update."""
    forgetting: float = Field(5.0, ge=0)
    """Exponent p of the weight (1 - 1/t)^p of the past at update t; 0 forgets nothing."""
    backend: Literal["acsr", "sporco"] = "acsr"
    """Learner; `sporco` takes gradient steps without update_steps and forgetting, and needs CuPy on a GPU."""


@dataclass(frozen=True)
class CdlResult:
    """Atoms (M, C, h, w), zero mean per channel and unit norm, and the mean objective of each mini-batch."""

    atoms: Tensor
    objective: tuple[float, ...]


@torch.no_grad()
def learn_dictionary(highpass: Tensor, config: CdlConfig, *, seed: int) -> CdlResult:
    """Learn a dictionary of the high band of a set of images.

    Args:
        highpass: (N, C, H, W), the part of the images that CBPDN will see.
        config: settings.
        seed: fixes the starting atoms and the order of the images.

    Raises:
        ValueError: no images, images smaller than an atom, or values that are not finite; with sporco, fewer
            than two atoms.
        ImportError: the backend is sporco, and it or, for images on a GPU, CuPy is missing.
    """
    if highpass.ndim != 4 or not len(highpass) or min(highpass.shape[2:]) < config.support:
        raise ValueError(
            f"highpass must be (N >= 1, C, H, W) with sides >= {config.support}, got {tuple(highpass.shape)}"
        )
    if not torch.isfinite(highpass).all():
        raise ValueError("highpass must be finite")
    if config.backend == "sporco":
        from acsr_ray.sparse.cdl_sporco import learn_with_sporco

        return learn_with_sporco(highpass, config, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    atoms = random_patches(highpass, config, generator)
    surrogate: tuple[Tensor, Tensor] | None = None
    objective: list[float] = []
    for batch in mini_batches(highpass, config, generator):
        coded = Cbpdn(atoms, config.code).solve(batch)
        objective.append(coded.objective.mean().item())
        weight = (1 - 1 / len(objective)) ** config.forgetting
        surrogate = _accumulate(surrogate, coded.maps, batch, weight)
        atoms = _update_atoms(atoms, *surrogate, highpass.shape[-2:], config.update_steps)
    return CdlResult(atoms, tuple(objective))


def mini_batches(highpass: Tensor, config: CdlConfig, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield batches (n <= batch_size, C, H, W) of all passes, each pass in an order of its own."""
    for _ in range(config.epochs):
        for chosen in torch.randperm(len(highpass), generator=generator).split(config.batch_size):
            yield highpass[chosen.to(highpass.device)]


def random_patches(highpass: Tensor, config: CdlConfig, generator: torch.Generator) -> Tensor:
    """Start from patches of the images themselves plus a little noise, which keeps flat ones apart."""
    count, _, height, width = highpass.shape
    side, patches = config.support, []
    for _ in range(config.num_atoms):
        image, top, left = (
            int(torch.randint(limit, (), generator=generator))
            for limit in (count, height - side + 1, width - side + 1)
        )
        patches.append(highpass[image, :, top : top + side, left : left + side])
    start = torch.stack(patches)
    noise = torch.randn(start.shape, generator=generator, dtype=torch.float64).to(start)
    return project_atoms(start + 1e-3 * noise)


def _accumulate(
    surrogate: tuple[Tensor, Tensor] | None, maps: Tensor, batch: Tensor, weight: float
) -> tuple[Tensor, Tensor]:
    """Return A (F, M, M) and B (F, M, C) with this batch added and the past weighted."""
    maps_f = torch.fft.rfft2(maps).flatten(2).permute(2, 0, 1)
    batch_f = torch.fft.rfft2(batch).flatten(2).permute(2, 0, 1)
    gram, cross = maps_f.mH @ maps_f, maps_f.mH @ batch_f
    if surrogate is None:
        return gram, cross
    return weight * surrogate[0] + gram, weight * surrogate[1] + cross


def _update_atoms(atoms: Tensor, gram: Tensor, cross: Tensor, size: torch.Size, steps: int) -> Tensor:
    """Minimise the surrogate over feasible atoms by FISTA."""
    lipschitz = _largest_eigenvalue(gram)
    if lipschitz <= 0:
        return atoms
    side = atoms.shape[-1]
    current, point, momentum = atoms, atoms, 1.0
    for _ in range(steps):
        padded = F.pad(point, (0, size[1] - side, 0, size[0] - side))
        point_f = torch.fft.rfft2(padded).flatten(2).permute(2, 0, 1)
        slope_f = (gram @ point_f - cross).permute(1, 2, 0).unflatten(2, (size[0], -1))
        slope = torch.fft.irfft2(slope_f, s=tuple(size))[..., :side, :side]
        following = project_atoms(point - slope / lipschitz)
        next_momentum = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
        point = following + (momentum - 1) / next_momentum * (following - current)
        current, momentum = following, next_momentum
    return current


def _largest_eigenvalue(gram: Tensor) -> float:
    """Return an upper estimate of the largest eigenvalue over all frequencies, by power iteration."""
    vector = gram.sum(-1, keepdim=True)
    for _ in range(8):
        vector = gram @ vector
        vector = vector / vector.norm(dim=1, keepdim=True).clamp(min=1e-20)
    return 1.1 * (gram @ vector).norm(dim=1).max().item()
