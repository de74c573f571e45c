"""Attacks of torchattacks under our contract: arguments, global state, the model's state, budgets."""

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from acsr_ray.attacks.adaptive import FixedRows
from acsr_ray.attacks.rounding import round_to_pixels
from acsr_ray.attacks.run import run_attack
from acsr_ray.attacks.spec import AttackConfig
from acsr_ray.attacks.torchattacks_adapter import resolve_options, torchattacks_names
from acsr_ray.config import ConfigError
from acsr_ray.evaluation.quality import perturbation_norms

pytest.importorskip("torchattacks")

PGD = AttackConfig(
    name="torchattacks.PGD", epsilon=8 / 255, options={"alpha": 2 / 255, "steps": 4, "random_start": True}
)


def _fgsm(eps=None, strengths=None, **more):
    options = {} if eps is None else {"eps": eps}
    return AttackConfig(name="torchattacks.FGSM", options=options, strengths=strengths, **more)


def test_declared_budget_and_options_reach_the_attack(digits):
    images, labels = digits.head(20)
    leaf = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(digits.model(leaf), labels), leaf)
    expected = (images + 0.03 * gradient.sign()).clamp(0, 1)
    for config in (_fgsm(0.03), _fgsm(epsilon=0.03)):
        got = run_attack(config, digits.model, images, labels, seed=0)
        torch.testing.assert_close(got.unrounded, expected)
        assert torch.equal(got.rounded, round_to_pixels(got.unrounded))
        assert not got.scaled_back.any()


def test_every_argument_is_named():
    assert resolve_options(PGD) == {"eps": 8 / 255, "alpha": 2 / 255, "steps": 4, "random_start": True}
    square = AttackConfig(name="torchattacks.Square", norm="l2", epsilon=0.5, options={"n_queries": 7})
    resolved = resolve_options(square)
    assert resolved["norm"] == "L2"
    assert resolved["eps"] == 0.5
    assert resolved["n_queries"] == 7
    assert {"n_restarts", "p_init", "loss", "resc_schedule", "seed", "verbose"} < resolved.keys()
    assert "norm" not in resolve_options(AttackConfig(name="torchattacks.CW", norm="l2", epsilon=0.5))


def test_a_breach_of_the_declared_budget_is_scaled_back_and_told(digits):
    images, labels = digits.head(20)
    # The class is told 0.05, the budget says 0.02.
    got = run_attack(_fgsm(0.05, epsilon=0.02), digits.model, images, labels, seed=0)
    assert got.scaled_back.all()
    assert (perturbation_norms(got.unrounded, images, "linf") <= 0.02 + 1e-6).all()
    relative = _fgsm(0.05, norm="relative_l2", epsilon=0.04)
    got = run_attack(relative, digits.model, images, labels, seed=0)
    assert (perturbation_norms(got.unrounded, images, "relative_l2") <= 0.04 * (1 + 2e-4)).all()


@pytest.mark.parametrize("name", ["PGD", "Square", "APGD", "FAB", "Pixle", "OnePixel", "GN"])
def test_global_generators_are_left_as_they_were(digits, name):
    images, labels = digits.head(3)
    cheap = {
        "PGD": {"steps": 2},
        "Square": {"n_queries": 3},
        "APGD": {"steps": 2},
        "FAB": {"steps": 2},
        "Pixle": {"restarts": 1, "max_iterations": 1},
        "OnePixel": {"steps": 1, "popsize": 5},
        "GN": {},
    }
    config = AttackConfig(name=f"torchattacks.{name}", options=cheap[name])
    torch.manual_seed(11)
    np.random.seed(12)
    random.seed(13)
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    first = run_attack(config, digits.model, images, labels, seed=5)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1][1])
    assert random.getstate() == states[2]
    torch.manual_seed(14)
    np.random.seed(15)
    random.seed(16)
    again = run_attack(config, digits.model, images, labels, seed=5)
    assert torch.equal(first.unrounded, again.unrounded)


def test_seed_decides_the_random_start(digits):
    images, labels = digits.head(10)
    first, other = (run_attack(PGD, digits.model, images, labels, seed=s).unrounded for s in (5, 6))
    assert not torch.equal(first, other)


@pytest.mark.parametrize("name", ["FGSM", "DeepFool", "CW"])
def test_the_model_comes_back_as_it_was(name):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.Linear(4 * 36, 5)
        )
    # A frozen layer inside a training model: torchattacks alone would set it to training.
    model.train()
    model[1].eval()
    model[0].requires_grad_(False)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    flags = [part.training for part in model.modules()]
    images = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    config = AttackConfig(name=f"torchattacks.{name}", options={} if name == "FGSM" else {"steps": 3})
    run_attack(config, model, images, torch.tensor([0, 1, 2, 3]), seed=0)
    assert [part.training for part in model.modules()] == flags
    assert [p.requires_grad for p in model.parameters()] == [False, False, True, True, True, True]
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_plain_callable_is_attacked_like_a_module(digits):
    images, labels = digits.head(10)
    module = run_attack(PGD, digits.model, images, labels, seed=2)
    function = run_attack(PGD, lambda x: digits.model(x), images, labels, seed=2)
    assert torch.equal(module.unrounded, function.unrounded)


def test_state_per_image_works_for_whole_batches_and_is_refused_otherwise(digits):
    images, labels = digits.head(10)
    offset = torch.linspace(-0.05, 0.05, 10).view(-1, 1, 1, 1)
    model = FixedRows(lambda x, shift: digits.model(x + shift), (offset,))
    got = run_attack(_fgsm(0.03), model, images, labels, seed=0, batch_size=4)
    for n in (0, 9):
        shifted = run_attack(
            _fgsm(0.03),
            lambda x, n=n: digits.model(x + offset[n]),
            images[n : n + 1],
            labels[n : n + 1],
            seed=0,
        )
        torch.testing.assert_close(got.unrounded[n], shifted.unrounded[0], rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="state for 10 images and was given 1"):
        run_attack(AttackConfig(name="torchattacks.DeepFool"), model, images, labels, seed=0)


def test_strength_rises_only_for_images_that_still_stand(digits):
    images, labels = digits.images, digits.labels
    strengths = [{"eps": 0.03}, {"eps": 0.06}, {"eps": 0.1}]
    expected, rungs = None, []
    for strength in strengths:
        attacked = run_attack(_fgsm(**strength), digits.model, images, labels, seed=0).rounded
        standing = torch.ones(len(images), dtype=torch.bool)
        if expected is None:
            expected = attacked.clone()
        else:
            standing = digits.model(expected).argmax(1) == labels
            expected[standing] = attacked[standing]
        rungs.append(int(standing.sum()))
    # Each strength must fell some of the images and leave others, or this test shows nothing.
    assert rungs[0] > rungs[1] > rungs[2] > 0

    result = run_attack(_fgsm(0.03, tuple(strengths[1:])), digits.model, images, labels, seed=0)
    torch.testing.assert_close(result.rounded, expected, rtol=0, atol=1e-6)
    first = run_attack(_fgsm(0.03), digits.model, images, labels, seed=0)
    torch.testing.assert_close(result.unrounded, first.unrounded, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (AttackConfig(name="torchattacks.DeepFol"), "no attack 'DeepFol', did you mean 'DeepFool'"),
        (AttackConfig(name="torchattacks.MultiAttack"), "no attack 'MultiAttack'"),
        (
            AttackConfig(name="torchattacks.PGD", options={"step": 3}),
            "no option 'step', did you mean 'steps'",
        ),
        (AttackConfig(name="torchattacks.FGSM", strengths=({"kapa": 3},)), "no option 'kapa'"),
        (AttackConfig(name="torchattacks.APGDT", options={"n_classes": 7}), "model has 10 classes"),
    ],
)
def test_what_torchattacks_does_not_have_is_refused(digits, config, message):
    with pytest.raises(ConfigError, match=message):
        run_attack(config, digits.model, *digits.head(4), seed=0)


def test_targeted_apgd_needs_classes_to_aim_at():
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 3))
    images, labels = torch.rand(2, 3, 4, 4), torch.tensor([0, 1])
    with pytest.raises(ConfigError, match="at least 4 classes"):
        run_attack(AttackConfig(name="torchattacks.APGDT"), model, images, labels, seed=0)


def test_all_attacks_of_the_package_are_known():
    names = torchattacks_names()
    assert {"FGSM", "APGDT", "FAB", "Square", "EADEN", "SPSA", "JSMA"} <= set(names)
    assert len(names) >= 35
    for name in names:
        assert "model" not in resolve_options(AttackConfig(name=f"torchattacks.{name}"))


@pytest.mark.parametrize("name", ["PGDL2", "PGD", "CW", "DeepFool"])
def test_images_in_any_memory_layout(name, digits):
    images, labels = digits.head(4)
    # As shards give them: pixels first, channels last.
    strided = images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    assert not strided.is_contiguous()
    options = {} if name in ("DeepFool",) else {"steps": 3}
    config = AttackConfig(name=f"torchattacks.{name}", options=options)
    found, expected = (
        run_attack(config, digits.model, part, labels, seed=0).unrounded for part in (strided, images)
    )
    torch.testing.assert_close(found, expected)
