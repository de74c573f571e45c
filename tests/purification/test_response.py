"""Response of a network to its own output."""

import pytest
import torch

from acsr_ray.purification.response import LEAST_CHANGE, response


def test_the_second_change_over_the_first():
    images = torch.full((3, 3, 8, 8), 0.5)
    once = images + torch.tensor([0.01, 0.02, -0.1]).view(-1, 1, 1, 1)
    twice = once + torch.tensor([0.02, -0.01, 0.0]).view(-1, 1, 1, 1)
    assert response(images, once, twice).tolist() == pytest.approx([2, 0.5, LEAST_CHANGE / 0.1], rel=1e-4)


def test_changes_that_nobody_sees_count_as_none():
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert response(images, images, images).tolist() == [1, 1]
    hardly = images + torch.tensor([0, LEAST_CHANGE / 2]).view(-1, 1, 1, 1)
    assert response(images, hardly, images).tolist() == [1, 1]


def test_it_has_a_gradient_also_where_nothing_changes():
    images = torch.full((1, 3, 4, 4), 0.5, requires_grad=True)
    response(images, images * 1.0, images * 0.9).sum().backward()
    assert torch.isfinite(images.grad).all()
