"""The objective of dictionary learning in the atoms, for given codes, as sums over lags of an atom's window.

For codes z the fidelity 1/2 sum_n ||sum_m d_m * z_nm - s_n||^2 is quadratic in the atoms: its gradient is
sum_m' G_mm' * d_m' - B_m, where G_mm'(lag) are the products of codes that lie a lag apart and B_m the sum
of the patches under the codes of atom m. Atoms are s x s, so only lags up to s - 1 matter: however large
the images are, G has M M (2s)^2 numbers and its product with the atoms takes 2s (s + 1) frequencies. Since
few codes are not zero, both sums are taken over entries. Source: the surrogate of Liu, Garcia-Cardona,
Wohlberg and Yin 2018, which they hold at the frequencies of the images.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from acsr_ray.sparse.descent import Array, Entries
from acsr_ray.sparse.patch_loops import compiled
from acsr_ray.sparse.prox import project_atoms


class Surrogate:
    """Sums over coded images.

    Args:
        atoms: (M, C, s, s), of which only shape and dtype count.
    """

    def __init__(self, atoms: Tensor) -> None:
        count, channels, self.side, _ = atoms.shape
        dtype = atoms.new_empty(0).cpu().numpy().dtype
        self.products = np.zeros((count, count, 2 * self.side, 2 * self.side), dtype)
        """(M, M, 2s, 2s): G, lags modulo 2s."""
        self.patches = np.zeros((count, self.side, self.side, channels), dtype)
        """(M, s, s, C): B."""
        self._eigenvector: Tensor | None = None

    def forget(self, weight: float) -> None:
        """Multiply both sums by a weight."""
        self.products *= weight
        self.patches *= weight

    def add(self, images: Tensor, codes: Sequence[Entries]) -> None:
        """Add images (N, C, H, W) with the codes of each, in circular boundary."""
        for image, entries in zip(images.cpu(), codes, strict=True):
            pixels = image.permute(1, 2, 0).contiguous().numpy()
            _add_image(pixels, entries.places, entries.values, self.products, self.patches)

    @property
    def usage(self) -> Array:
        """(M,) energy of each atom's codes."""
        usage: Array = np.einsum("mm->m", self.products[:, :, 0, 0]).copy()
        return usage

    def drop(self, atoms: Sequence[int]) -> None:
        """Forget all about some atoms."""
        for m in atoms:
            self.products[m] = 0
            self.products[:, m] = 0
            self.patches[m] = 0

    def minimise(self, atoms: Tensor, mask: Tensor, steps: int) -> Tensor:
        """Return feasible atoms (M, C, s, s), see `project_atoms`, after so many FISTA steps."""
        grid = (2 * self.side, 2 * self.side)
        gram = torch.fft.rfft2(torch.from_numpy(self.products)).flatten(2).permute(2, 0, 1).contiguous()
        cross = torch.from_numpy(self.patches).permute(0, 3, 1, 2)
        lipschitz = self._largest_eigenvalue(gram)
        if lipschitz <= 0:
            return atoms
        current = start = atoms.cpu()
        point, momentum = current, 1.0
        for _ in range(steps):
            point_f = torch.fft.rfft2(point, s=grid).flatten(2).permute(2, 0, 1)
            product = (gram @ point_f).permute(1, 2, 0).unflatten(2, (grid[0], -1))
            slope = torch.fft.irfft2(product, s=grid)[..., : self.side, : self.side] - cross
            following = project_atoms(point - slope / lipschitz, mask)
            next_momentum = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
            point = following + (momentum - 1) / next_momentum * (following - current)
            current, momentum = following, next_momentum
        # An atom that no code uses has no slope and stays; projection would only add rounding.
        used = torch.from_numpy(self.usage > 0).view(-1, 1, 1, 1)
        return torch.where(used, current, start).to(atoms)

    def _largest_eigenvalue(self, gram: Tensor) -> float:
        """Return an estimate of the largest eigenvalue of all frequencies, by power iteration, and a tenth.

        The sums change little between two calls, so the first iterates long and the others go on from there.
        """
        fresh = gram.sum(-1, keepdim=True)
        fresh = fresh / fresh.norm(dim=1, keepdim=True).clamp(min=1e-20)
        # With a part of the fresh start, or what was zero before, as after blank images, would stay so.
        vector = fresh if self._eigenvector is None else self._eigenvector + 0.1 * fresh
        for _ in range(8 if self._eigenvector is None else 1):
            vector = gram @ vector
            vector = vector / vector.norm(dim=1, keepdim=True).clamp(min=1e-20)
        self._eigenvector = vector
        return 1.1 * (gram @ vector).norm(dim=1).max().item()


def strongest_patches(residuals: Tensor, count: int, side: int) -> Tensor:
    """Return the patches (count, C, s, s) of most energy, of different images and places.

    Args:
        residuals: (N, C, H, W).
        count: how many; at most as many as there are patches that do not overlap.
        side: s.
    """
    energy = F.avg_pool2d(residuals.square().sum(1, keepdim=True), side, stride=side)
    _, _, rows, columns = energy.shape
    patches = []
    for position in energy.flatten().argsort(descending=True, stable=True)[:count].tolist():
        image, cell = divmod(position, rows * columns)
        top, left = (side * part for part in divmod(cell, columns))
        patches.append(residuals[image, :, top : top + side, left : left + side])
    return torch.stack(patches)


@compiled
def _add_image(image: Array, places: Array, values: Array, products: Array, patches: Array) -> None:
    """Add one image (H, W, C) with n entries sorted by pixel to the sums of `Surrogate`."""
    height, width, channels = image.shape
    side = patches.shape[1]
    # Where the entries of each pixel begin.
    begin = np.zeros(height * width + 1, np.int64)
    for n in range(len(values)):
        begin[places[n, 0] * width + places[n, 1] + 1] += 1
    for pixel in range(height * width):
        begin[pixel + 1] += begin[pixel]
    for n in range(len(values)):
        top, left, atom = places[n, 0], places[n, 1], places[n, 2]
        value = values[n]
        for i in range(side):
            row = (top + i) % height
            for j in range(side):
                column = left + j if left + j < width else left + j - width
                for c in range(channels):
                    patches[atom, i, j, c] += value * image[row, column, c]
        for i in range(1 - side, side):
            start = (top + i) % height * width
            # Lags along a row reach columns of the image, and those beyond either edge, which are its others.
            for shift in (0, width, -width):
                first, last = max(left + 1 - side + shift, 0), min(left + side - 1 + shift, width - 1)
                if first > last:
                    continue
                for other in range(begin[start + first], begin[start + last + 1]):
                    lag = places[other, 1] - left - shift
                    products[atom, places[other, 2], i, lag] += value * values[other]
