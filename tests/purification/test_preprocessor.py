"""The purifier as a defence of ART: arrays and labels, layouts, gradients, inside a classifier of ART."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from acsr_ray.purification.purifier import Purifier

pytest.importorskip("art")

from art.attacks.evasion import ProjectedGradientDescent
from art.defences.preprocessor import JpegCompression
from art.estimators.classification import PyTorchClassifier

from acsr_ray.purification.preprocessor import PurifierPreprocessor

EPSILON = 8 / 255


@pytest.fixture
def purifier(tiny_bundle):
    return Purifier.load(tiny_bundle)


@pytest.fixture
def classifier(purifier, digits):
    """A classifier of ART behind the purifier."""
    return PyTorchClassifier(
        digits.model,
        torch.nn.CrossEntropyLoss(),
        input_shape=(3, 16, 16),
        nb_classes=10,
        clip_values=(0.0, 1.0),
        preprocessing_defences=[PurifierPreprocessor(purifier)],
        device_type="cpu",
    )


@pytest.mark.parametrize("channels_first", [True, False])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_arrays_in_arrays_out(purifier, digits, channels_first, dtype):
    images, labels = digits.head(7)
    defence = PurifierPreprocessor(purifier, channels_first=channels_first, batch_size=3)
    axes = (0, 1, 2, 3) if channels_first else (0, 2, 3, 1)
    given = images.numpy().transpose(axes).astype(dtype)
    untouched = given.copy()
    purified, back = defence(given, labels.numpy())
    assert (purified.shape, purified.dtype) == (given.shape, dtype)
    assert np.array_equal(given, untouched)
    assert np.array_equal(back, labels.numpy())
    assert 0 <= purified.min() <= purified.max() <= 1
    with torch.no_grad():
        expected = purifier(images).numpy().transpose(axes)
    assert np.array_equal(purified, expected.astype(dtype))
    names = np.array(["a", "b"], object)
    assert defence(given[:0], names)[1] is names
    assert defence(given[:0])[0].shape == (0, *given.shape[1:])


@pytest.mark.parametrize("channels_first", [True, False])
def test_gradients_are_those_of_autograd(purifier, digits, channels_first):
    images, _ = digits.head(4)
    weights = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    leaf = images.clone().requires_grad_()
    (expected,) = torch.autograd.grad((purifier(leaf) * weights).sum(), leaf)
    axes = (0, 1, 2, 3) if channels_first else (0, 2, 3, 1)
    defence = PurifierPreprocessor(purifier, channels_first=channels_first)
    given, upstream = images.numpy().transpose(axes), weights.numpy().transpose(axes)
    found = defence.estimate_gradient(given, upstream)
    np.testing.assert_allclose(found, expected.numpy().transpose(axes), rtol=1e-5, atol=1e-7)
    assert np.abs(found - upstream).max() > 0.01  # it is not the identity that ART takes by default


def test_ends_of_the_range(purifier, digits):
    images, _ = digits.head(3)
    defence = PurifierPreprocessor(purifier)
    given = images.clone()
    given[0, 0, 0, 0], given[1, 0, 0, 0] = -5e-5, 1 + 5e-5
    with torch.no_grad():
        expected = purifier(given.clamp(0, 1)).numpy()
    assert np.array_equal(defence(given.numpy())[0], expected)
    for wrong in (images * 255, images - 0.5, images.masked_fill(images > 0.5, torch.nan)):
        with pytest.raises(ValueError, match=r"images must be"):
            defence(wrong.numpy())
    with pytest.raises(ValueError, match="batch_size must be >= 1"):
        PurifierPreprocessor(purifier, batch_size=0)


def test_a_classifier_of_art_behind_it(purifier, classifier, digits):
    images, labels = digits.head(12)
    with torch.no_grad():
        logits = digits.model(purifier(images))
    np.testing.assert_allclose(classifier.predict(images.numpy()), logits.numpy(), rtol=1e-4, atol=1e-4)
    leaf = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(digits.model(purifier(leaf)), labels), leaf)
    found = classifier.loss_gradient(images.numpy(), np.eye(10, dtype=np.float32)[labels])
    np.testing.assert_allclose(found, gradient.numpy(), rtol=1e-3, atol=1e-7)


def test_an_attack_of_art_sees_through_it(purifier, classifier, digits):
    images, labels = digits.head(12)
    attack = ProjectedGradientDescent(
        classifier, eps=EPSILON, eps_step=2 / 255, max_iter=4, verbose=False, num_random_init=0
    )
    attacked = torch.from_numpy(attack.generate(images.numpy(), labels.numpy()))
    assert (attacked - images).abs().max() <= EPSILON + 1e-6
    with torch.no_grad():
        before, after = (F.cross_entropy(digits.model(purifier(part)), labels) for part in (images, attacked))
    assert after > before + 0.1


def test_when_it_applies(purifier, digits):
    defence = PurifierPreprocessor(purifier)
    assert (defence.is_fitted, defence.apply_fit, defence.apply_predict) == (True, False, True)
    other = PurifierPreprocessor(purifier, apply_fit=True, apply_predict=False)
    assert (other.apply_fit, other.apply_predict) == (True, False)
    defence.set_params(batch_size=2)
    assert defence.batch_size == 2
    # Beside a defence of ART's own.
    images, _ = digits.head(2)
    jpeg, _ = JpegCompression(clip_values=(0, 1), channels_first=True)(images.numpy())
    assert defence(jpeg)[0].shape == images.shape
