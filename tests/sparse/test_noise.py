"""The noise level: white noise is measured, a scale is kept, and nothing else of an image matters."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from acsr_ray.sparse.noise import MAD_OF_NORMAL, noise_level
from acsr_ray.sparse.tikhonov import TikhonovConfig, tikhonov_split


def _random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("sigma", [0.004, 0.02, 0.1])
@pytest.mark.parametrize("size", [(64, 64), (65, 90)])
def test_white_noise_is_recovered(sigma, size):
    noise = sigma * _random(4, 3, *size)
    torch.testing.assert_close(noise_level(noise), torch.full((4,), sigma).double(), rtol=0.05, atol=0)


def test_smooth_content_adds_nothing():
    rows, columns = torch.meshgrid(torch.linspace(0, 1, 64), torch.linspace(0, 1, 48), indexing="ij")
    smooth = torch.stack([rows, columns, 0.5 + 0.5 * torch.sin(4 * rows) * columns]).double()
    assert noise_level(smooth[None]).item() < 1e-4
    noisy = smooth + 0.01 * _random(1, 3, 64, 48)
    assert noise_level(noisy).item() == pytest.approx(0.01, rel=0.05)


def test_the_high_band_tells_what_the_image_does(smooth_pixels):
    images = torch.from_numpy(smooth_pixels(8, 32, 32, 0)).permute(0, 3, 1, 2).double() / 255
    _, highpass = tikhonov_split(images, TikhonovConfig())
    torch.testing.assert_close(noise_level(highpass), noise_level(images), rtol=0.15, atol=0)
    assert (noise_level(images) > 0.02).all()


@pytest.mark.parametrize("size", [(6, 6), (7, 6), (6, 7), (2, 2), (3, 3)])
def test_it_is_the_median_of_the_diagonal_haar_coefficients(size):
    images = _random(2, 3, *size, seed=1)
    for image, level in zip(images.numpy(), noise_level(images), strict=True):
        coefficients = [
            abs(channel[r, c] - channel[r, c + 1] - channel[r + 1, c] + channel[r + 1, c + 1]) / 2
            for channel in image
            for r in range(0, size[0] - 1, 2)
            for c in range(0, size[1] - 1, 2)
        ]
        # An odd number of them, so that there is one median.
        assert len(coefficients) % 2
        assert level.item() == pytest.approx(np.median(coefficients) / MAD_OF_NORMAL)


@settings(deadline=None, max_examples=30)
@given(
    scale=st.floats(1e-3, 1e3),
    shift=st.floats(-10, 10),
    height=st.integers(2, 12),
    width=st.integers(2, 12),
)
def test_it_scales_with_the_image_and_ignores_a_shift(scale, shift, height, width):
    images = _random(2, 3, height, width, seed=height * width)
    level = noise_level(images)
    torch.testing.assert_close(noise_level(scale * images), scale * level)
    torch.testing.assert_close(noise_level(-images), level)
    torch.testing.assert_close(noise_level(images + shift), level, rtol=0, atol=1e-12)


@pytest.mark.parametrize("value", [0.0, 0.1, 1.0])
def test_a_constant_image_has_none(value):
    assert torch.equal(noise_level(torch.full((2, 3, 9, 8), value)), torch.zeros(2))


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (7, 1)])
def test_images_too_small_to_tell(size):
    level = noise_level(_random(3, 3, *size))
    assert torch.equal(level, torch.zeros(3, dtype=torch.float64))
    assert noise_level(torch.zeros(0, 3, *size)).shape == (0,)


def test_an_image_is_measured_alone():
    images = _random(5, 3, 16, 16) * torch.arange(1, 6).view(-1, 1, 1, 1)
    together = noise_level(images)
    assert torch.equal(torch.cat([noise_level(image[None]) for image in images]), together)
    assert torch.equal(noise_level(images.flip(0)), together.flip(0))
    assert (together.diff() > 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_level_has_the_type_of_the_images(dtype):
    assert noise_level(_random(2, 3, 8, 8).to(dtype)).dtype == dtype


def test_its_gradient_is_right():
    images = _random(2, 3, 4, 5, seed=2).requires_grad_()
    assert torch.autograd.gradcheck(noise_level, (images,))
