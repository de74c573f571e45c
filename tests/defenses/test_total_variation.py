"""Total variation: scikit-image's denoising, and the inpainting against its optimality conditions."""

import numpy as np
import pytest
import torch
from skimage.restoration import denoise_tv_chambolle

from acsr_ray.defenses.total_variation import (
    TotalVariation,
    TotalVariationDropout,
    _divergence,
    _gradient,
    inpaint_total_variation,
)


@pytest.fixture
def images(smooth_pixels):
    return torch.from_numpy(smooth_pixels(3, 16, 19, 0)).permute(0, 3, 1, 2).contiguous() / 255


def total_variation(images):
    rows, columns = _gradient(images)
    return (rows.square() + columns.square()).sqrt().sum().item()


def objective(result, images, mask, weight):
    return 0.5 * (mask * (result - images)).square().sum().item() + weight * total_variation(result)


@pytest.mark.parametrize("weight", [0.01, 0.2])
def test_plain_form_is_scikit_images(images, weight):
    defended = TotalVariation(weight)(images)
    for image, result in zip(images, defended, strict=True):
        expected = denoise_tv_chambolle(image.permute(1, 2, 0).numpy(), weight, channel_axis=-1)
        assert np.allclose(result.permute(1, 2, 0).numpy(), expected.clip(0, 1), atol=1e-6)


def test_divergence_is_the_negative_adjoint_of_the_gradient():
    x, y, z = torch.randn(3, 2, 3, 6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y[..., -1, :] = 0
    z[..., -1] = 0
    rows, columns = _gradient(x)
    assert torch.isclose((rows * y + columns * z).sum(), -(x * _divergence(y, z)).sum())


def test_a_constant_image_is_filled_in_exactly():
    images = torch.full((1, 3, 8, 8), 0.5)
    mask = (torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(0)) < 0.5).float()
    filled = inpaint_total_variation(images, mask, 0.03, iterations=3000)
    assert torch.allclose(filled, images, atol=1e-3)


def test_full_mask_agrees_with_chambolles_denoising(images):
    """On one channel, where both forms of colour total variation are the same functional."""
    grey = images[:1, :1].double()
    ours = inpaint_total_variation(grey, torch.ones_like(grey), 0.05, iterations=1500)
    theirs = denoise_tv_chambolle(grey[0, 0].numpy(), 0.05, eps=1e-9, max_num_iter=5000)
    assert np.abs(ours[0, 0].numpy() - theirs).max() < 2e-3


def test_iterations_come_near_the_optimum(images):
    mask = (torch.rand(3, 1, 16, 19, generator=torch.Generator().manual_seed(1)) < 0.5).float()
    weight = 0.03
    default = inpaint_total_variation(images, mask, weight)
    best = objective(inpaint_total_variation(images, mask, weight, 3000), images, mask, weight)
    start = objective(mask * images, images, mask, weight)
    reached = objective(default, images, mask, weight)
    assert reached - best < 0.02 * (start - best)
    nudged = default + 1e-2 * torch.randn(default.shape, generator=torch.Generator().manual_seed(2))
    assert objective(nudged, images, mask, weight) > reached


def test_dropout_draws_per_image_and_seed(images):
    defense = TotalVariationDropout(0.03, 0.5)
    whole = defense(images)
    assert torch.equal(whole[1:2], defense(images[1:2]))
    assert not torch.equal(whole, defense.with_seed(3)(images))
    # Nearly all pixels kept at nearly no weight is nearly the image; half of them is further away.
    near = TotalVariationDropout(1e-4, 1.0)(images)
    assert (near - images).abs().max() < 0.01
    assert (whole - images).abs().mean() > (near - images).abs().mean()


@pytest.mark.parametrize("bad", [(0.0, 0.5), (-1.0, 0.5), (0.1, 0.0), (0.1, 1.5)])
def test_values_out_of_range(bad):
    with pytest.raises(ValueError, match="must be"):
        TotalVariationDropout(*bad)
    if bad[0] <= 0:
        with pytest.raises(ValueError, match="weight"):
            TotalVariation(bad[0])
