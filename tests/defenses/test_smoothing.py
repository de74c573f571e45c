"""Filters against scipy, and the Gaussian's gradient."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter, median_filter

from acsr_ray.defenses.smoothing import Gaussian, Median


def random_images(*size, seed=0, dtype=torch.float32):
    return torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 20), st.integers(1, 20), st.floats(0.1, 3))
def test_gaussian_is_scipys(height, width, sigma):
    images = random_images(height, width, dtype=torch.float64)
    expected = gaussian_filter(images.numpy(), (0, 0, sigma, sigma), mode="reflect")
    assert np.allclose(Gaussian(sigma)(images).numpy(), expected, atol=1e-12)


def test_gaussian_does_not_depend_on_the_batch():
    images = random_images(16, 13)
    assert torch.equal(Gaussian(0.8)(images)[1:], Gaussian(0.8)(images[1:]))


def test_gaussian_gradient_by_finite_differences():
    images = random_images(5, 6, dtype=torch.float64) * 0.8 + 0.1
    assert torch.autograd.gradcheck(Gaussian(0.7), images.requires_grad_())


@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize("shape", [(16, 16), (7, 10), (1, 3)])
def test_median_is_scipys_per_channel(size, shape):
    images = random_images(*shape)
    defended = Median(size)(images).numpy()
    for image, channel in np.ndindex(2, 3):
        expected = median_filter(images[image, channel].numpy(), size=size, mode="reflect")
        assert np.array_equal(defended[image, channel], expected)


def test_median_removes_a_lone_pixel():
    images = torch.full((1, 3, 7, 7), 0.25)
    images[0, 1, 3, 3] = 1
    assert torch.equal(Median(3)(images), torch.full((1, 3, 7, 7), 0.25))


@pytest.mark.parametrize(("defense", "value"), [(Gaussian, 0.0), (Gaussian, -1.0), (Median, 1)])
def test_useless_strengths_are_refused(defense, value):
    with pytest.raises(ValueError, match=f"{value}"):
        defense(value)
