"""Wrappers of defences: values, gradients by finite differences, randomness, state per image."""

import pytest
import torch
import torch.nn.functional as F

from acsr_ray.attacks.adaptive import (
    Bpda,
    EndToEnd,
    Eot,
    FixedRows,
    LowFrequency,
    SelectionLogits,
    attack_low_frequency,
    fourier_lowpass,
)
from acsr_ray.attacks.rounding import round_to_pixels
from acsr_ray.attacks.run import is_fooled, run_attack
from acsr_ray.attacks.spec import AttackConfig
from acsr_ray.attacks.subset import subset_model
from acsr_ray.evaluation.quality import perturbation_norms

GENERATOR = torch.Generator().manual_seed(3)
WEIGHT = torch.randn(4, 3 * 6 * 5, generator=GENERATOR, dtype=torch.float64)
IMAGES = 0.2 + 0.6 * torch.rand(3, 3, 6, 5, generator=GENERATOR, dtype=torch.float64)
LABELS = torch.tensor([0, 1, 2])


def _classify(images):
    return torch.tanh(images.flatten(1) @ WEIGHT.T / 5)


def _blur(images):
    return F.avg_pool2d(images, 3, 1, 1).square()


def _quantise(images):
    return (images * 8).round() / 8


def _gradient(model, images=IMAGES):
    leaf = images.clone().requires_grad_()
    return torch.autograd.grad(F.cross_entropy(model(leaf), LABELS[: len(images)]), leaf)[0]


@pytest.mark.parametrize(
    "model",
    [
        EndToEnd(_blur, _classify),
        Eot(lambda draw: EndToEnd(lambda x: _blur(x) * (1 + draw / 5), _classify), 3, fresh=False),
        LowFrequency(_classify, IMAGES * 0.9, 0.5),
        FixedRows(lambda x, shift: _classify(_blur(x) * shift), (torch.rand(3, 3, 6, 5).double(),)),
        SelectionLogits(lambda x: torch.cdist(x.flatten(1) @ WEIGHT.T, WEIGHT[:, :4]), scale=7.0),
    ],
    ids=["end_to_end", "eot", "low_frequency", "fixed_rows", "selection"],
)
def test_gradients_agree_with_finite_differences(model):
    assert torch.autograd.gradcheck(model, (IMAGES.clone().requires_grad_(),))


def test_end_to_end_is_the_composition():
    torch.testing.assert_close(EndToEnd(_blur, _classify)(IMAGES), _classify(_blur(IMAGES)))


def test_bpda_has_the_defences_value_and_the_identitys_gradient():
    model = Bpda(_quantise, _classify)
    assert torch.equal(model(IMAGES), _classify(_quantise(IMAGES)))
    # The classifier's gradient at the defended image, as if the defence were not there.
    torch.testing.assert_close(_gradient(model), _gradient(_classify, _quantise(IMAGES)))
    assert _gradient(EndToEnd(_quantise, _classify)).abs().max() == 0


def test_bpda_can_go_back_through_a_surrogate():
    model = Bpda(_quantise, _classify, backward=_blur)
    assert torch.equal(model(IMAGES), _classify(_quantise(IMAGES)))
    at_defended = _gradient(_classify, _quantise(IMAGES))
    leaf = IMAGES.clone().requires_grad_()
    (expected,) = torch.autograd.grad(_blur(leaf), leaf, at_defended)
    torch.testing.assert_close(_gradient(model), expected)
    # With the defence as its own surrogate this is the white box.
    torch.testing.assert_close(
        _gradient(Bpda(_blur, _classify, _blur)), _gradient(EndToEnd(_blur, _classify))
    )


def test_bpda_refuses_passes_of_different_shapes():
    with pytest.raises(ValueError, match="its backward pass"):
        Bpda(lambda x: x[..., ::2, :], _classify)(IMAGES)


def test_bpda_does_not_call_the_defence_with_gradients():
    def defense(images):
        assert not torch.is_grad_enabled()
        return images

    _gradient(Bpda(defense, _classify))


def _noisy(draw):
    shift = torch.randn(IMAGES.shape, generator=torch.Generator().manual_seed(draw), dtype=torch.float64)
    return lambda x: _classify(x + 0.3 * shift)


def test_eot_is_unbiased_and_its_spread_falls_with_the_samples():
    truth = Eot(_noisy, 4000, fresh=False)(IMAGES)
    deviation = {}
    for samples in (1, 16):
        model = Eot(_noisy, samples)
        errors = torch.stack([model(IMAGES) - truth for _ in range(60)])
        deviation[samples] = errors.square().mean().sqrt()
        assert errors.mean(0).abs().max() < 5 * deviation[samples] / 60**0.5
    assert 0.7 < deviation[1] / deviation[16] / 4 < 1.4


def test_eot_gradient_is_the_mean_of_the_gradients():
    leaf = IMAGES.clone().requires_grad_()
    (together,) = torch.autograd.grad(Eot(_noisy, 5)(leaf)[:, 0].sum(), leaf)
    single = [torch.autograd.grad(_noisy(draw)(leaf)[:, 0].sum(), leaf)[0] for draw in range(5)]
    torch.testing.assert_close(together, torch.stack(single).mean(0))


def test_eot_draws_anew_in_every_call_also_for_fewer_rows():
    used = []

    def make(draw):
        used.append(draw)
        return _classify

    model = Eot(make, 2)
    model(IMAGES)
    model.rows(torch.tensor([1]))(IMAGES[1:2])
    model(IMAGES)
    assert used == [0, 1, 2, 3, 4, 5]
    used.clear()
    fixed = Eot(make, 2, fresh=False)
    fixed(IMAGES)
    fixed(IMAGES)
    assert used == [0, 1, 0, 1]


def test_eot_needs_a_sample():
    with pytest.raises(ValueError, match="samples must be >= 1"):
        Eot(_noisy, 0)


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9, 1.0])
def test_lowpass_is_a_projection_that_keeps_the_mean(share):
    lowpass = fourier_lowpass(share)
    once = lowpass(IMAGES)
    assert once.shape == IMAGES.shape
    torch.testing.assert_close(lowpass(once), once)
    torch.testing.assert_close(once.mean((2, 3)), IMAGES.mean((2, 3)))
    assert (once.norm() < IMAGES.norm()) == (share < 1)
    torch.testing.assert_close((once * (IMAGES - once)).sum(), torch.zeros((), dtype=torch.float64))


def test_lowpass_share_is_checked():
    with pytest.raises(ValueError, match="share must be"):
        fourier_lowpass(0.0)


def test_a_high_frequency_perturbation_is_nothing_to_the_low_frequency_model():
    checker = 0.05 * (-1.0) ** (torch.arange(6)[:, None] + torch.arange(4)[None])
    images = IMAGES[..., :4]
    model = LowFrequency(lambda x: x.flatten(1), images, 0.5)
    torch.testing.assert_close(model(images + checker), images.flatten(1))
    torch.testing.assert_close(model(images + 0.05), (images + 0.05).flatten(1))


def test_low_frequency_attack_returns_images_that_differ_in_the_low_band_only(digits):
    images, labels = digits.head(40)
    # Away from the bounds of [0, 1], where clipping would bring high frequencies back.
    images = round_to_pixels(0.25 + 0.5 * images)
    config = AttackConfig(name="pgd", norm="l2", epsilon=1.0, steps=10)
    got = attack_low_frequency(config, digits.model, images, labels, 0.5, seed=0, batch_size=16)
    delta = got.unrounded - images
    torch.testing.assert_close(fourier_lowpass(0.5)(delta), delta, rtol=0, atol=1e-5)
    # The whole budget, though a low-pass takes length away.
    assert (perturbation_norms(got.unrounded, images, "l2") - 1).abs().max() < 1e-4
    assert torch.equal(got.rounded, round_to_pixels(got.unrounded))
    assert (
        is_fooled(digits.model, got.rounded, labels).sum() > is_fooled(digits.model, images, labels).sum() + 5
    )


def test_rows_go_through_every_wrapper():
    shift = torch.linspace(0, 0.2, 3).view(-1, 1, 1, 1).double()
    fixed = FixedRows(lambda x, s: x + s, (shift,))
    index = torch.tensor([2, 0])
    for model in (
        EndToEnd(fixed, _classify),
        Bpda(fixed, _classify),
        Bpda(_quantise, _classify, backward=fixed),
        Eot(lambda draw: EndToEnd(fixed, _classify), 2),
        LowFrequency(EndToEnd(fixed, _classify), IMAGES * 0.5, 0.5),
    ):
        whole = model(IMAGES)
        torch.testing.assert_close(subset_model(model, index)(IMAGES[index]), whole[index])
        torch.testing.assert_close(_gradient(subset_model(model, torch.arange(3))), _gradient(model))
    assert subset_model(_classify, index) is _classify


@pytest.mark.parametrize(
    "model", [FixedRows(lambda x, s: x, (LABELS,)), LowFrequency(_classify, IMAGES, 0.5)]
)
def test_state_for_other_images_is_refused(model):
    with pytest.raises(ValueError, match="state for 3 images and was given 2"):
        model(IMAGES[:2])


def test_selection_attack_pushes_the_latent_to_another_cluster(digits):
    images = digits.images
    features = digits.model[:4]
    with torch.no_grad():
        latents = features(images).flatten(1)
        centres = torch.stack([latents[digits.labels == k].mean(0) for k in range(10)])

    def distances(x):
        return torch.cdist(features(x).flatten(1), centres)

    logits = SelectionLogits(distances, scale=latents.shape[1])
    with torch.no_grad():
        own = logits(images).argmax(1)
    assert torch.equal(own, distances(images).argmin(1))
    config = AttackConfig(name="pgd", epsilon=36 / 255, steps=12)
    got = run_attack(config, logits, images, own, seed=0)
    control = run_attack(AttackConfig(name="noise", epsilon=36 / 255), logits, images, own, seed=0)
    moved = [(distances(x.rounded).argmin(1) != own).double().mean() for x in (got, control)]
    assert moved[0] > 0.5
    assert moved[0] > 3 * moved[1]


def test_an_attack_through_bpda_beats_one_that_ignores_the_defence(digits):
    """Quantisation to few levels blocks gradients, not attacks."""
    images, labels = digits.images, digits.labels
    defense = lambda x: (x * 6).round() / 6  # noqa: E731
    config = AttackConfig(name="pgd", epsilon=16 / 255)
    defended = EndToEnd(defense, digits.model)
    gray, adaptive = (
        run_attack(config, model, images, labels, seed=0).rounded
        for model in (digits.model, Bpda(defense, digits.model))
    )
    clean, plain, through = (is_fooled(defended, x, labels).sum() for x in (images, gray, adaptive))
    assert clean < plain < through
