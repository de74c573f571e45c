"""Pixel deflection: where the copied pixels come from, and what the wavelets remove."""

import numpy as np
import pytest
import torch

from acsr_ray.defenses.deflection import PixelDeflection


def numbered(height, width):
    """An image whose pixel (i, j) says where it is."""
    rows, columns = np.indices((height, width)).astype(np.float32)
    return np.stack([rows / 255, columns / 255, np.zeros_like(rows)], -1)


def test_every_deflected_pixel_comes_from_its_window():
    image, window = numbered(20, 24), 3
    defense = PixelDeflection(deflections=60, window=window)
    deflected = defense.deflect(image, np.random.default_rng(0))
    moved = np.abs(deflected - image).max(2) > 0
    assert 30 < moved.sum() <= 60
    # A source may have been replaced before, so 60 moves could chain; at this density two steps suffice.
    assert np.abs((deflected - image) * 255).max() <= 2 * window
    assert np.array_equal(image, numbered(20, 24))


def test_no_deflection_leaves_only_the_denoising():
    noise = np.random.default_rng(0).normal(0, 0.04, (1, 3, 32, 32)).astype(np.float32)
    flat = torch.full((1, 3, 32, 32), 0.5)
    noisy = flat + torch.from_numpy(noise)
    defended = PixelDeflection(0)(noisy)
    assert (defended - flat).norm() < 0.6 * (noisy - flat).norm()
    assert np.array_equal(
        PixelDeflection(0).deflect(numbered(4, 4), np.random.default_rng(0)), numbered(4, 4)
    )


def test_stronger_assumed_noise_smooths_more(smooth_pixels):
    images = torch.from_numpy(smooth_pixels(2, 32, 32, 0)).permute(0, 3, 1, 2) / 255
    change = [(PixelDeflection(0, sigma=sigma)(images) - images).norm() for sigma in (0.01, 0.04, 0.1)]
    assert change[0] < change[1] < change[2]


@pytest.mark.parametrize("size", [(1, 1), (3, 9), (5, 4)])
def test_small_images(size):
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
    assert PixelDeflection()(images).shape == images.shape


@pytest.mark.parametrize("bad", [{"deflections": -1}, {"window": 0}, {"sigma": 0.0}])
def test_values_out_of_range(bad):
    with pytest.raises(ValueError, match="deflections must"):
        PixelDeflection(**bad)
