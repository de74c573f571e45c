"""Total variation minimisation (TVM), plain or from a random part of the pixels.

Source: Guo et al. 2018, Countering Adversarial Images using Input Transformations. Their form drops pixels
with a Bernoulli mask and fills them in; the plain form is Chambolle's denoising of the whole image.
"""

import numpy as np
import torch
from skimage.restoration import denoise_tv_chambolle
from torch import Tensor

from acsr_ray.defenses.base import Defense, Floats, PerImage, check_batch, image_generator

CHAMBOLLE_TOLERANCE = 2e-4
CHAMBOLLE_ITERATIONS = 200
INPAINT_ITERATIONS = 200
STEP = 8**-0.5
"""Both step lengths of the primal-dual method; their product times ||grad||^2 <= 8 must not exceed 1."""
FLOOR = 1e-12


class TotalVariation(PerImage):
    """Denoising by total variation over all channels together.

    Args:
        weight: of the total variation, for images in [0, 1]; larger is smoother.

    Raises:
        ValueError: weight not above 0.
    """

    def __init__(self, weight: float = 0.03) -> None:
        super().__init__()
        self.weight = _positive(weight)

    def defend(self, image: Floats, generator: np.random.Generator) -> Floats:
        """Return the denoised image; see `PerImage.defend`."""
        return denoise_tv_chambolle(
            image, self.weight, CHAMBOLLE_TOLERANCE, CHAMBOLLE_ITERATIONS, channel_axis=-1
        )


class TotalVariationDropout(Defense):
    """Reconstruction by total variation from a random subset of the pixels (Guo et al.).

    Args:
        weight: of the total variation.
        keep: probability that a pixel is kept.

    Raises:
        ValueError: weight not above 0 or keep outside (0, 1].
    """

    randomized = True

    def __init__(self, weight: float = 0.03, keep: float = 0.5) -> None:
        super().__init__()
        if not 0 < keep <= 1:
            raise ValueError(f"keep must be in (0, 1], got {keep}")
        self.weight = _positive(weight)
        self.keep = keep

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Return the reconstructions; see `Defense.forward`."""
        check_batch(images)
        arrays = images.detach().cpu().float().permute(0, 2, 3, 1).numpy()
        size = tuple(images.shape[2:])
        kept = [image_generator(array, self.seed).random(size) < self.keep for array in arrays]
        mask = torch.from_numpy(np.stack(kept) if kept else np.zeros((0, *size), bool))[:, None]
        return inpaint_total_variation(images, mask.to(images), self.weight).clamp(0, 1)


def inpaint_total_variation(
    images: Tensor, mask: Tensor, weight: float, iterations: int = INPAINT_ITERATIONS
) -> Tensor:
    """Minimise 1/2 ||mask (z - x)||^2 + weight sum_c TV(z_c), isotropic per channel.

    Chambolle and Pock's primal-dual iterations, a fixed number, so that no image waits for another.

    Args:
        images: x, (N, C, H, W).
        mask: (N, 1, H, W), 1 where x counts and 0 elsewhere.
        weight: of the total variation.
        iterations: primal-dual steps.
    """
    known = mask * images
    primal, extrapolated = known, known
    dual_rows, dual_columns = torch.zeros_like(images), torch.zeros_like(images)
    for _ in range(iterations):
        rows, columns = _gradient(extrapolated)
        dual_rows, dual_columns = dual_rows + STEP * rows, dual_columns + STEP * columns
        norm = (dual_rows.square() + dual_columns.square()).sqrt()
        shrink = weight / norm.clamp(min=max(weight, FLOOR))
        dual_rows, dual_columns = dual_rows * shrink, dual_columns * shrink
        stepped = primal + STEP * _divergence(dual_rows, dual_columns)
        following = (stepped + STEP * known) / (1 + STEP * mask)
        extrapolated = 2 * following - primal
        primal = following
    return primal


def _gradient(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return forward differences along rows and columns, 0 at the far edge."""
    rows, columns = torch.zeros_like(images), torch.zeros_like(images)
    rows[..., :-1, :] = images[..., 1:, :] - images[..., :-1, :]
    columns[..., :-1] = images[..., 1:] - images[..., :-1]
    return rows, columns


def _divergence(rows: Tensor, columns: Tensor) -> Tensor:
    """Return the negative adjoint of `_gradient`; the far edge of its input must be 0."""
    result = rows + columns
    result[..., 1:, :] -= rows[..., :-1, :]
    result[..., 1:] -= columns[..., :-1]
    return result


def _positive(weight: float) -> float:
    if not weight > 0:
        raise ValueError(f"weight must be > 0, got {weight}")
    return weight
