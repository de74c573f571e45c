"""DeepFool: exact on linear models, small on trained ones, and never stuck beside a boundary."""

import pytest
import torch

from acsr_ray.attacks.deepfool import deepfool
from acsr_ray.evaluation.quality import perturbation_norms


@pytest.mark.parametrize("classes", [None, 1, 3])
def test_one_step_to_the_nearest_boundary_of_a_linear_model(classes):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 48, generator=generator)
    images = torch.full((20, 3, 4, 4), 0.5) + 0.02 * torch.randn(20, 3, 4, 4, generator=generator)
    calls = []

    def model(x):
        calls.append(len(x))
        return x.flatten(1) @ weight.T

    labels = model(images).argmax(1)
    calls.clear()
    got = deepfool(model, images, labels, overshoot=0.02, classes=classes)
    logits = images.flatten(1) @ weight.T
    gaps = logits.gather(1, labels[:, None]) - logits
    slopes = (weight[labels][:, None] - weight[None]).norm(dim=2)
    nearest = torch.where(gaps == 0, torch.inf, gaps / slopes).amin(1)
    lengths = perturbation_norms(got, images, "l2").float()
    assert (model(got).argmax(1) != labels).all()
    if classes is None:
        torch.testing.assert_close(lengths, 1.02 * (nearest + 1e-4), rtol=1e-3, atol=1e-5)
        assert calls == [20, 20, 20]
    assert (lengths > nearest).all()


def test_small_and_successful_on_a_trained_network(digits):
    images, labels = digits.images, digits.labels
    got = deepfool(digits.model, images, labels)
    assert (digits.model(got).argmax(1) != labels).all()
    assert got.min() >= 0
    assert got.max() <= 1
    lengths = perturbation_norms(got, images, "l2").float()
    # Half way there the image is still what it was: the boundary is not far behind.
    half = images + 0.5 * (got - images)
    right = digits.model(images).argmax(1) == labels
    assert (digits.model(half).argmax(1) == labels)[right].double().mean() > 0.95
    assert (lengths[~right] == 0).all()


def test_an_image_is_attacked_alike_alone_and_in_a_batch(digits):
    images, labels = digits.head(30)
    together = deepfool(digits.model, images, labels)
    for n in range(0, 30, 5):
        alone = deepfool(digits.model, images[n : n + 1], labels[n : n + 1])
        torch.testing.assert_close(alone[0], together[n], rtol=0, atol=2e-4)


def test_finished_images_leave_the_batch(digits):
    images, labels = digits.images, digits.labels
    seen = []

    def model(x):
        seen.append(len(x))
        return digits.model(x)

    deepfool(model, images, labels, steps=100)
    # A fraction of 100 linearisations of every image.
    assert sum(seen) < 12 * len(images)


def test_an_image_beside_the_boundary_does_not_stay_there():
    # The remaining distance, 1e-7, is lost when it is added to pixels near 1 in float32.
    def model(x):
        lead = (x.flatten(1) - 0.9).sum(1) + 3e-7
        return torch.stack([lead, torch.zeros_like(lead)], 1)

    images = torch.full((1, 3, 4, 4), 0.9)
    labels = torch.zeros(1, dtype=torch.int64)
    assert model(images).argmax(1) == labels
    got = deepfool(model, images, labels, steps=3)
    assert model(got).argmax(1) == 1
    assert perturbation_norms(got, images, "l2") < 1e-3
