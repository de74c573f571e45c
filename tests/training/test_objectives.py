"""Adversarial training, robust semantic training (Eq. 7) and TRADES: their losses and gradients."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError

from acsr_ray.attacks.pgd import pgd
from acsr_ray.attacks.threat import ThreatModel
from acsr_ray.clustering.gaussians import fit_gaussians, own_squared_mahalanobis
from acsr_ray.models.wide_resnet import build_wide_resnet
from acsr_ray.training.objectives import (
    DISTANCE_FLOOR,
    AdversarialTraining,
    InnerAttack,
    LatentsAndLogits,
    RobustSemanticTraining,
    Trades,
)

SIDE, COUNT = 8, 24
ATTACK = InnerAttack(kind="single_step", norm="linf", epsilon=8 / 255)


def _network(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build_wide_resnet("wrn-10-1", 2)


@pytest.fixture(scope="module")
def data():
    images = torch.rand(COUNT, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(COUNT) % 2
    images[:, 0] = (images[:, 0] + labels.view(-1, 1, 1)) / 2
    return images, labels


@pytest.fixture(scope="module")
def gaussians(data):
    """Return Gaussians of two clusters per class around made-up centres, in the network's latent space."""
    rng = np.random.default_rng(2)
    which = np.repeat(np.arange(4), 100)
    centres = 2 * np.abs(rng.standard_normal((4, 64)))
    latents = centres[which] + rng.standard_normal((400, 64))
    return fit_gaussians(latents, which // 2, which % 2).to("cpu", torch.float32)


@pytest.fixture(scope="module")
def index(data):
    """Return a cluster of the own class for every image."""
    return 2 * data[1] + torch.arange(COUNT) // 2 % 2


def _objective(model, gaussians, index, alpha, seed=3, attack=ATTACK):
    """Return the loss of (images, labels, rows of `index`)."""
    objective = RobustSemanticTraining(
        model,
        LatentsAndLogits(model),
        attack,
        seed,
        gaussians=gaussians,
        cluster_of=lambda batch: index[batch],
        alpha=alpha,
    )

    def loss(images, labels, chosen):
        return objective.loss(images, labels, _starts(images, attack, seed), index[chosen])

    return loss


def _starts(images, attack, seed):
    return attack.threat.random_start(images, torch.Generator().manual_seed(seed))


def _adversarial(model, images, labels, seed=3, attack=ATTACK):
    model.eval()
    return pgd(
        model,
        images,
        labels,
        threat=ThreatModel(attack.norm, attack.epsilon),
        steps=attack.gradient_steps,
        step_size=attack.step_size,
        start=_starts(images, attack, seed),
    )


CHOSEN = torch.tensor([5, 2, 17, 23, 8, 0, 11, 14])


@pytest.mark.parametrize(
    "attack", [ATTACK, InnerAttack(kind="pgd", norm="l2", epsilon=0.3)], ids=lambda attack: attack.kind
)
def test_alpha_zero_is_plain_adversarial_training(data, gaussians, index, attack):
    images, labels = (part[CHOSEN] for part in data)
    objective = _objective(_network(), gaussians, index, 0.0, attack=attack)
    reference = _network()
    adversarial = _adversarial(reference, images, labels, attack=attack)
    expected = F.cross_entropy(reference.train()(adversarial), labels)
    torch.testing.assert_close(objective(images, labels, CHOSEN), expected, rtol=0, atol=0)
    model = _network()
    plain = AdversarialTraining(model, model, attack, 3)
    found = plain.loss(images, labels, _starts(images, attack, 3))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    clean = F.cross_entropy(_network().train()(images), labels)
    assert expected > clean


def test_distance_term_is_the_mean_root_distance_per_component(data, gaussians, index):
    images, labels = (part[CHOSEN] for part in data)
    loss = _objective(_network(), gaussians, index, 0.7)(images, labels, CHOSEN)
    reference = _network()
    latents = reference.train().latent(_adversarial(_network(), images, labels))
    squared = own_squared_mahalanobis(latents, gaussians, index[CHOSEN])
    expected = F.cross_entropy(reference.fc(latents), labels)
    expected = expected + 0.7 * (squared / 64 + DISTANCE_FLOOR).sqrt().mean()
    torch.testing.assert_close(loss, expected)


def test_each_image_is_pulled_to_its_own_cluster(data, gaussians, index):
    images, labels = (part[CHOSEN] for part in data)
    moved = index.clone()
    moved[CHOSEN] = 3 - moved[CHOSEN]
    others = index.clone()
    others[[1, 3, 4]] = 3 - others[[1, 3, 4]]
    base, changed, same = (
        _objective(_network(), gaussians, which, 1.0)(images, labels, CHOSEN).item()
        for which in (index, moved, others)
    )
    assert base == same
    assert abs(base - changed) > 1e-3


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_gradient_reaches_every_parameter(data, gaussians, index, alpha):
    model = _network()
    _objective(model, gaussians, index, alpha)(*data, torch.arange(COUNT)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().max() > 0, name


def test_gradient_is_finite_on_a_cluster_centre(gaussians):
    model = _network()
    image = torch.rand(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(9)).repeat(4, 1, 1, 1)
    with torch.no_grad():
        gaussians.mean[0] = _network().train().latent(image)[0]
    attack = InnerAttack(norm="linf", epsilon=1e-12)
    index = torch.zeros(4, dtype=torch.int64)
    loss = _objective(model, gaussians, index, 1.0, attack=attack)(image, index, torch.arange(4))
    loss.backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


def test_attack_does_not_move_the_batch_statistics(data, gaussians, index):
    model, reference = _network(), _network()
    images, labels = data
    _objective(model, gaussians, index, 0.0)(images, labels, torch.arange(COUNT))
    assert model.training
    assert model.norm.num_batches_tracked == 1
    reference.train()(_adversarial(_network(), images, labels))
    torch.testing.assert_close(model.norm.running_mean, reference.norm.running_mean)


def test_distance_falls_in_training(data, gaussians, index):
    images, labels = data

    def distance(alpha):
        model = _network()
        objective = _objective(model, gaussians, index, alpha)
        optimizer = torch.optim.Adam(model.parameters(), 0.02)
        for _ in range(40):
            optimizer.zero_grad()
            objective(images, labels, torch.arange(COUNT)).backward()
            optimizer.step()
        return _distance(model)

    def _distance(model):
        adversarial = _adversarial(model, images, labels)
        with torch.no_grad():
            latents = model.train().latent(adversarial)
        return (own_squared_mahalanobis(latents, gaussians, index) / 64).sqrt().mean().item()

    start, plain, pulled = _distance(_network()), distance(0.0), distance(1.0)
    assert pulled < 0.8 * start
    assert pulled < 0.9 * plain


def test_inner_attack_presets():
    paper, cheap = InnerAttack(), InnerAttack(kind="single_step", norm="linf", epsilon=8 / 255)
    assert (paper.norm, paper.epsilon, paper.gradient_steps) == ("l2", 0.3, 10)
    assert paper.step_size == pytest.approx(0.075)
    assert (cheap.gradient_steps, cheap.step_size) == (1, pytest.approx(10 / 255))
    with pytest.raises(ValidationError):
        InnerAttack(epsilon=0.0)


def test_trades_is_cross_entropy_plus_the_divergence(data):
    images, labels = (part[CHOSEN] for part in data)
    starts = (images + 1e-3).clamp(0, 1)
    model, reference = _network(), _network()
    loss = Trades(model, model, ATTACK, 0, 6.0).loss(images, labels, starts)
    reference.eval()
    with torch.no_grad():
        clean = reference(images).softmax(1)
    leaf = starts.clone().requires_grad_()
    divergence = (clean * (clean.log() - reference(leaf).log_softmax(1))).sum()
    (gradient,) = torch.autograd.grad(divergence, leaf)
    moved = ATTACK.threat.project(starts + ATTACK.step_size * gradient.sign(), images)
    first, second = reference.train()(torch.cat([images, moved])).chunk(2)
    shares = first.softmax(1)
    spread = (shares * (shares.log() - second.log_softmax(1))).sum(1).mean()
    torch.testing.assert_close(loss, F.cross_entropy(first, labels) + 6.0 * spread)
    assert spread > 0
