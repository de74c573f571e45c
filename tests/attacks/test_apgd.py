"""Auto-PGD: losses, checkpoints, and strength against plain PGD of the same length."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from acsr_ray.attacks.apgd import apgd, checkpoints, dlr, margin
from acsr_ray.attacks.gradient import pgd_attack
from acsr_ray.attacks.threat import ThreatModel
from acsr_ray.evaluation.quality import perturbation_norms

THREATS = [ThreatModel("linf", 2 / 255), ThreatModel("l2", 0.15), ThreatModel("relative_l2", 0.02)]


def test_checkpoints_are_those_of_the_paper():
    assert checkpoints(100) == (22, 41, 57, 70, 80, 87, 93, 99)


def test_dlr_by_hand():
    logits = torch.tensor([[5.0, 3.0, 1.0, 0.0], [5.0, 3.0, 1.0, 0.0], [-1.0, -4.0, -2.0, -3.0]])
    labels = torch.tensor([0, 2, 0])
    torch.testing.assert_close(dlr(logits, labels), torch.tensor([-2 / 4, 4 / 4, -1 / 2]))


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 1000), scale=st.floats(0.1, 50), shift=st.floats(-50, 50))
def test_dlr_ignores_shift_and_scale_and_margin_knows_who_wins(seed, scale, shift):
    logits = torch.randn(8, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    labels = torch.arange(8) % 5
    moved = logits * scale + shift
    torch.testing.assert_close(dlr(moved, labels), dlr(logits, labels), rtol=1e-6, atol=1e-9)
    assert torch.equal(margin(moved, labels) > 0, moved.argmax(1) == labels)
    assert torch.equal(dlr(moved, labels) > 0, moved.argmax(1) != labels)


def test_dlr_needs_three_classes():
    with pytest.raises(ValueError, match="at least 3 classes"):
        dlr(torch.zeros(2, 2), torch.zeros(2, dtype=torch.int64))


@pytest.mark.parametrize("loss", ["ce", "dlr"])
@pytest.mark.parametrize("threat", THREATS, ids=lambda threat: threat.norm)
def test_apgd_is_no_weaker_than_pgd_of_the_same_length(digits, threat, loss):
    images, labels = digits.images, digits.labels
    got = apgd(digits.model, images, labels, threat=threat, steps=20, loss=loss, start=images)
    step = 2.5 * threat.epsilon / 20
    plain = pgd_attack(digits.model, images, labels, threat=threat, steps=20, step_size=step, draws=None)
    accuracy = [(digits.model(x).argmax(1) == labels).float().mean().item() for x in (images, plain, got)]
    assert accuracy[2] <= accuracy[1] + 1 / len(images) < accuracy[0]
    assert (perturbation_norms(got, images, threat.norm) <= threat.epsilon * (1 + 1e-4)).all()
    assert got.min() >= 0
    assert got.max() <= 1


def test_the_best_point_is_kept_not_the_last():
    # A model with a narrow hill next to the image: the first steps of 2 epsilon jump over it.
    def model(x):
        height = -50 * (x.flatten(1).mean(1) - 0.52).square()
        return torch.stack([-height, height, torch.full_like(height, -9.0)], 1)

    images = torch.full((2, 3, 4, 4), 0.5)
    labels = torch.zeros(2, dtype=torch.int64)
    threat = ThreatModel("linf", 0.1)
    got = apgd(model, images, labels, threat=threat, steps=30, loss="ce", start=images)
    torch.testing.assert_close(got, torch.full_like(images, 0.52), rtol=0, atol=2e-3)
    values = [
        F.cross_entropy(
            model(apgd(model, images, labels, threat=threat, steps=n, loss="ce", start=images)), labels
        )
        for n in (1, 5, 15, 30)
    ]
    assert all(later >= earlier - 1e-6 for earlier, later in pairwise(values))
