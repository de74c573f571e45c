"""Calibration: known curves, real attacks, and targets that cannot be met."""

import pytest
import torch

from acsr_ray.attacks.calibration import BOUNDS, calibrate
from acsr_ray.attacks.run import is_fooled, run_attack
from acsr_ray.attacks.spec import AttackConfig


def _accuracy(digits, images):
    return 1 - is_fooled(digits.model, images, digits.labels).double().mean().item()


@pytest.mark.parametrize(
    ("config", "target"),
    [
        (AttackConfig(name="fgsm", norm="relative_l2", epsilon=0.08), 0.6),
        (AttackConfig(name="bim", norm="relative_l2", epsilon=0.5, steps=8), 0.19),
        (AttackConfig(name="bim", norm="l2", epsilon=0.01, steps=6, step_size=0.004), 0.5),
        (AttackConfig(name="square", norm="l2", epsilon=0.5, queries=30), 0.5),
        (AttackConfig(name="cw", steps=60), 0.3),
        (AttackConfig(name="deepfool", norm="l2", epsilon=3.0), 0.187),
    ],
    ids=lambda value: getattr(value, "label", None),
)
def test_the_target_is_met_and_reproduced_by_a_plain_run(digits, config, target):
    found = calibrate(config, digits.model, digits.images, digits.labels, target, seed=4, tolerance=0.02)
    assert found.reached
    assert found.note == ""
    assert abs(found.accuracy - target) <= 0.02
    assert 1 <= len(found.evaluations) <= 13
    again = run_attack(found.config, digits.model, digits.images, digits.labels, seed=4)
    assert _accuracy(digits, again.rounded) == pytest.approx(found.accuracy)
    if config.name in ("cw", "deepfool"):
        assert found.config.norm == (config.norm if config.epsilon else "relative_l2")
    if config.step_size:
        share = config.step_size / config.epsilon
        assert found.config.step_size == pytest.approx(share * found.config.epsilon)


def test_a_known_curve_is_inverted():
    """The lone pixel value decides: FGSM of radius r fools exactly the images nearer than r to 0.5."""
    distances = (torch.arange(200) + 0.5) / 400
    images = (0.5 - distances).view(-1, 1, 1, 1).expand(-1, 3, 2, 2).contiguous()

    def model(x):
        lead = 0.5 - x.flatten(1).mean(1)
        return torch.stack([lead, -lead], 1)

    labels = torch.zeros(200, dtype=torch.int64)
    config = AttackConfig(name="fgsm", epsilon=1 / 255)
    found = calibrate(config, model, images, labels, 0.6, seed=0)
    # 40 % of the images lie within 0.2; 8 bits make it a multiple of 1 / 255 give or take a half.
    assert found.accuracy == pytest.approx(0.6, abs=0.012)
    assert found.config.epsilon == pytest.approx(0.2, abs=1 / 255)


def test_a_minimal_norm_attack_that_is_too_weak_says_so(digits):
    config = AttackConfig(name="cw", steps=5, norm="l2", epsilon=1.0, c=1e-3)
    found = calibrate(config, digits.model, digits.images, digits.labels, 0.1, seed=0)
    assert not found.reached
    assert "too weak" in found.note
    assert found.config.epsilon is None
    assert found.accuracy > 0.5
    assert [evaluation.epsilon for evaluation in found.evaluations] == [None]


def test_a_target_above_the_clean_accuracy_says_so(digits):
    wrong = (digits.labels + 1) % 10
    config = AttackConfig(name="fgsm", norm="l2", epsilon=0.1)
    found = calibrate(config, digits.model, digits.images, wrong, 0.9, seed=0)
    assert not found.reached
    assert "clean accuracy" in found.note
    assert found.config.epsilon == BOUNDS["l2"][0]


def test_noise_cannot_reach_zero(digits):
    constant = lambda x: torch.zeros(len(x), 10)  # noqa: E731
    labels = torch.zeros_like(digits.labels)
    config = AttackConfig(name="noise", norm="relative_l2", epsilon=1.0)
    found = calibrate(config, constant, digits.images, labels, 0.0, seed=0)
    assert not found.reached
    assert found.note == "too weak at the largest radius"
    assert found.accuracy == 1.0


@pytest.mark.parametrize("target", [-0.1, 1.1])
def test_a_target_is_a_share(digits, target):
    with pytest.raises(ValueError, match="target_accuracy must be in"):
        calibrate(AttackConfig(name="cw"), digits.model, digits.images, digits.labels, target, seed=0)


def test_calibration_needs_images(digits):
    with pytest.raises(ValueError, match="needs images"):
        calibrate(AttackConfig(name="cw"), digits.model, digits.images[:0], digits.labels[:0], 0.5, seed=0)
