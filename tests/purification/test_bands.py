"""The split of a batch: that of each image alone, bit for bit."""

import pytest
import torch

from acsr_ray.purification.bands import split_bands
from acsr_ray.purification.micro_batches import MICRO_BATCH
from acsr_ray.sparse.admm import SMALL_PIXELS
from acsr_ray.sparse.tikhonov import TikhonovConfig, tikhonov_split

SIZE = MICRO_BATCH["cpu"]


def batch(count, height, width, seed=0):
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [(32, 32), (33, 21), (64, 64), (1, 1), (130, 131)])
def test_an_image_is_split_as_it_is_alone(size, layout):
    images = batch(SIZE + 3, *size)
    alone = [tikhonov_split(image[None], TikhonovConfig()) for image in images]
    for count in (1, SIZE - 1, SIZE + 3):
        parts = [
            split_bands(part.contiguous(memory_format=layout), TikhonovConfig())
            for part in images.split(count)
        ]
        for band in (0, 1):
            together = torch.cat([bands[band] for bands in parts])
            assert torch.equal(together, torch.cat([bands[band] for bands in alone]))


def test_both_kinds_of_micro_batch_are_tried():
    assert 64 * 64 <= SMALL_PIXELS < 130 * 131


@pytest.mark.parametrize("size", [(32, 32), (33, 21)])
def test_neighbours_and_order_change_no_bit(size):
    images, strangers = batch(SIZE, *size), 30 * batch(SIZE, *size, seed=1)
    low, high = split_bands(images, TikhonovConfig())
    for order in torch.randperm(2 * SIZE, generator=torch.Generator().manual_seed(3)).view(2, -1):
        mixed = torch.cat([images, strangers])[order]
        own = order < SIZE
        low_mixed, high_mixed = split_bands(mixed, TikhonovConfig())
        assert torch.equal(low_mixed[own], low[order[own]])
        assert torch.equal(high_mixed[own], high[order[own]])


@pytest.mark.parametrize("size", [(9, 7), (200, 130)])
def test_no_images(size):
    low, high = split_bands(torch.zeros(0, 3, *size), TikhonovConfig())
    assert low.shape == high.shape == (0, 3, *size)


@pytest.mark.parametrize("count", [1, SIZE + 1])
def test_gradients_are_those_of_the_split(count):
    images, weights = batch(count, 12, 10), batch(count, 12, 10, seed=2)
    found = []
    for split in (split_bands, tikhonov_split):
        leaf = images.clone().requires_grad_()
        (split(leaf, TikhonovConfig())[1] * weights).sum().backward()
        found.append(leaf.grad)
    torch.testing.assert_close(*found)
