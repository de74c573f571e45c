"""Tikhonov split against dense algebra and its own invariants."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from acsr_ray.sparse.tikhonov import TikhonovConfig, tikhonov_split


def _random_images(shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _dense_lowpass(image, lmbda, padding):
    """Solve (I + lmbda sum_j G_j^T G_j) low = padded with explicit circular difference matrices."""
    padded = np.pad(image, padding, mode="symmetric")
    height, width = padded.shape
    gradient_h = np.roll(np.eye(height), 1, axis=1) - np.eye(height)
    gradient_w = np.roll(np.eye(width), 1, axis=1) - np.eye(width)
    rows = np.kron(gradient_h, np.eye(width))
    columns = np.kron(np.eye(height), gradient_w)
    normal = np.eye(height * width) + lmbda * (rows.T @ rows + columns.T @ columns)
    low = np.linalg.solve(normal, padded.ravel()).reshape(height, width)
    end_h, end_w = height - padding, width - padding
    return low[padding:end_h, padding:end_w]


@pytest.mark.parametrize("lmbda", [0.5, 5.0])
@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("size", [(8, 8), (5, 7)])
def test_equals_dense_normal_equations(size, lmbda, padding):
    images = _random_images((2, 3, *size))
    low, _ = tikhonov_split(images, TikhonovConfig(lmbda=lmbda, padding=padding))
    for n, c in np.ndindex(2, 3):
        expected = _dense_lowpass(images[n, c].numpy(), lmbda, padding)
        np.testing.assert_allclose(low[n, c].numpy(), expected, atol=1e-12)


@settings(deadline=None, max_examples=25)
@given(
    height=st.integers(1, 37),
    width=st.integers(1, 37),
    padding=st.integers(0, 20),
    lmbda=st.floats(0.01, 50),
)
def test_any_size_matches_numpy_and_sums_to_the_image(height, width, padding, lmbda):
    images = _random_images((1, 2, height, width))
    low, high = tikhonov_split(images, TikhonovConfig(lmbda=lmbda, padding=padding))
    assert low.shape == high.shape == images.shape
    torch.testing.assert_close(low + high, images, rtol=0, atol=1e-14)

    padded = np.pad(images.numpy(), ((0, 0), (0, 0), (padding,) * 2, (padding,) * 2), mode="symmetric")
    slopes = [2 - 2 * np.cos(2 * np.pi * np.arange(size) / size) for size in padded.shape[2:]]
    response = 1 / (1 + lmbda * np.add.outer(*slopes))
    expected = np.fft.ifft2(np.fft.fft2(padded) * response).real
    inner = expected[..., padding : padding + height, padding : padding + width]
    np.testing.assert_allclose(low.numpy(), inner, atol=1e-12)


def test_constant_image_is_all_low():
    images = torch.full((2, 3, 11, 9), 0.37, dtype=torch.float64)
    low, high = tikhonov_split(images, TikhonovConfig())
    torch.testing.assert_close(low, images, rtol=0, atol=1e-14)
    assert high.abs().max() < 1e-14


@pytest.mark.parametrize("size", [(1, 1), (1, 13), (2, 3), (13, 17), (31, 31)])
def test_tiny_and_prime_sizes(size):
    images = _random_images((1, 3, *size), seed=3)
    low, high = tikhonov_split(images, TikhonovConfig(padding=16))
    assert low.shape == images.shape
    if size == (1, 1):
        assert high.abs().max() < 1e-14
    else:
        assert high.abs().max() > 1e-3


def test_larger_lmbda_is_smoother():
    images = _random_images((2, 3, 20, 24), seed=4)
    roughness = []
    for lmbda in (0.1, 1.0, 10.0, 100.0):
        low, _ = tikhonov_split(images, TikhonovConfig(lmbda=lmbda))
        roughness.append((low.diff(dim=2).square().sum() + low.diff(dim=3).square().sum()).item())
    assert all(later < 0.7 * earlier for earlier, later in pairwise(roughness))


def test_float32_splits_like_float64():
    images = _random_images((2, 3, 19, 32), seed=5)
    low64, _ = tikhonov_split(images, TikhonovConfig())
    low32, _ = tikhonov_split(images.float(), TikhonovConfig())
    assert low32.dtype == torch.float32
    torch.testing.assert_close(low32.double(), low64, rtol=0, atol=2e-6)


def test_each_image_and_channel_on_its_own():
    images = _random_images((3, 3, 12, 10), seed=6)
    low, _ = tikhonov_split(images, TikhonovConfig())
    alone, _ = tikhonov_split(images[1:2, 2:3], TikhonovConfig())
    torch.testing.assert_close(low[1:2, 2:3], alone, rtol=0, atol=1e-14)


def test_one_size_in_several_dtypes_and_strengths_of_smoothing():
    images = _random_images((1, 3, 15, 22), seed=7)
    for lmbda in (1.0, 9.0, 1.0):
        # A narrow border: the dense oracle's time grows with the cube of the padded area.
        config = TikhonovConfig(lmbda=lmbda, padding=4)
        low, _ = tikhonov_split(images, config)
        for channel in range(3):
            expected = _dense_lowpass(images[0, channel].numpy(), lmbda, 4)
            np.testing.assert_allclose(low[0, channel].numpy(), expected, atol=1e-12)
        single, _ = tikhonov_split(images.float(), config)
        assert single.dtype == torch.float32
        torch.testing.assert_close(single.double(), low, rtol=0, atol=2e-6)


def test_gradients_after_a_call_in_inference_mode():
    images = _random_images((1, 3, 23, 10), seed=8)
    with torch.inference_mode():
        tikhonov_split(images, TikhonovConfig())
    images.requires_grad_()
    low, _ = tikhonov_split(images, TikhonovConfig())
    low.sum().backward()
    assert images.grad.abs().max() > 0
