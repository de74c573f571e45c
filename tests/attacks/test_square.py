"""Square Attack: the shape of its changes, its budget, and that it needs no gradient."""

import pytest
import torch

from acsr_ray.attacks.draws import Draws
from acsr_ray.attacks.gradient import noise
from acsr_ray.attacks.square import _propose_l2, covered_share, double_bump, square
from acsr_ray.attacks.threat import ThreatModel
from acsr_ray.evaluation.quality import perturbation_norms

THREATS = [ThreatModel("linf", 20 / 255), ThreatModel("l2", 1.6), ThreatModel("relative_l2", 0.2)]
by_norm = pytest.mark.parametrize("threat", THREATS, ids=lambda threat: threat.norm)


@pytest.mark.parametrize("side", [1, 2, 3, 4, 7, 12])
def test_the_double_bump_has_unit_norm_and_two_signs(side):
    bump = double_bump(side)
    assert bump.shape == (side, side)
    assert abs(bump.norm() - 1) < 1e-6
    assert (bump[: side // 2] > 0).all()
    assert (bump[side // 2 :] < 0).all()


def test_windows_shrink_with_the_share_of_queries_used():
    shares = [covered_share(query, 1000) for query in range(1000)]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] == 0.8
    assert shares[-1] == 0.8 / 2**9


@by_norm
def test_outputs_alone_beat_noise_within_the_budget(digits, threat):
    images, labels = digits.head(60)
    draws = Draws(0, torch.arange(60))

    def opaque(x):
        assert not x.requires_grad
        return digits.model(x.detach())

    got = square(opaque, images, labels, threat=threat, queries=100, draws=draws)
    control = noise(images, threat=threat, draws=draws)
    accuracy = [(digits.model(x).argmax(1) == labels).double().mean() for x in (images, control, got)]
    assert accuracy[2] < accuracy[1] - 0.15
    assert (perturbation_norms(got, images, threat.norm) <= threat.epsilon * (1 + 1e-4)).all()
    assert got.min() >= 0
    assert got.max() <= 1


@pytest.mark.parametrize("norm", ["l2", "relative_l2"])
def test_l2_proposals_keep_the_norm_and_change_two_windows(norm):
    """Algorithm 3 moves norm within two windows: what is outside keeps its values."""
    images = torch.full((40, 3, 20, 20), 0.5)
    threat = ThreatModel(norm, 0.3 if norm == "l2" else 0.02)
    draws = Draws(0, torch.arange(40))
    start = _propose_l2(images, images, threat, 0, 1000, draws)
    proposal = _propose_l2(start, images, threat, 300, 1000, draws)
    for points in (start, proposal):
        lengths = (points - images).flatten(1).norm(dim=1)
        torch.testing.assert_close(lengths, threat.radius(images).flatten(), rtol=1e-4, atol=0)
    side = max(round((covered_share(300, 1000) * 400) ** 0.5), 3) | 1
    changed = ((proposal - start).abs() > 1e-6).any(1)
    assert (changed.flatten(1).sum(1) > side**2 / 2).all()
    assert (changed.flatten(1).sum(1) <= 2 * side**2).all()


@by_norm
def test_more_queries_never_hurt(digits, threat):
    images, labels = digits.head(30)
    draws = Draws(1, torch.arange(30))

    def margins(x):
        logits = digits.model(x)
        own = logits.gather(1, labels[:, None])[:, 0]
        return own - logits.scatter(1, labels[:, None], -torch.inf).amax(1)

    start = square(digits.model, images, labels, threat=threat, queries=1, draws=draws)
    later = square(digits.model, images, labels, threat=threat, queries=60, draws=draws)
    assert (margins(later) <= margins(start) + 1e-5).all()
    assert margins(later).mean() < margins(start).mean()


@by_norm
def test_an_image_is_attacked_alike_alone_and_in_a_batch(digits, threat):
    images, labels = digits.head(8)
    keys = torch.tensor([3, 1, 4, 15, 9, 2, 6, 5])
    together = square(digits.model, images, labels, threat=threat, queries=40, draws=Draws(0, keys))
    for n in range(8):
        one = slice(n, n + 1)
        alone = square(
            digits.model, images[one], labels[one], threat=threat, queries=40, draws=Draws(0, keys[one])
        )
        torch.testing.assert_close(alone[0], together[n], rtol=0, atol=1e-5)


def test_a_solved_image_costs_no_more_queries(digits):
    images, labels = digits.head(20)
    wrong = (labels + 1) % 10
    seen = []

    def model(x):
        seen.append(len(x))
        return digits.model(x)

    got = square(model, images, wrong, threat=THREATS[0], queries=50, draws=Draws(0, torch.arange(20)))
    standing = int((digits.model(images).argmax(1) == wrong).sum())
    assert seen[0] == 20
    assert sum(seen[1:]) <= 50 * standing
    assert torch.equal(got, images) == (standing == 0)
