"""Image quilting: the image laid anew from patches of clean training images.

Source: Guo et al. 2018, after Efros and Freeman 2001. At every point of a grid, one of the K nearest patches
of the bank is placed; where it overlaps what is there, the cut of least difference joins the two.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from acsr_ray.artifacts import (
    ArtifactError,
    load_artifact,
    load_tensors,
    save_tensor_artifact,
)
from acsr_ray.config import Described
from acsr_ray.defenses.base import Floats, PerImage

PATCHES = "patches.safetensors"
KIND = "patch_bank"


class PatchBankConfig(Described):
    """How a patch bank is collected."""

    count: int = Field(50_000, ge=1)
    """Patches in the bank."""
    side: int = Field(5, ge=2)
    """Side of a patch in pixels; the paper's is 5."""


def save_patch_bank(directory: Path, patches: NDArray[np.uint8], content: dict[str, Any]) -> None:
    """Write patches (B, P, P, 3) as artifact `patch_bank`."""
    save_tensor_artifact(directory, KIND, PATCHES, {"patches": torch.from_numpy(patches)}, content)


def load_patch_bank(directory: Path) -> Tensor:
    """Return the patches (B, P, P, 3) uint8 of an artifact; `ArtifactError` when it is not one."""
    load_artifact(directory, KIND)
    patches = load_tensors(directory / PATCHES).get("patches")
    if patches is None or patches.ndim != 4 or patches.dtype != torch.uint8:
        raise ArtifactError(f"{directory} holds no 8-bit patches (B, P, P, 3)")
    return patches


def collect_patches(pixels: NDArray[np.uint8], config: PatchBankConfig, seed: int) -> NDArray[np.uint8]:
    """Cut random patches from images.

    Args:
        pixels: (N, H, W, 3) uint8.
        config: number and side of the patches.
        seed: fixes images and positions.

    Returns:
        (B, P, P, 3) uint8.

    Raises:
        ValueError: images smaller than a patch.
    """
    count, height, width, _ = pixels.shape
    side = config.side
    if not count or min(height, width) < side:
        raise ValueError(f"pixels must be (N >= 1, H, W, 3) with sides >= {side}, got {pixels.shape}")
    generator = np.random.default_rng(seed)
    image = generator.integers(count, size=config.count)
    top = generator.integers(height - side + 1, size=config.count)
    left = generator.integers(width - side + 1, size=config.count)
    span = np.arange(side)
    rows = (top[:, None] + span)[:, :, None]
    columns = (left[:, None] + span)[:, None, :]
    return pixels[image[:, None, None], rows, columns]


class Quilting(PerImage):
    """Replace an image by a quilt of patches from a bank.

    Args:
        patches: the bank, (B, P, P, 3) uint8.
        neighbours: K; the patch is drawn from the K nearest, 1 always takes the nearest.
        overlap: rows and columns that neighbouring patches share.
        seams: join by the cut of least difference; otherwise the later patch covers the earlier.

    Raises:
        ValueError: more neighbours than patches, or an overlap not below the patch side.
    """

    randomized = True

    def __init__(self, patches: Tensor, neighbours: int = 10, overlap: int = 2, seams: bool = True) -> None:
        super().__init__()
        if not 1 <= neighbours <= len(patches):
            raise ValueError(f"neighbours must be in 1..{len(patches)}, got {neighbours}")
        if not 0 <= overlap < patches.shape[1]:
            raise ValueError(f"overlap must be in 0..{patches.shape[1] - 1}, got {overlap}")
        self.bank = patches.flatten(1).float() / 255
        self.squares = self.bank.square().sum(1)
        self.side = patches.shape[1]
        self.neighbours = neighbours
        self.overlap = overlap
        self.seams = seams

    def defend(self, image: Floats, generator: np.random.Generator) -> Floats:
        """Return the quilt; see `PerImage.defend`."""
        height, width = image.shape[:2]
        side = self.side
        # An image smaller than a patch is extended by its edge, and cut back at the end.
        padding = (max(0, side - height), max(0, side - width))
        source = np.pad(image, ((0, padding[0]), (0, padding[1]), (0, 0)), mode="edge")
        corners = [(top, left) for top in self._grid(source.shape[0]) for left in self._grid(source.shape[1])]
        wanted = np.stack([source[top : top + side, left : left + side] for top, left in corners])
        chosen = self._choose(torch.from_numpy(wanted).flatten(1), generator)
        quilt = np.zeros_like(source)
        covered = np.zeros(source.shape[:2], bool)
        for (top, left), patch in zip(corners, chosen, strict=True):
            self._lay(quilt, covered, patch, top, left)
        return quilt[:height, :width]

    def _grid(self, length: int) -> list[int]:
        last = length - self.side
        starts = list(range(0, last + 1, self.side - self.overlap))
        return starts if starts[-1] == last else [*starts, last]

    def _choose(self, wanted: Tensor, generator: np.random.Generator) -> Floats:
        """Return a patch (n, P, P, 3) of the bank for each row (n, 3 P P)."""
        distance = self.squares - 2 * (wanted @ self.bank.T)
        nearest = distance.topk(self.neighbours, dim=1, largest=False).indices
        drawn = torch.from_numpy(generator.integers(self.neighbours, size=len(wanted)))
        index = nearest[torch.arange(len(wanted)), drawn]
        return self.bank[index].unflatten(1, (self.side, self.side, 3)).numpy()

    def _lay(self, quilt: Floats, covered: NDArray[np.bool_], patch: Floats, top: int, left: int) -> None:
        """Put a patch into the quilt, joined to what is there already."""
        area = (slice(top, top + self.side), slice(left, left + self.side))
        old, there = quilt[area], covered[area]
        keep_old = np.zeros_like(there)
        if self.seams and there.any():
            difference = ((old - patch) ** 2).sum(2)
            # Patches come in raster order: what is there covers whole rows above, whole columns left.
            columns = int(there[-1].sum())
            rows = int(there[:, -1].sum())
            if columns:
                keep_old[:, :columns] |= left_of_seam(difference[:, :columns])
            if rows:
                keep_old[:rows] |= left_of_seam(difference[:rows].T).T
        quilt[area] = np.where(keep_old[..., None], old, patch)
        covered[area] = True


def left_of_seam(cost: Floats) -> NDArray[np.bool_]:
    """Return which cells (n, w) lie left of the top-to-bottom path of least cost; the path itself does not.

    The path moves by at most one column per row.
    """
    total = np.array(cost, np.float64)
    width = total.shape[1]
    for row in range(1, len(total)):
        padded = np.pad(total[row - 1], 1, constant_values=np.inf)
        total[row] += np.minimum(np.minimum(padded[:-2], padded[1:-1]), padded[2:])
    path = np.empty(len(total), np.int64)
    path[-1] = int(total[-1].argmin())
    for row in range(len(total) - 2, -1, -1):
        low, high = max(0, path[row + 1] - 1), min(width, path[row + 1] + 2)
        path[row] = low + int(total[row, low:high].argmin())
    return np.arange(width) < path[:, None]
