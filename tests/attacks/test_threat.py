"""Threat models: projections, random starts and directions, by hypothesis."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from acsr_ray.attacks.draws import Draws
from acsr_ray.attacks.threat import ThreatModel

NAMES = ["linf", "l2", "relative_l2"]
NORMS = st.sampled_from(NAMES)
EPSILONS = st.floats(0, 3)
SEEDS = st.integers(0, 10_000)


def _images(seed, num_images=4):
    return torch.rand(num_images, 3, 5, 4, generator=torch.Generator().manual_seed(seed))


def _distances(norm, delta):
    order = float("inf") if norm == "linf" else 2
    return torch.linalg.vector_norm(delta.double().flatten(1), ord=order, dim=1)


def _radii(norm, epsilon, images):
    lengths = images.double().flatten(1).norm(dim=1)
    return epsilon * lengths if norm == "relative_l2" else torch.full_like(lengths, epsilon)


def _outside(seed, images):
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed + 1))
    return images + noise * torch.tensor([0.01, 0.3, 3.0, 100.0]).view(-1, 1, 1, 1)


@settings(deadline=None, max_examples=25)
@given(norm=NORMS, epsilon=EPSILONS, seed=SEEDS)
def test_projection_is_inside_the_ball_and_the_unit_range(norm, epsilon, seed):
    images = _images(seed)
    projected = ThreatModel(norm, epsilon).project(_outside(seed, images), images)
    assert (_distances(norm, projected - images) <= _radii(norm, epsilon, images) * (1 + 1e-5) + 1e-6).all()
    assert projected.min() >= 0
    assert projected.max() <= 1


@settings(deadline=None, max_examples=25)
@given(norm=NORMS, epsilon=EPSILONS, seed=SEEDS)
def test_projection_is_idempotent(norm, epsilon, seed):
    threat, images = ThreatModel(norm, epsilon), _images(seed)
    once = threat.project(_outside(seed, images), images)
    torch.testing.assert_close(threat.project(once, images), once, rtol=0, atol=1e-6)


@settings(deadline=None, max_examples=25)
@given(norm=NORMS, epsilon=st.floats(0.05, 3), seed=SEEDS)
def test_points_inside_stay(norm, epsilon, seed):
    images = 0.25 + 0.5 * _images(seed)
    step = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
    length = (0.9 * _radii(norm, epsilon, images)).clamp(max=0.2)
    step = step * (length / _distances(norm, step)).view(-1, 1, 1, 1).float()
    inside = (images + step).clamp(0, 1)
    projected = ThreatModel(norm, epsilon).project(inside, images)
    torch.testing.assert_close(projected, inside, rtol=0, atol=1e-6)


@settings(deadline=None, max_examples=25)
@given(norm=NORMS, seed=SEEDS)
def test_epsilon_zero_is_the_identity(norm, seed):
    threat, images = ThreatModel(norm, 0.0), _images(seed)
    assert torch.equal(threat.project(_outside(seed, images), images), images)
    generator = torch.Generator().manual_seed(seed)
    assert torch.equal(threat.random_start(images, generator), images)
    assert torch.equal(threat.drawn_start(images, Draws(seed, torch.arange(4))), images)
    assert torch.equal(threat.reach(_outside(seed, images) - images, images), images)


@settings(deadline=None, max_examples=25)
@given(norm=NORMS, epsilon=st.floats(0.01, 3), seed=SEEDS)
def test_random_start_is_inside_and_reproducible(norm, epsilon, seed):
    threat, images = ThreatModel(norm, epsilon), _images(seed)
    first, again, other = (
        threat.random_start(images, torch.Generator().manual_seed(s)) for s in (seed, seed, seed + 1)
    )
    limit = _radii(norm, epsilon, images) * (1 + 1e-5) + 1e-6
    assert (_distances(norm, first - images) <= limit).all()
    assert first.min() >= 0
    assert first.max() <= 1
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    drawn = threat.drawn_start(images, Draws(seed, torch.arange(4)))
    assert (_distances(norm, drawn - images) <= limit).all()
    assert drawn.min() >= 0
    assert drawn.max() <= 1
    # An image starts alike in any company.
    alone = threat.drawn_start(images[2:3], Draws(seed, torch.tensor([2])))
    torch.testing.assert_close(alone[0], drawn[2], rtol=0, atol=1e-6)


@settings(deadline=None, max_examples=25)
@given(norm=NORMS, seed=SEEDS)
def test_direction_has_unit_length_and_ascends_fastest(norm, seed):
    gradient = torch.randn(4, 3, 5, 4, generator=torch.Generator().manual_seed(seed))
    direction = ThreatModel(norm, 1.0).direction(gradient)
    torch.testing.assert_close(_distances(norm, direction), torch.ones(4, dtype=torch.float64))
    # No unit step gains more than the dual norm of the gradient.
    dual = torch.linalg.vector_norm(gradient.flatten(1), ord=1 if norm == "linf" else 2, dim=1)
    torch.testing.assert_close((gradient * direction).sum((1, 2, 3)), dual)


def test_l2_projection_is_the_nearest_point_on_the_ray():
    images = torch.full((1, 3, 5, 4), 0.5)
    outside = images.clone()
    outside[0, 0, 0, 0], outside[0, 1, 2, 3] = 0.5 + 0.6, 0.5 - 0.8
    expected = images.clone()
    expected[0, 0, 0, 0], expected[0, 1, 2, 3] = 0.5 + 0.12, 0.5 - 0.16
    torch.testing.assert_close(ThreatModel("l2", 0.2).project(outside, images), expected)


def test_linf_projection_clamps_each_pixel():
    images = torch.full((1, 3, 5, 4), 0.5)
    outside = images + torch.linspace(-1, 1, 60).view(1, 3, 5, 4)
    got = ThreatModel("linf", 0.2).project(outside, images)
    assert torch.equal(got, outside.clamp(0.5 - 0.2, 0.5 + 0.2))


@settings(deadline=None, max_examples=25)
@given(norm=NORMS, epsilon=st.floats(0.005, 0.3), seed=SEEDS, sign=st.booleans())
def test_reach_meets_the_norm_after_clipping(norm, epsilon, seed, sign):
    images = _images(seed)
    # Pixels at both bounds: a plain step would be shortened by clipping.
    images[:, :, 0], images[:, :, 1] = 0.0, 1.0
    threat, direction = ThreatModel(norm, epsilon), _outside(seed, images) - images
    reached = threat.reach(direction.sign() if sign else direction, images)
    distances, radii = _distances(norm, reached - images), _radii(norm, epsilon, images)
    torch.testing.assert_close(distances, radii, rtol=1e-4, atol=1e-6)
    assert reached.min() >= 0
    assert reached.max() <= 1
    assert ((reached - images) * direction >= 0).all()


@pytest.mark.parametrize("norm", ["l2", "relative_l2"])
def test_reach_goes_as_far_as_it_can_where_every_pixel_saturates(norm):
    images = torch.full((1, 3, 5, 4), 0.9)
    up = torch.zeros(1, 3, 5, 4)
    up[0, 0, 0, :2] = torch.tensor([1.0, 0.01])
    reached = ThreatModel(norm, 1.0).reach(up, images)
    expected = images.clone()
    expected[0, 0, 0, :2] = 1.0
    torch.testing.assert_close(reached, expected, rtol=0, atol=1e-5)


@settings(deadline=None, max_examples=25)
@given(epsilon=st.floats(0.001, 1), seed=SEEDS)
def test_relative_l2_is_l2_with_the_radius_of_each_image(epsilon, seed):
    images = _images(seed) * torch.tensor([0.1, 0.4, 0.7, 1.0]).view(-1, 1, 1, 1)
    outside = _outside(seed, images)
    together = ThreatModel("relative_l2", epsilon).project(outside, images)
    for n in range(len(images)):
        radius = epsilon * images[n].norm().item()
        alone = ThreatModel("l2", radius).project(outside[n : n + 1], images[n : n + 1])
        torch.testing.assert_close(together[n], alone[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("norm", ["l2", "relative_l2"])
def test_sign_direction_has_unit_length_and_equal_entries(norm):
    gradient = torch.randn(4, 3, 5, 4, generator=torch.Generator().manual_seed(0))
    direction = ThreatModel(norm, 1.0).direction(gradient, sign=True)
    torch.testing.assert_close(direction, gradient.sign() / 60**0.5)


@pytest.mark.parametrize("norm", NAMES)
def test_zero_gradient_has_no_direction(norm):
    zero = torch.zeros(2, 3, 4, 4)
    assert torch.equal(ThreatModel(norm, 0.1).direction(zero), zero)


def test_unknown_norm_is_refused():
    with pytest.raises(ValueError, match="norm must be"):
        ThreatModel("l1", 0.1)


def test_negative_epsilon_is_refused():
    with pytest.raises(ValueError, match="epsilon must be"):
        ThreatModel("linf", -0.1)
