"""JPEG equals Pillow's round trip; SHIELD is a mosaic of such round trips."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from acsr_ray.defenses.compression import BLOCK, SHIELD_QUALITIES, Jpeg, Shield


def as_images(pixels):
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255


def as_pixels(images):
    return (images * 255).round().byte().permute(0, 2, 3, 1).numpy()


def pillow(pixels, quality, subsampling="4:2:0"):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality, subsampling=subsampling)
    return np.asarray(Image.open(buffer))


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize(("quality", "size"), [(1, (16, 16)), (75, (32, 32)), (100, (9, 21))])
def test_jpeg_is_pillows_round_trip(smooth_pixels, quality, size, subsampling):
    pixels = smooth_pixels(2, *size, 1)
    defended = as_pixels(Jpeg(quality, subsampling)(as_images(pixels)))
    expected = np.stack([pillow(image, quality, subsampling) for image in pixels])
    assert np.array_equal(defended, expected)


def test_quality_and_subsampling_matter(smooth_pixels):
    images = as_images(smooth_pixels(4, 32, 32, 2))
    error = [(Jpeg(quality)(images) - images).square().mean() for quality in (10, 50, 95)]
    assert error[0] > error[1] > error[2]
    assert not torch.equal(Jpeg(75, "4:4:4")(images), Jpeg(75, "4:2:0")(images))


@pytest.mark.parametrize("quality", [0, 101])
def test_quality_out_of_range(quality):
    with pytest.raises(ValueError, match="quality"):
        Jpeg(quality)


def test_every_shield_block_is_one_of_the_qualities(smooth_pixels):
    pixels = smooth_pixels(1, 36, 44, 3)
    defended = as_pixels(Shield()(as_images(pixels)))[0]
    versions = [pillow(pixels[0], quality) for quality in SHIELD_QUALITIES]
    used = set()
    for top in range(0, 36, BLOCK):
        for left in range(0, 44, BLOCK):
            block = np.s_[top : top + BLOCK, left : left + BLOCK]
            match = [
                k for k, version in enumerate(versions) if np.array_equal(defended[block], version[block])
            ]
            assert match
            used.update(match)
    assert used == {0, 1, 2, 3}


def test_shield_draws_anew_with_another_seed(smooth_pixels):
    images = as_images(smooth_pixels(1, 32, 32, 4))
    assert not torch.equal(Shield()(images), Shield().with_seed(1)(images))
