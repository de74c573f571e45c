"""Proximal operators and projections used by CBPDN and dictionary learning."""

import torch
from torch import Tensor

NORM_FLOOR = 1e-12


def soft_threshold(x: Tensor, threshold: float) -> Tensor:
    """Return the prox of `threshold * ||x||_1`: shrink every entry towards 0 by the threshold."""
    return x - x.clamp(-threshold, threshold)


def project_atoms(atoms: Tensor) -> Tensor:
    """Return atoms (M, C, h, w) with zero mean per channel and unit l2 norm over (C, h, w).

    The constraint of the paper's Eq. 5 is ||d_m|| <= 1; on the high-pass part the optimum has norm 1 and
    no mean. An atom that is constant in every channel stays zero.
    """
    centred = atoms - atoms.mean((2, 3), keepdim=True)
    norms = centred.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    return torch.where(norms > NORM_FLOOR, centred / norms.clamp(min=NORM_FLOOR), 0.0)
