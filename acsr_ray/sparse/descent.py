"""CBPDN by coordinate descent over an active set, on CPUs.

At the optimum less than one coefficient in a hundred is not zero, so an algorithm on whole maps mostly
works on zeros. Here a round (1) correlates the residual with the atoms wherever an entry may violate the
optimality conditions, as one matrix product over patches; (2) adds each pixel's strongest violator to the
active set; (3) minimises over the active set by cyclic coordinate descent, whose step is one dot product
with a patch and one update of it. No step raises the objective and none needs a step size. Source: the
working sets of Friedman, Hastie and Tibshirani 2010, on the convolutional dictionary of the paper's Eq. 6.

The screening of (1) is safe: the correlations of a pixel change by at most the norm of the change of its
patch times that of the largest atom. Where the last known maximum plus that stays below lmbda, nothing is
computed.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from acsr_ray.sparse.patch_loops import blank_entries, changed_norm, merge, patch_loops, strongest

SWEEPS = (5, 5, 5, 10)
"""Most sweeps after each search for violators; the last stands for all later ones. The first searches find
most, so what they found need not be solved exactly."""
BLOCK = 4096
"""Pixels per matrix product: a limit of memory."""

Array = NDArray[Any]


@dataclass(frozen=True)
class Entries:
    """n coefficients of one image by place and atom; all others are zero.

    `places` (n, 3) int32 of row, column and atom, each at most once and in the order of the image's pixels;
    `values` (n,) in the dtype of the image.
    """

    places: NDArray[np.int32]
    values: Array

    def __len__(self) -> int:
        """Return n."""
        return len(self.values)

    def with_values(self, values: Array) -> "Entries":
        """Return the same places with other values."""
        return Entries(self.places, values)

    def extended(self, found: NDArray[np.int32]) -> "Entries":
        """Return those that are not zero and the places found, at value 0, in the order of pixels.

        In this order sweeps converge fastest: measured, to a gap 3 times as small as in order of arrival.
        """
        count = len(self) + len(found)
        places, values = np.empty((count, 3), np.int32), np.empty(count, self.values.dtype)
        count = merge(self.places, self.values, found, places, values)
        return Entries(places[:count], values[:count])

    @classmethod
    def of_maps(cls, maps: Array) -> "Entries":
        """Return the non-zeros of coefficient maps (M, H, W)."""
        rows, columns, atoms = np.nonzero(maps.transpose(1, 2, 0))
        places = np.stack([rows, columns, atoms], 1).astype(np.int32)
        return cls(places, maps[atoms, rows, columns])

    def maps(self, shape: tuple[int, int, int]) -> Tensor:
        """Return them as coefficient maps of shape (M, H, W)."""
        maps = np.zeros(shape, self.values.dtype)
        rows, columns, atoms = self.places.T
        maps[atoms, rows, columns] = self.values
        return torch.from_numpy(maps)


class PatchDictionary:
    """Atoms as coordinate descent needs them.

    Args:
        atoms: (M, C, h, w) on the CPU, float32 or float64.
    """

    def __init__(self, atoms: Tensor) -> None:
        count, self.channels, self.height, self.width = atoms.shape
        self.margin = (self.width - 1) * self.channels
        flat = atoms.permute(0, 2, 3, 1).reshape(count, -1).contiguous()
        self.transposed = flat.T.contiguous()
        self.atoms: Array = flat.numpy()
        # An atom of zeros correlates with nothing; its energy only must not divide by zero.
        self.energy: Array = flat.square().sum(1).clamp(min=torch.finfo(flat.dtype).tiny).numpy()
        self.loops = patch_loops(self.height, self.width * self.channels, self.channels)

    def wrapped(self, image: Tensor) -> Array:
        """Return an image (C, H, W) as (H, (W + w - 1) C), see `patch_loops`."""
        flat = image.permute(1, 2, 0).reshape(image.shape[1], -1)
        whole: Array = torch.cat([flat, flat[:, : self.margin]], 1).contiguous().numpy()
        return whole

    def unwrapped(self, image: Array) -> Tensor:
        """Return (C, H, W) of what `wrapped` returns."""
        body = torch.from_numpy(image)[:, : image.shape[1] - self.margin]
        return body.unflatten(1, (-1, self.channels)).permute(2, 0, 1)

    def synthesise(self, entries: Entries, size: tuple[int, int]) -> Array:
        """Return D times the entries as a wrapped image of H x W pixels."""
        image = np.zeros((size[0], size[1] * self.channels + self.margin), self.atoms.dtype)
        self.loops.synthesise(image, self.atoms, entries.places, entries.values)
        return image

    def analyse(self, image: Array, entries: Entries) -> Array:
        """Return D^T of a wrapped image at the entries, (n,)."""
        out = np.zeros(len(entries), self.atoms.dtype)
        self.loops.analyse(image, self.atoms, entries.places, out)
        return out

    def correlate(self, image: Array, pixels: Array, patches: Array, out: Tensor) -> Tensor:
        """Write D^T of a wrapped image at n pixels (numbers i W + j) to out (n, M); patches is (n, h w C)."""
        self.loops.copy_patches(image, pixels, patches)
        return torch.mm(torch.from_numpy(patches), self.transposed, out=out)


@dataclass
class Work:
    """What descents did: pixels searched, rounds, and visits of entries in sweeps."""

    searched: int = 0
    rounds: int = 0
    visits: int = 0


def descend(
    signal: Tensor,
    dictionary: PatchDictionary,
    lmbda: float,
    *,
    tolerance: float,
    rounds: int,
    start: Entries | None = None,
    work: Work | None = None,
) -> Entries:
    """Sparse-code one image.

    Args:
        signal: (C, H, W), sides at least those of an atom, in the dtype of the atoms.
        dictionary: the atoms.
        lmbda: weight of the l1 term.
        tolerance: largest violation of the optimality conditions to stop at, as a share of lmbda.
        rounds: most rounds.
        start: coefficients to start from.
        work: is added to.

    Returns:
        The coefficients that are not zero; where a correlation is not finite, a single NaN.
    """
    height, width = signal.shape[1:]
    number = dictionary.atoms.dtype.type
    weight, enough = number(lmbda), number(tolerance * lmbda)
    entries = start or Entries(np.empty((0, 3), np.int32), np.empty(0, number))
    residual = dictionary.wrapped(signal)
    if len(entries):
        residual = residual - dictionary.synthesise(entries, (height, width))
    search = _Search(dictionary, residual)
    search.finite = bool(np.isfinite(weight))
    change = np.inf
    for turn in range(rounds):
        if turn:
            search.follow(residual)
        found = search.violators(residual, entries, weight, weight + enough)
        if not search.finite:
            return Entries(np.zeros((1, 3), np.int32), np.full(1, np.nan, number))
        if not len(found) and change <= enough:
            break
        entries = entries.extended(found)
        change, sweeps = dictionary.loops.descend(
            residual,
            dictionary.atoms,
            dictionary.energy,
            entries.places,
            entries.values,
            weight,
            SWEEPS[min(turn, len(SWEEPS) - 1)],
            # Less than asked for, or the search that follows would find what is left.
            enough / 2,
        )
        if work is not None:
            work.rounds += 1
            work.visits += sweeps * len(entries)
        left = entries.places[entries.values == 0]
        # What leaves the set counts as unknown.
        search.bound[left[:, 0].astype(np.int64) * width + left[:, 1]] = np.inf
    if work is not None:
        work.searched += search.searched
    return entries.extended(np.empty((0, 3), np.int32))


class _Search:
    """Looks for entries that violate the optimality conditions, where they may.

    Args:
        dictionary: the atoms.
        residual: of the image at the start, (H, (W + w - 1) C).
    """

    def __init__(self, dictionary: PatchDictionary, residual: Array) -> None:
        self.dictionary = dictionary
        self.height = len(residual)
        self.width = (residual.shape[1] - dictionary.margin) // dictionary.channels
        pixels, number = self.height * self.width, residual.dtype
        self.searched = 0
        """Pixels, over all calls."""
        self.finite = True
        """Whether all that was searched is."""
        # Nothing is known at first: every pixel is searched.
        self.bound = np.full(pixels, np.inf, number)
        self._before, self._moved = residual.copy(), np.empty((self.height, self.width), number)
        self._position = np.full(pixels, -1, np.int32)
        rows = min(BLOCK, pixels)
        self._patches = np.empty((rows, dictionary.atoms.shape[1]), number)
        self._correlation = torch.empty(rows, len(dictionary.atoms), dtype=dictionary.transposed.dtype)
        self._reach = np.sqrt(dictionary.energy.max())

    def follow(self, residual: Array) -> None:
        """Raise every pixel's bound by what the residual's change since the last call can add."""
        own = self.dictionary
        changed_norm(residual, self._before, own.height, own.width, own.channels, self._moved)
        self.bound += self._reach * self._moved.reshape(-1)

    def violators(
        self, residual: Array, entries: Entries, lmbda: np.floating[Any], limit: np.floating[Any]
    ) -> NDArray[np.int32]:
        """Return (n, 3) row, column and atom of the strongest violator of each pixel.

        Args:
            residual: of the image.
            entries: the active set; what is not zero there is not searched.
            lmbda: magnitude that an entry must exceed.
            limit: pixels whose bound is below are not searched.
        """
        pixels = np.flatnonzero(self.bound > limit)
        self.searched += len(pixels)
        found, count = np.empty((len(pixels), 3), np.int32), 0
        for first in range(0, len(pixels), BLOCK):
            block = pixels[first : first + BLOCK]
            size = len(block)
            correlation = self.dictionary.correlate(
                residual, block, self._patches[:size], self._correlation[:size]
            )
            self._position[block] = np.arange(size, dtype=np.int32)
            blank_entries(correlation.numpy(), self._position, entries.places, entries.values, self.width)
            self._position[block] = -1
            magnitude = correlation.abs_()
            largest = magnitude.amax(1).numpy()
            self.bound[block] = largest
            self.finite = self.finite and bool(np.isfinite(largest).all())
            count += strongest(magnitude.numpy(), largest, block, lmbda, self.width, found[count:])
        return found[:count]
