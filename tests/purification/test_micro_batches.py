"""Calls of a fixed shape: what a function sees, and what is made of what it gives."""

import pytest
import torch

from acsr_ray.purification.micro_batches import MICRO_BATCH, in_micro_batches, micro_batch


@pytest.mark.parametrize("count", [1, MICRO_BATCH["cpu"], 2 * MICRO_BATCH["cpu"] + 3])
def test_calls_have_one_shape_and_results_are_those_of_the_images(count):
    images = torch.rand(count, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    shapes = []

    def function(first, second):
        shapes.append((first.shape, second.shape, first.is_contiguous()))
        return (first - second).flatten(1).sum(1), first.amax((2, 3))

    total, largest = in_micro_batches(function, images, images / 2)
    shape = (MICRO_BATCH["cpu"], 3, 4, 5)
    assert set(shapes) == {(shape, shape, True)}
    torch.testing.assert_close(total, images.flatten(1).sum(1) / 2)
    assert torch.equal(largest, images.amax((2, 3)))


@pytest.mark.parametrize(
    ("size", "on_cpu", "on_gpu"),
    [((32, 32), 8, 256), ((128, 128), 8, 64), ((150, 150), 1, 46), ((4000, 3000), 1, 1)],
)
def test_the_shape_follows_from_size_and_device(size, on_cpu, on_gpu):
    assert micro_batch(*size, "cpu") == on_cpu
    assert micro_batch(*size, "cuda") == on_gpu
