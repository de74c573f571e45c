"""Convolutional dictionary learning (Eq. 5) by alternation of sparse coding and a quadratic surrogate.

`online`: mini-batches are sparse-coded with the current dictionary, and after each the atoms minimise the
sum over all batches so far, the past slowly forgotten. `batch`: all images are coded, from where the last
pass left them, and then the atoms minimise their sum. Atoms that hardly any code uses are replaced by what
the codes leave most of.
Source: Liu, Garcia-Cardona, Wohlberg and Yin 2018, the surrogate-splitting method that the ACSR paper cites
for scale. Shapes: N images, C channels, M atoms.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from acsr_ray.config import Described
from acsr_ray.sparse.cbpdn import Cbpdn, CbpdnConfig
from acsr_ray.sparse.descent import Entries
from acsr_ray.sparse.prox import project_atoms
from acsr_ray.sparse.surrogate import Surrogate, strongest_patches

DEAD_SHARE = 1e-3
"""An atom whose codes, as far as they are remembered, have less energy than this share of the mean counts
as dead after a pass, and is replaced before the next."""


class CdlConfig(Described):
    """Settings of dictionary learning."""

    num_atoms: int = Field(64, ge=1)
    """M."""
    support: int = Field(8, ge=2)
    """Side h = w of an atom in pixels."""
    scales: tuple[int, ...] = ()
    """Sides of atoms of several sizes, as (8, 12, 16) for larger images, which share num_atoms as evenly as
    can be; the largest stands for support then, and smaller atoms are zero beyond their side. (): all have
    `support`."""
    code: CbpdnConfig = CbpdnConfig(iterations=30, rho=4.0, rounds=3)
    """Sparse coding inside; lmbda as the purifier's. It need not be exact: measured, 3 rounds of descent
    end at no worse a dictionary than 8."""
    method: Literal["online", "batch"] = "online"
    """When the atoms move: after every mini-batch, or after every pass."""
    epochs: int = Field(3, ge=1)
    """Passes over the images."""
    batch_size: int = Field(8, ge=1)
    """Images per mini-batch."""
    update_steps: int = Field(12, ge=1)
    """FISTA steps per dictionary update."""
    forgetting: float = Field(10.0, ge=0)
    """Exponent p of the weight (1 - 1/t)^p of the past at update t; 0 forgets nothing. Online only."""
    backend: Literal["acsr", "sporco"] = "acsr"
    """Learner; `sporco` takes gradient steps without update_steps and forgetting, and needs CuPy on a GPU."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.scales and (min(self.scales) < 2 or len(self.scales) > self.num_atoms):
            raise ValueError(f"scales must be sides >= 2, at most one per atom, got {self.scales}")
        if self.code.padding:
            raise ValueError("dictionaries are learnt in circular boundary: code.padding must be 0")
        if self.backend == "sporco" and (self.scales or self.method == "batch"):
            raise ValueError("backend sporco learns online and atoms of one size only")
        return self

    @property
    def window(self) -> int:
        """Side of the array that holds an atom."""
        return max(self.scales, default=self.support)

    @property
    def sides(self) -> tuple[int, ...]:
        """Side of each atom."""
        scales = sorted(self.scales) or [self.support]
        return tuple(scales[m * len(scales) // self.num_atoms] for m in range(self.num_atoms))

    def mask(self) -> Tensor:
        """Return (M, 1, s, s) boolean: where an atom may be other than zero."""
        place = torch.arange(self.window)
        inside = place < torch.tensor(self.sides)[:, None]
        return (inside[:, :, None] & inside[:, None, :])[:, None]


@dataclass(frozen=True)
class CdlResult:
    """Atoms (M, C, h, w), zero mean per channel and unit norm, and the mean objective of each mini-batch."""

    atoms: Tensor
    objective: tuple[float, ...]


@torch.no_grad()
def learn_dictionary(
    highpass: Tensor, config: CdlConfig, *, seed: int, start: Tensor | None = None
) -> CdlResult:
    """Learn a dictionary of the high band of a set of images.

    Args:
        highpass: (N, C, H, W), the part of the images that CBPDN will see.
        config: settings.
        seed: fixes the starting atoms and the order of the images.
        start: (M, C, h, w) atoms to start from, as those of an earlier run; patches when omitted.

    Raises:
        ValueError: no images, images smaller than an atom, or values that are not finite; a start of another
            shape; with sporco, fewer than two atoms.
        ImportError: the backend is sporco, and it or, for images on a GPU, CuPy is missing.
    """
    side = config.window
    if highpass.ndim != 4 or not len(highpass) or min(highpass.shape[2:]) < side:
        raise ValueError(
            f"highpass must be (N >= 1, C, H, W) with sides >= {side}, got {tuple(highpass.shape)}"
        )
    if not torch.isfinite(highpass).all():
        raise ValueError("highpass must be finite")
    shape = (config.num_atoms, highpass.shape[1], side, side)
    if start is not None and start.shape != shape:
        raise ValueError(f"start must be {shape}, got {tuple(start.shape)}")
    generator = torch.Generator().manual_seed(seed)
    atoms = random_patches(highpass, config, generator)
    if start is not None:
        atoms = project_atoms(start.to(highpass), config.mask().to(highpass.device))
    if config.backend == "sporco":
        from acsr_ray.sparse.cdl_sporco import learn_with_sporco

        return learn_with_sporco(highpass, atoms, config, generator)
    return _learn(highpass, atoms, config, generator)


def _learn(highpass: Tensor, atoms: Tensor, config: CdlConfig, generator: torch.Generator) -> CdlResult:
    mask, online = config.mask(), config.method == "online"
    surrogate = Surrogate(atoms)
    codes: dict[int, Entries] = {}
    objective: list[float] = []
    for epoch in range(config.epochs):
        if not online:
            surrogate = Surrogate(atoms)
        for rows in mini_batches(len(highpass), config, generator):
            batch = highpass[rows.to(highpass.device)]
            solver = Cbpdn(atoms, config.code)
            first = None if online or not epoch else [codes[row] for row in rows.tolist()]
            coded = solver.code(batch, first)
            objective.append(coded.objective.mean().item())
            if online:
                surrogate.forget((1 - 1 / len(objective)) ** config.forgetting)
            else:
                codes |= dict(zip(rows.tolist(), coded.entries, strict=True))
            surrogate.add(batch, coded.entries)
            if online:
                atoms = surrogate.minimise(atoms, mask, config.update_steps)
        if not online:
            atoms = surrogate.minimise(atoms, mask, config.update_steps)
        if epoch + 1 < config.epochs:
            atoms = _revive(atoms, surrogate, batch - coded.reconstruction, mask)
    return CdlResult(atoms, tuple(objective))


def _revive(atoms: Tensor, surrogate: Surrogate, residuals: Tensor, mask: Tensor) -> Tensor:
    """Replace dead atoms by the strongest patches of what is left of some images."""
    usage = surrogate.usage
    dead = (usage < DEAD_SHARE * usage.mean()).nonzero()[0].tolist()
    if not dead:
        return atoms
    patches = strongest_patches(residuals, len(dead), atoms.shape[-1])
    dead = dead[: len(patches)]
    found = project_atoms(patches, mask[dead].to(patches.device))
    revived = atoms.clone()
    for m, atom in zip(dead, found, strict=True):
        # A flat patch has no atom in it; the dead one then waits for the next pass.
        if atom.norm() > 0:
            surrogate.drop([m])
            revived[m] = atom
    return revived


def mini_batches(count: int, config: CdlConfig, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield rows (n <= batch_size,) of all images, in an order of their own."""
    yield from torch.randperm(count, generator=generator).split(config.batch_size)


def random_patches(highpass: Tensor, config: CdlConfig, generator: torch.Generator) -> Tensor:
    """Start from patches of the images themselves plus a little noise, which keeps flat ones apart."""
    count, _, height, width = highpass.shape
    side, patches = config.window, []
    for _ in range(config.num_atoms):
        image, top, left = (
            int(torch.randint(limit, (), generator=generator))
            for limit in (count, height - side + 1, width - side + 1)
        )
        patches.append(highpass[image, :, top : top + side, left : left + side])
    start = torch.stack(patches)
    noise = torch.randn(start.shape, generator=generator, dtype=torch.float64).to(start)
    return project_atoms(start + 1e-3 * noise, config.mask().to(start.device))
