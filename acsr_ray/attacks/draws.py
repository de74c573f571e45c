"""Random numbers that belong to an image: a counter-based generator keyed by seed and row key.

Every number is a hash of (seed, key of the image, stream, position). So an image gets the same numbers alone,
in a batch, in another order, in any chunking of the data set, and on any device; no generator state exists.
The hash is SplitMix64 (Steele, Lea and Flood 2014).
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

GOLDEN = 0x9E3779B97F4A7C15
MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
MANTISSA = 24


@dataclass(frozen=True)
class Draws:
    """Source of random numbers for N images.

    `seed` is shared; `keys` (N,) int64 name the images, such as their row numbers in the data set.
    """

    seed: int
    keys: Tensor

    def rows(self, index: Tensor) -> "Draws":
        """Return the source for some of the images."""
        return replace(self, keys=self.keys[index])

    def fork(self, number: int) -> "Draws":
        """Return an independent source for the same images, such as for restart `number`."""
        mixed = _mix(torch.tensor([_signed(self.seed * GOLDEN + number + 1)]))
        return replace(self, seed=int(mixed))

    def uniform(self, shape: tuple[int, ...], stream: int) -> Tensor:
        """Return (N, *shape) float32 uniform in [0, 1); streams are independent."""
        return (self._bits(math.prod(shape), stream).float() / 2**MANTISSA).view(-1, *shape)

    def signs(self, shape: tuple[int, ...], stream: int) -> Tensor:
        """Return (N, *shape) float32 of -1 and 1."""
        return torch.where(self.uniform(shape, stream) < 0.5, -1.0, 1.0)

    def normal(self, shape: tuple[int, ...], stream: int) -> Tensor:
        """Return (N, *shape) float32 standard normal (Box-Muller)."""
        pairs = self.uniform((2, *shape), stream)
        radius = (-2 * (1 - pairs[:, 0]).log()).sqrt()
        return radius * (2 * math.pi * pairs[:, 1]).cos()

    def _bits(self, count: int, stream: int) -> Tensor:
        """Return (N, count) int64 below 2^24."""
        base = _mix(torch.tensor(_signed(self.seed * GOLDEN + stream), device=self.keys.device))
        start = _mix(self.keys.long() * _signed(GOLDEN) + base)
        counter = torch.arange(1, count + 1, device=self.keys.device) * _signed(GOLDEN)
        return _shift(_mix(start[:, None] + counter), 64 - MANTISSA)


def _mix(state: Tensor) -> Tensor:
    state = (state ^ _shift(state, 30)) * _signed(MULTIPLIERS[0])
    state = (state ^ _shift(state, 27)) * _signed(MULTIPLIERS[1])
    return state ^ _shift(state, 31)


def _shift(state: Tensor, bits: int) -> Tensor:
    """Shift right without copies of the sign bit, which int64 would bring in."""
    return (state >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    """Return the int64 with the same low 64 bits."""
    value &= 2**64 - 1
    return value - 2**64 if value >= 2**63 else value
