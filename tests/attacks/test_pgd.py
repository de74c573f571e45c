"""PGD: closed forms on linear models, the ball, and attacks on stored pixels."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from acsr_ray.attacks.pgd import EVALUATION_BATCH, attack_pixels, pgd
from acsr_ray.attacks.threat import ThreatModel

THREATS = [ThreatModel("linf", 8 / 255), ThreatModel("l2", 0.3)]
SIDE = 6


def _images(num_images=8, seed=0, low=0.0, high=1.0):
    generator = torch.Generator().manual_seed(seed)
    return low + (high - low) * torch.rand(num_images, 3, SIDE, SIDE, generator=generator)


def _linear(num_classes=2, seed=1):
    generator = torch.Generator().manual_seed(seed)
    # Small weights: a saturated softmax has no gradient in float32.
    weight = 0.1 * torch.randn(num_classes, 3 * SIDE * SIDE, generator=generator)
    return weight, lambda images: images.flatten(1) @ weight.T


def _halves(num_images, seed):
    """Return images whose left half is brighter for label 1, and the labels."""
    labels = torch.arange(num_images) % 2
    images = _images(num_images, seed, high=0.9)
    images[..., : SIDE // 2] += 0.1 * labels.view(-1, 1, 1, 1)
    images[..., SIDE // 2 :] += 0.1 * (1 - labels).view(-1, 1, 1, 1)
    return images, labels


@pytest.fixture(scope="module")
def network():
    """Return a small network fitted to `_halves`."""
    with torch.random.fork_rng():
        torch.manual_seed(2)
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * (SIDE - 2) ** 2, 2))
    images, labels = _halves(256, seed=3)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(80):
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    return model.requires_grad_(False).eval()


def _attack(model, images, labels, threat, steps=10, seed=None):
    start = images
    if seed is not None:
        start = threat.random_start(images, torch.Generator().manual_seed(seed))
    return pgd(
        model,
        images,
        labels,
        threat=threat,
        steps=steps,
        step_size=threat.epsilon / 4,
        start=start,
    )


@pytest.mark.parametrize("threat", THREATS, ids=lambda threat: threat.norm)
@pytest.mark.parametrize("seed", [None, 4])
def test_loss_rises_within_the_ball(network, threat, seed):
    images, labels = _halves(64, seed=5)
    adversarial = _attack(network, images, labels, threat, seed=seed)
    before, after = (F.cross_entropy(network(x), labels, reduction="none") for x in (images, adversarial))
    assert (network(images).argmax(1) == labels).double().mean() > 0.9
    assert after.mean() > 1.5 * before.mean()
    assert (after >= before - 1e-5).all()
    order = float("inf") if threat.norm == "linf" else 2
    lengths = torch.linalg.vector_norm((adversarial - images).flatten(1), ord=order, dim=1)
    assert (lengths <= threat.epsilon + 1e-6).all()
    assert adversarial.min() >= 0
    assert adversarial.max() <= 1
    assert not adversarial.requires_grad


def test_linf_attack_on_a_linear_model_reaches_the_corner():
    weight, model = _linear()
    images, labels = _images(), torch.arange(8) % 2
    step = (weight[1 - labels] - weight[labels]).sign().view_as(images)
    expected = (images + 0.05 * step).clamp(0, 1)
    for steps in (5, 10):
        got = _attack(model, images, labels, ThreatModel("linf", 0.05), steps)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)


def test_l2_attack_on_a_linear_model_follows_the_gradient():
    weight, model = _linear()
    # Far from 0 and 1, so that only the ball binds.
    images, labels = _images(low=0.4, high=0.6), torch.arange(8) % 2
    slope = weight[1 - labels] - weight[labels]
    expected = images + 0.3 * (slope / slope.norm(dim=1, keepdim=True)).view_as(images)
    got = _attack(model, images, labels, ThreatModel("l2", 0.3))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def test_single_step_is_fgsm(network):
    images, labels = _halves(16, seed=6)
    leaf = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(network(leaf), labels), leaf)
    got = pgd(network, images, labels, threat=ThreatModel("linf", 0.1), steps=1, step_size=0.1, start=images)
    torch.testing.assert_close(got, (images + 0.1 * gradient.sign()).clamp(0, 1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("threat", THREATS, ids=lambda threat: threat.norm)
def test_same_generator_same_result(network, threat):
    images, labels = _halves(8, seed=7)
    state = torch.get_rng_state()
    first, again, other = (_attack(network, images, labels, threat, steps=2, seed=s) for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("seed", [None, 3])
def test_epsilon_zero_returns_the_images(norm, seed):
    _, model = _linear()
    images = _images()
    got = _attack(model, images, torch.zeros(8, dtype=torch.int64), ThreatModel(norm, 0.0), seed=seed)
    assert torch.equal(got, images)


def test_an_image_is_attacked_alike_alone_and_in_a_batch(network):
    images, labels = _halves(5, seed=8)
    together = _attack(network, images, labels, THREATS[1])
    for n in range(5):
        alone = _attack(network, images[n : n + 1], labels[n : n + 1], THREATS[1])
        torch.testing.assert_close(alone[0], together[n], rtol=0, atol=1e-5)


@pytest.mark.parametrize("threat", THREATS, ids=lambda threat: threat.norm)
def test_attacked_pixels_are_within_rounding_of_the_ball(network, threat):
    images, labels = _halves(EVALUATION_BATCH + 3, seed=9)
    pixels = (images * 255).round().byte().permute(0, 2, 3, 1).numpy()
    images, labels = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255, labels.numpy()
    attacked = attack_pixels(network, pixels, labels, threat)
    assert attacked.shape == pixels.shape
    assert attacked.dtype == np.uint8
    difference = (attacked.astype(np.float64) - pixels) / 255
    if threat.norm == "linf":
        assert np.abs(difference).max() <= threat.epsilon + 0.5 / 255 + 1e-6
    else:
        rounding = 0.5 / 255 * np.sqrt(difference[0].size)
        assert np.sqrt(np.square(difference).sum((1, 2, 3))).max() <= threat.epsilon + rounding + 1e-6
    moved = torch.from_numpy(attacked).permute(0, 3, 1, 2).float() / 255
    accuracies = [(network(x).argmax(1).numpy() == labels).mean() for x in (images, moved)]
    assert accuracies[1] < accuracies[0]
    exact = _attack(network, images, torch.from_numpy(labels), threat)
    assert (moved - exact).abs().max() <= 0.5 / 255 + 1e-4
