"""The contract of a defence: what it refuses, and randomness that belongs to the image alone."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from acsr_ray.defenses.base import Identity, PerImage, check_batch, image_generator, to_bytes


class Noise(PerImage):
    """Adds noise that is the image's own."""

    randomized = True

    def defend(self, image, generator):
        return image + generator.normal(0, 0.3, image.shape)


@pytest.fixture
def images(smooth_pixels):
    return torch.from_numpy(smooth_pixels(4, 9, 11, 0)).permute(0, 3, 1, 2).contiguous() / 255


def with_value(value):
    images = torch.full((2, 3, 4, 4), 0.5)
    images[1, 2, 3, 0] = value
    return images


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.zeros(3, 4, 4), "shape"),
        (torch.zeros(2, 1, 4, 4), "shape"),
        (torch.zeros(2, 4, 4, 3), "shape"),
        (torch.zeros(2, 3, 0, 4), "shape"),
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), "floating point"),
        (with_value(1.01), r"\[0, 1\]"),
        (with_value(-0.01), r"\[0, 1\]"),
        (with_value(float("nan")), r"\[0, 1\]"),
    ],
)
def test_bad_images_are_refused(bad, message):
    for defense in (Identity(), Noise()):
        with pytest.raises(ValueError, match=message):
            defense(bad)


@pytest.mark.parametrize("count", [0, 1])
def test_ends_of_the_range_and_empty_batches_pass(count):
    for value in (0.0, 1.0):
        check_batch(torch.full((count, 3, 2, 2), value))
    assert Noise()(torch.zeros(count, 3, 2, 5)).shape == (count, 3, 2, 5)


def test_identity_returns_the_images(images):
    assert torch.equal(Identity()(images), images)
    assert torch.equal(Identity().logits(lambda x: x.mean((2, 3)), images), images.mean((2, 3)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_per_image_keeps_dtype_shape_and_range(images, dtype):
    defended = Noise()(images.to(dtype))
    assert defended.dtype == dtype
    assert defended.shape == images.shape
    assert defended.min() == 0
    assert defended.max() == 1


def test_randomness_is_the_images_own(images):
    defense = Noise()
    whole = defense(images)
    assert torch.equal(whole, defense(images))
    assert torch.equal(whole.flip(0), defense(images.flip(0)))
    assert torch.equal(whole[2:3], defense(images[2:3]))
    # The same image twice gets the same draws; another one others.
    assert torch.equal(*defense(images[:1].repeat(2, 1, 1, 1)))
    assert not torch.equal(whole[0] - images[0], whole[1] - images[1])


def test_with_seed_is_a_fresh_copy(images):
    first = Noise()
    second = first.with_seed(7)
    assert (first.seed, second.seed) == (0, 7)
    assert not torch.equal(first(images), second(images))
    assert torch.equal(second(images), first.with_seed(7)(images))
    assert torch.equal(first(images), Noise()(images))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**70), level=st.integers(0, 255))
def test_generator_sees_8_bit_pixels_only(seed, level):
    image = np.full((2, 3, 3), level / 255, np.float32)
    nudged = np.clip(image + 0.001, 0, 1)
    draws = [image_generator(x, seed).random(4) for x in (image, nudged)]
    assert np.array_equal(*draws)
    other = image_generator(1 - image, seed).random(4)
    assert np.array_equal(draws[0], other) == (level == 255 - level)


def test_bytes_invert_unit_range():
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    assert np.array_equal(to_bytes(levels.astype(np.float32) / np.float32(255)), levels)
