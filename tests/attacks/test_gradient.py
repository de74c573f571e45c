"""FGSM, BIM, PGD, TPGD and noise: closed forms on a linear model, and what they do to a trained one."""

import pytest
import torch
import torch.nn.functional as F

from acsr_ray.attacks.draws import Draws
from acsr_ray.attacks.gradient import bim, fgsm, noise, pgd_attack, tpgd
from acsr_ray.attacks.threat import ThreatModel
from acsr_ray.evaluation.quality import perturbation_norms

THREATS = [ThreatModel("linf", 6 / 255), ThreatModel("l2", 0.5), ThreatModel("relative_l2", 0.06)]
by_norm = pytest.mark.parametrize("threat", THREATS, ids=lambda threat: threat.norm)


@pytest.fixture(scope="module")
def linear():
    generator = torch.Generator().manual_seed(1)
    weight = 0.1 * torch.randn(2, 3 * 5 * 5, generator=generator)
    images = 0.3 + 0.4 * torch.rand(6, 3, 5, 5, generator=generator)
    labels = torch.arange(6) % 2
    slope = (weight[1 - labels] - weight[labels]).view_as(images)
    return lambda x: x.flatten(1) @ weight.T, images, labels, slope


def _along(direction, images, threat):
    flat = direction.flatten(1)
    order = float("inf") if threat.norm == "linf" else 2
    unit = flat / torch.linalg.vector_norm(flat, ord=order, dim=1, keepdim=True)
    return images + threat.radius(images) * unit.view_as(images)


@by_norm
def test_fgsm_and_bim_follow_the_sign_of_the_gradient_in_every_norm(linear, threat):
    model, images, labels, slope = linear
    expected = _along(slope.sign(), images, threat)
    torch.testing.assert_close(fgsm(model, images, labels, threat=threat), expected, rtol=0, atol=1e-5)
    got = bim(model, images, labels, threat=threat, steps=8, step_size=threat.epsilon / 3)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


@by_norm
def test_pgd_follows_the_gradient_itself_in_l2(linear, threat):
    model, images, labels, slope = linear
    expected = _along(slope.sign() if threat.norm == "linf" else slope, images, threat)
    got = pgd_attack(model, images, labels, threat=threat, steps=8, step_size=threat.epsilon / 3, draws=None)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


@by_norm
def test_fgsm_meets_the_norm_although_pixels_clip(digits, threat):
    images, labels = digits.head(40)
    got = fgsm(digits.model, images * 0.0 + (images > 0.5), labels, threat=threat)
    lengths = perturbation_norms(got, images * 0.0 + (images > 0.5), threat.norm)
    moved = lengths > 0
    assert moved.sum() > 30
    torch.testing.assert_close(
        lengths[moved], torch.full_like(lengths[moved], threat.epsilon), rtol=1e-4, atol=0
    )


@by_norm
def test_more_gradient_does_more_damage_and_noise_the_least(digits, threat):
    images, labels = digits.images, digits.labels
    draws = Draws(0, torch.arange(len(images)))
    step = threat.epsilon / 4
    attacked = {
        "clean": images,
        "noise": noise(images, threat=threat, draws=draws),
        "fgsm": fgsm(digits.model, images, labels, threat=threat),
        "pgd": pgd_attack(digits.model, images, labels, threat=threat, steps=10, step_size=step, draws=draws),
    }
    loss = {name: F.cross_entropy(digits.model(x), labels).item() for name, x in attacked.items()}
    assert loss["pgd"] > loss["fgsm"] > 2 * loss["noise"]
    assert loss["noise"] < loss["clean"] + 0.1 * (loss["pgd"] - loss["clean"])
    for x in attacked.values():
        assert (perturbation_norms(x, images, threat.norm) <= threat.epsilon * (1 + 1e-4)).all()


@by_norm
def test_tpgd_moves_the_prediction_without_the_label(digits, threat):
    images = digits.images
    draws = Draws(3, torch.arange(len(images)))
    got = tpgd(digits.model, images, threat=threat, steps=10, step_size=threat.epsilon / 4, draws=draws)
    control = noise(images, threat=threat, draws=draws)
    clean = digits.model(images).softmax(1)
    drift = [F.kl_div(digits.model(x).log_softmax(1), clean, reduction="batchmean") for x in (got, control)]
    assert drift[0] > 10 * drift[1]
    assert (perturbation_norms(got, images, threat.norm) <= threat.epsilon * (1 + 1e-4)).all()
