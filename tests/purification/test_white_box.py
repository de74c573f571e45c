"""The purifier in front of a classifier as one module: attacked by torchattacks, moved, cast and copied."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from acsr_ray.purification.purifier import Purifier

torchattacks = pytest.importorskip("torchattacks")

EPSILON = 8 / 255


@pytest.fixture(params=["tiny_bundle", "unrolled_bundle"])
def purifier(request):
    return Purifier.load(request.getfixturevalue(request.param))


def loss(model, images, labels):
    with torch.no_grad():
        return F.cross_entropy(model(images), labels).item()


def test_torchattacks_sees_through_the_purifier(purifier, digits):
    images, labels = digits.head(24)
    defended = nn.Sequential(purifier, digits.model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        gray, white = (
            torchattacks.PGD(model, eps=EPSILON, alpha=2 / 255, steps=5, random_start=False)(images, labels)
            for model in (digits.model, defended)
        )
    assert (white - images).abs().max() <= EPSILON + 1e-6
    # Who attacks the classifier alone does less harm behind the purifier than who attacks both.
    assert loss(defended, white, labels) > loss(defended, gray, labels) > loss(defended, images, labels)
    assert loss(digits.model, gray, labels) > loss(digits.model, white, labels)
    assert all(parameter.grad is None for parameter in purifier.parameters())


def test_one_step_is_that_of_the_gradient_through_both(purifier, digits):
    images, labels = digits.head(8)
    leaf = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(digits.model(purifier(leaf)), labels), leaf)
    assert (gradient.flatten(1).norm(dim=1) > 0).all()
    stepped = torchattacks.FGSM(nn.Sequential(purifier, digits.model), eps=EPSILON)(images, labels)
    expected = (images + EPSILON * gradient.sign()).clamp(0, 1)
    assert torch.equal(stepped, expected)


def test_a_classifier_learns_behind_it_and_it_stays(purifier, digits):
    images, labels = digits.head(8)
    before = purifier(images)
    defended = nn.Sequential(purifier, copy.deepcopy(digits.model).requires_grad_(True)).train()
    assert not purifier.encoder.training
    F.cross_entropy(defended(images), labels).backward()
    learning = [name for name, parameter in defended.named_parameters() if parameter.grad is not None]
    assert learning
    assert all(name.startswith("1.") for name in learning)
    assert torch.equal(purifier(images), before)


@pytest.mark.parametrize("change", [nn.Module.double, nn.Module.half, lambda m: m.to("cpu", torch.bfloat16)])
def test_casts_of_the_whole_leave_its_pixels(purifier, digits, change):
    images, _ = digits.head(5)
    before = purifier.purify(images)
    defended = change(nn.Sequential(purifier, copy.deepcopy(digits.model)))
    assert defended[1][0].weight.dtype != torch.float32
    after = purifier.purify(images)
    assert torch.equal(after.images, before.images)
    assert torch.equal(after.distance, before.distance)
    again = copy.deepcopy(defended)[0]
    assert torch.equal(again(images), before.images)
