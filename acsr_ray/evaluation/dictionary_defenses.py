"""Sparse coding with one dictionary for every image (STL), its controls, and the low band alone.

Random and DCT atoms ask what the learning of a dictionary is worth; the low band what its atoms are.
"""

import math

import torch
from torch import Tensor

from acsr_ray.defenses.base import Defense
from acsr_ray.purification.bands import split_bands
from acsr_ray.purification.purifier import check_images
from acsr_ray.purification.tiles import code_tiles
from acsr_ray.sparse.cbpdn import Cbpdn, CbpdnConfig
from acsr_ray.sparse.prox import project_atoms
from acsr_ray.sparse.tikhonov import TikhonovConfig

CHROMA_PENALTY = 4.0
"""A chroma atom counts as one of so many times the squared frequency: half the resolution, as in JPEG."""


class DictionaryDefense(Defense):
    """Purification as ACSR does it, but with one dictionary for all images and thus without an encoder.

    Source: Sun et al. 2019 (STL), with this package's split and solver; their rescaling by the maximum is
    left out, as it changes the brightness.

    Args:
        atoms: (M, 3, h, w).
        cbpdn: sparse coding of the high band.
        tikhonov: split.
        device: where to compute.
    """

    differentiable = True

    def __init__(
        self, atoms: Tensor, cbpdn: CbpdnConfig, tikhonov: TikhonovConfig, device: str = "cpu"
    ) -> None:
        super().__init__()
        self.device = torch.device(device)
        self.tikhonov = tikhonov
        self.solver = Cbpdn(atoms.to(self.device), cbpdn)

    def forward(self, images: Tensor) -> Tensor:
        """Return the purified images; see `Defense.forward`."""
        check_images(images)
        if not len(images):
            return images.clone()
        lowpass, highpass = split_bands(images.to(self.device, torch.float32), self.tikhonov)
        coded = code_tiles(self.solver, highpass)
        solved = torch.isfinite(coded).flatten(1).all(1).view(-1, 1, 1, 1)
        return (lowpass + torch.where(solved, coded, 0.0)).clamp(0, 1).to(images)


class LowBand(Defense):
    """The low band of the Tikhonov split alone: what is left of an image that no atom describes.

    Args:
        tikhonov: split.
    """

    differentiable = True

    def __init__(self, tikhonov: TikhonovConfig) -> None:
        super().__init__()
        self.tikhonov = tikhonov

    def forward(self, images: Tensor) -> Tensor:
        """Return the low bands; see `Defense.forward`."""
        check_images(images)
        if not len(images):
            return images.clone()
        return split_bands(images.float(), self.tikhonov)[0].clamp(0, 1).to(images)


def random_atoms(shape: tuple[int, int, int, int], seed: int) -> Tensor:
    """Return Gaussian atoms (M, C, h, w), without mean per channel and of unit norm, as learnt ones are."""
    generator = torch.Generator().manual_seed(seed)
    return project_atoms(torch.randn(shape, generator=generator, dtype=torch.float64)).float()


def dct_atoms(count: int, side: int) -> Tensor:
    """Return products of a 2-D cosine and a colour, low frequencies first, orthonormal.

    Colours are one luma and two chroma directions; a chroma atom comes when the luma atom of twice its
    frequency does. Spatial constants are left out, since the low band has them.

    Args:
        count: M; fewer are returned when the basis has fewer, 3 (side^2 - 1).
        side: h = w.

    Returns:
        (M, 3, side, side) float32.
    """
    position = torch.arange(side, dtype=torch.float64) + 0.5
    cosines = torch.cos(math.pi / side * torch.arange(side, dtype=torch.float64)[:, None] * position)
    cosines = cosines / cosines.norm(dim=1, keepdim=True)
    colours = torch.tensor([[1.0, 1, 1], [1, 0, -1], [1, -2, 1]], dtype=torch.float64)
    colours = colours / colours.norm(dim=1, keepdim=True)
    order = sorted(
        ((u * u + v * v) * (CHROMA_PENALTY if colour else 1.0), colour, u, v)
        for u in range(side)
        for v in range(side)
        for colour in range(3)
        if u or v
    )
    atoms = [
        torch.einsum("c,h,w->chw", colours[colour], cosines[u], cosines[v])
        for _, colour, u, v in order[:count]
    ]
    return torch.stack(atoms).float()
