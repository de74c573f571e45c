"""Proximal operators and projections used by CBPDN and dictionary learning."""

from typing import Any

import torch
from torch import Tensor

ROUNDING = 32
"""Norms below so many units of rounding of the atom itself count as zero."""


def soft_threshold(x: Tensor, threshold: float | Tensor) -> Tensor:
    """Return the prox of `threshold * ||x||_1`: shrink every entry towards 0 by the threshold >= 0.

    A tensor of thresholds broadcasts, and gradients flow through it.
    """
    if isinstance(threshold, Tensor):
        shrunk: Tensor = _SoftThreshold.apply(x, threshold)  # type: ignore[no-untyped-call]
        return shrunk
    # One pass each way: x minus x clipped.
    return x - x.clamp(-threshold, threshold)


class _SoftThreshold(torch.autograd.Function):
    """Shrinking with a backward pass of one product: five times as fast as through minimum and maximum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, threshold: Tensor) -> Tensor:  # noqa: ANN401
        shrunk = x - x.clamp(-threshold, threshold)
        ctx.save_for_backward(shrunk)
        ctx.shape = threshold.shape
        return shrunk

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None]:  # noqa: ANN401
        (shrunk,) = ctx.saved_tensors
        passed = gradient * (shrunk != 0)
        if not ctx.needs_input_grad[1]:
            return passed, None
        return passed, -(passed * shrunk.sign()).sum_to_size(ctx.shape)


def project_atoms(atoms: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return atoms (M, C, h, w) with zero mean per channel and unit l2 norm over (C, h, w).

    With a mask (M, 1, h, w), atoms are zero outside it and have zero mean within.

    The constraint of the paper's Eq. 5 is ||d_m|| <= 1; on the high-pass part the optimum has norm 1 and
    no mean. An atom that is constant in every channel stays zero.
    """
    if mask is None:
        centred = atoms - atoms.mean((2, 3), keepdim=True)
    else:
        atoms = atoms * mask
        centred = (atoms - atoms.sum((2, 3), keepdim=True) / mask.sum((2, 3), keepdim=True)) * mask
    norms = centred.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    # Relative to the atom, since the mean of a constant one is only constant up to rounding.
    floor = ROUNDING * torch.finfo(atoms.dtype).eps * atoms.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    return torch.where(norms > floor, centred / norms.clamp(min=torch.finfo(atoms.dtype).tiny), 0.0)
