"""PSNR, SSIM and norms against their definitions."""

import math
from functools import partial

import numpy as np
import pytest
import torch

from acsr_ray.evaluation.quality import mean_psnr, perturbation_norms, psnr, ssim


@pytest.fixture
def images():
    return torch.rand(4, 3, 24, 20, generator=torch.Generator().manual_seed(0))


def test_psnr_is_that_of_the_mean_squared_error(images):
    # A constant change of 0.1 is an error of 0.01, 20 dB.
    other = torch.full_like(images, 0.3)
    assert psnr(other + 0.1, other).tolist() == pytest.approx([20.0] * 4, abs=1e-5)
    noisy = (images + 0.05 * torch.randn(images.shape, generator=torch.Generator().manual_seed(1))).clamp(
        0, 1
    )
    expected = [
        -10 * math.log10(np.mean((a - b) ** 2)) for a, b in zip(noisy.numpy(), images.numpy(), strict=True)
    ]
    assert psnr(noisy, images).tolist() == pytest.approx(expected, abs=1e-4)


def test_equal_images_have_infinite_psnr_and_are_counted(images):
    other = images.clone()
    other[1] = (other[1] + 0.5) % 1
    values = psnr(other, images)
    assert values.isinf().tolist() == [True, False, True, True]
    assert mean_psnr(values) == (pytest.approx(float(values[1])), 3)
    assert mean_psnr(values[:1]) == (math.inf, 1)


def test_ssim_is_one_for_equal_images_and_falls_with_noise(images):
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(2))
    small, large = (ssim((images + level * noise).clamp(0, 1), images) for level in (0.02, 0.2))
    assert ssim(images, images).tolist() == pytest.approx([1] * 4, abs=1e-9)
    assert (small < 1).all()
    assert (large < small).all()
    assert ssim(images, images).dtype == torch.float64


def test_ssim_of_constants_is_its_luminance_term():
    one, two = torch.full((1, 3, 16, 16), 0.6), torch.full((1, 3, 16, 16), 0.2)
    c1 = 0.01**2
    expected = (2 * 0.6 * 0.2 + c1) / (0.6**2 + 0.2**2 + c1)
    assert float(ssim(one, two)) == pytest.approx(expected, abs=1e-6)


def test_every_image_is_measured_alone(images):
    other = images.flip(0)
    for measure in (psnr, ssim):
        batch = measure(other, images)
        single = torch.cat([measure(other[i : i + 1], images[i : i + 1]) for i in range(4)])
        torch.testing.assert_close(batch, single)


def test_norms_of_a_known_change():
    clean = torch.full((3, 1, 2, 2), 0.5)
    clean[2] = 0
    attacked = clean.clone()
    attacked[0, 0, 0, 0] += 0.3
    attacked[0, 0, 1, 1] -= 0.4
    attacked[2, 0, 0, 1] = 0.25
    expected = {"linf": [0.4, 0, 0.25], "l2": [0.5, 0, 0.25], "relative_l2": [0.5, 0, math.inf]}
    for norm, values in expected.items():
        assert perturbation_norms(attacked, clean, norm).tolist() == pytest.approx(values, abs=1e-6)


def test_norms_of_unchanged_black_images_are_zero():
    black = torch.zeros(1, 3, 4, 4)
    assert perturbation_norms(black, black, "relative_l2").tolist() == [0]


@pytest.mark.parametrize("measure", [psnr, ssim, partial(perturbation_norms, norm="l2")])
@pytest.mark.parametrize("shapes", [((2, 3, 16, 16), (1, 3, 16, 16)), ((3, 16, 16), (3, 16, 16))])
def test_other_shapes_are_refused(measure, shapes):
    with pytest.raises(ValueError, match="two equal shapes"):
        measure(*(torch.zeros(shape) for shape in shapes))


def test_ssim_needs_room_for_its_window():
    with pytest.raises(ValueError, match="at least 11"):
        ssim(torch.zeros(1, 3, 10, 16), torch.zeros(1, 3, 10, 16))
