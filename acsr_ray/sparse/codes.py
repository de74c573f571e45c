"""Sparse codes of a batch by coordinate descent, as differentiable functions of the images.

At the optimum the values on the support A solve A^T (A x - s) + lmbda sign(x) = 0, and the support stays
under small changes, so the derivative is that of x = (A^T A)^-1 (A^T s - lmbda sign(x)): one least-squares
problem per image, by conjugate gradients. It costs no memory for iterations, unlike the derivative of an
unrolled solver, and is exact where that one's depends on how many there were.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from acsr_ray.sparse.descent import Array, Entries, PatchDictionary, descend

GRADIENT_STEPS = 200
"""Most steps of conjugate gradients."""
Result = TypeVar("Result")


@dataclass(frozen=True)
class Codes:
    """Entries of N images of H x W pixels, each with its dictionary."""

    entries: list[Entries]
    dictionaries: list[PatchDictionary]
    size: tuple[int, int]

    def split(self, values: Tensor) -> list[Entries]:
        """Return each image's entries with its part of `values` (n of all images,)."""
        parts = values.detach().split([len(part) for part in self.entries])
        return [
            own.with_values(part.contiguous().numpy()) for own, part in zip(self.entries, parts, strict=True)
        ]

    @property
    def image(self) -> Tensor:
        """The image (n of all images,) int64 that each entry belongs to."""
        return torch.arange(len(self.entries)).repeat_interleave(
            torch.tensor([len(part) for part in self.entries], dtype=torch.int64)
        )

    def synthesise(self, values: Tensor) -> Tensor:
        """Return D times the values, (N, C, H, W); differentiable."""
        return _Synthesise.apply(values, self)  # type: ignore[no-untyped-call]

    def maps(self, values: Tensor) -> Tensor:
        """Return the values as coefficient maps (N, M, H, W); differentiable."""
        shape = (len(self.entries), len(self.dictionaries[0].atoms), *self.size)
        places = np.concatenate([part.places for part in self.entries])
        rows, columns, atoms = torch.from_numpy(places).long().T
        return values.new_zeros(shape).index_put((self.image, atoms, rows, columns), values)


def sparse_code(
    signal: Tensor,
    lmbda: Tensor,
    dictionaries: list[PatchDictionary],
    *,
    tolerance: float,
    rounds: int,
    start: Sequence[Entries] | None = None,
) -> tuple[Codes, Tensor]:
    """Sparse-code a batch; each image on its own.

    Args:
        signal: (N, C, H, W) on the CPU.
        lmbda: (N,).
        dictionaries: of each image.
        tolerance: see `descend`.
        rounds: see `descend`.
        start: entries of each image to start from.

    Returns:
        The codes and their values (n of all images,), differentiable in signal and lmbda.
    """
    size = (signal.shape[2], signal.shape[3])
    plain, weights = signal.detach(), lmbda.tolist()

    def solve(n: int) -> Entries:
        first = None if start is None else start[n]
        return descend(plain[n], dictionaries[n], weights[n], tolerance=tolerance, rounds=rounds, start=first)

    codes = Codes(_for_each(solve, len(signal)), dictionaries, size)
    return codes, _Values.apply(signal, lmbda, codes)  # type: ignore[no-untyped-call]


class _Values(torch.autograd.Function):
    """The optimal values, by implicit differentiation."""

    @staticmethod
    def forward(ctx: Any, signal: Tensor, lmbda: Tensor, codes: Codes) -> Tensor:  # noqa: ANN401
        ctx.codes = codes
        return torch.from_numpy(np.concatenate([part.values for part in codes.entries]))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:  # noqa: ANN401
        codes: Codes = ctx.codes
        targets = codes.split(gradient)

        def solve(n: int) -> Entries:
            return _least_squares(codes.dictionaries[n], targets[n], codes.size)

        solved = _for_each(solve, len(targets))
        to_signal = [
            own.unwrapped(own.synthesise(part, codes.size))
            for own, part in zip(codes.dictionaries, solved, strict=True)
        ]
        to_lmbda = [
            -float((np.sign(own.values) * part.values).sum())
            for own, part in zip(codes.entries, solved, strict=True)
        ]
        return torch.stack(to_signal), gradient.new_tensor(to_lmbda), None


class _Synthesise(torch.autograd.Function):
    """D times the values; its derivative is D^T."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, codes: Codes) -> Tensor:  # noqa: ANN401
        ctx.codes = codes
        parts = zip(codes.dictionaries, codes.split(values), strict=True)
        return torch.stack([own.unwrapped(own.synthesise(part, codes.size)) for own, part in parts])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # noqa: ANN401
        codes: Codes = ctx.codes
        parts = [
            own.analyse(own.wrapped(image), part)
            for own, image, part in zip(codes.dictionaries, gradient, codes.entries, strict=True)
        ]
        return torch.from_numpy(np.concatenate(parts)), None


def _least_squares(dictionary: PatchDictionary, target: Entries, size: tuple[int, int]) -> Entries:
    """Return w with A^T A w = the target's values, A the atoms at its places, by conjugate gradients."""

    def apply(direction: Array) -> Array:
        return dictionary.analyse(dictionary.synthesise(target.with_values(direction), size), target)

    values = np.zeros_like(target.values)
    residual = target.values.copy()
    direction, energy = residual.copy(), float(residual @ residual)
    enough = (4 * np.finfo(values.dtype).eps) ** 2 * energy
    for _ in range(GRADIENT_STEPS):
        if energy <= enough:
            break
        image = apply(direction)
        curvature = float(direction @ image)
        if curvature <= 0:
            # Atoms that depend on each other: there is no more to gain along them.
            break
        step = values.dtype.type(energy / curvature)
        values += step * direction
        residual -= step * image
        before, energy = energy, float(residual @ residual)
        direction = residual + values.dtype.type(energy / before) * direction
    return target.with_values(values)


def _for_each(function: Callable[[int], Result], count: int) -> list[Result]:
    """Return function(0), ..., function(count - 1), computed by as many threads as torch may use."""
    threads = torch.get_num_threads()
    if min(threads, count) <= 1:
        return [function(n) for n in range(count)]

    def alone(n: int) -> Result:
        torch.set_num_threads(1)
        return function(n)

    try:
        with ThreadPoolExecutor(min(threads, count)) as pool:
            return list(pool.map(alone, range(count)))
    finally:
        # A thread's setting is also what later threads begin with.
        torch.set_num_threads(threads)
