"""How far images are from others: PSNR, SSIM and the norms of perturbations, one value per image.

Images are (N, C, H, W) in [0, 1]; differences are taken in float64, so equal images are exactly equal.
"""

import numpy as np
import torch
from torch import Tensor

from acsr_ray.attacks.threat import Norm
from acsr_ray.evaluation.extras import load_extra

SSIM_WINDOW = 11


def perturbation_norms(attacked: Tensor, clean: Tensor, norm: Norm) -> Tensor:
    """Return the norm (N,) float64 of attacked - clean, per image.

    `relative_l2` is the l2 norm over the clean image's: inf for a changed black
    image, 0 for an unchanged one.
    """
    change = _flat_difference(attacked, clean)
    if norm == "linf":
        return change.abs().amax(1)
    l2 = change.norm(dim=1)
    if norm == "l2":
        return l2
    return torch.where(l2 == 0, torch.zeros_like(l2), l2 / clean.double().flatten(1).norm(dim=1))


def psnr(images: Tensor, reference: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio in dB, (N,) float64; inf where the images are equal."""
    return -10 * _flat_difference(images, reference).square().mean(1).log10()


def mean_psnr(values: Tensor) -> tuple[float, int]:
    """Average PSNRs over the images that changed.

    One untouched image would make the plain mean infinite; leaving it out unsaid would hide it.

    Args:
        values: (N,) as returned by `psnr`.

    Returns:
        The mean of the finite values, inf when there is none, and the number of infinite ones.
    """
    finite = values[values.isfinite()]
    return (float(finite.mean()) if len(finite) else float("inf")), len(values) - len(finite)


def ssim(images: Tensor, reference: Tensor) -> Tensor:
    """Return the structural similarity, (N,) float64 in [-1, 1], averaged over colours.

    Gaussian window of 11 pixels with sigma 1.5 and the constants of Wang et al. 2004.

    Raises:
        ValueError: images of other shapes, or with a side under 11.
        MissingExtraError: scikit-image is not installed.
    """
    _check_alike(images, reference)
    if min(images.shape[2:]) < SSIM_WINDOW:
        raise ValueError(f"SSIM needs sides of at least {SSIM_WINDOW}, got {tuple(images.shape[2:])}")
    metrics = load_extra("skimage.metrics")
    pairs = zip(images.double().cpu().numpy(), reference.double().cpu().numpy(), strict=True)
    values = [
        metrics.structural_similarity(
            image,
            other,
            channel_axis=0,
            data_range=1.0,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
        for image, other in pairs
    ]
    return torch.from_numpy(np.asarray(values, np.float64))


def _flat_difference(images: Tensor, reference: Tensor) -> Tensor:
    _check_alike(images, reference)
    return (images.double() - reference.double()).flatten(1)


def _check_alike(images: Tensor, reference: Tensor) -> None:
    if images.shape != reference.shape or images.ndim != 4:
        raise ValueError(
            f"need two equal shapes (N, C, H, W), got {tuple(images.shape)} and {tuple(reference.shape)}"
        )
