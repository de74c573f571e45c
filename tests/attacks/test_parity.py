"""Own attacks against torchattacks on the same network: same success, same norms.

torchattacks' CW stops on the loss of the whole batch, so it is given images one by one, and mistakes negative
logits, so it is given positive ones; its BIM and PGD know linf only.
"""

import time
from pathlib import Path

import pytest
import torch

from acsr_ray.attacks.rounding import perturbation_norms
from acsr_ray.attacks.run import is_fooled, run_attack
from acsr_ray.attacks.spec import AttackConfig

pytest.importorskip("torchattacks")

EPSILON = 10 / 255
STEP = EPSILON / 8
PAIRS = {
    "fgsm": (
        AttackConfig(name="fgsm", epsilon=EPSILON),
        AttackConfig(name="torchattacks.FGSM", options={"eps": EPSILON}),
    ),
    "bim": (
        AttackConfig(name="bim", epsilon=EPSILON, steps=12, step_size=STEP),
        AttackConfig(name="torchattacks.BIM", options={"eps": EPSILON, "alpha": STEP, "steps": 12}),
    ),
    "pgd": (
        AttackConfig(name="pgd", epsilon=EPSILON, steps=12, step_size=STEP, random_start=False),
        AttackConfig(
            name="torchattacks.PGD",
            options={"eps": EPSILON, "alpha": STEP, "steps": 12, "random_start": False},
        ),
    ),
    "pgd_l2": (
        AttackConfig(name="pgd", norm="l2", epsilon=0.5, steps=12, step_size=0.1, random_start=False),
        AttackConfig(
            name="torchattacks.PGDL2",
            options={"eps": 0.5, "alpha": 0.1, "steps": 12, "random_start": False},
        ),
    ),
    "deepfool": (
        AttackConfig(name="deepfool", classes=9, strengths=()),
        AttackConfig(name="torchattacks.DeepFool", options={"steps": 100, "overshoot": 0.02}),
    ),
    "cw": (
        AttackConfig(name="cw", strengths=()),
        AttackConfig(name="torchattacks.CW", options={"c": 1.0, "kappa": 0.0, "steps": 100, "lr": 0.01}),
    ),
}
COUNTS = {"deepfool": 60, "cw": 12}


@pytest.mark.parametrize("name", PAIRS)
def test_own_attack_is_as_strong_and_as_small_as_torchattacks(digits, name):
    ours, theirs = PAIRS[name]
    images, labels = digits.head(COUNTS.get(name, 120))
    own = run_attack(ours, digits.model, images, labels, seed=0).unrounded
    _compare(digits.model, images, labels, own, _torchattacks(name, theirs, digits.model, images, labels))


def _torchattacks(name, config, model, images, labels):
    if name != "cw":
        return run_attack(config, model, images, labels, seed=0).unrounded
    # It masks the label's logit by zero, which wins over negative rivals: lift all logits above zero.
    return run_attack(config, lambda x: model(x) + 100, images, labels, seed=0, batch_size=1).unrounded


def _compare(model, images, labels, own, other):
    fooled = [is_fooled(model, x, labels) for x in (own, other)]
    assert fooled[0].double().mean() >= fooled[1].double().mean() - 0.01
    assert fooled[0].double().mean() <= fooled[1].double().mean() + 0.05
    both = fooled[0] & fooled[1]
    lengths = [perturbation_norms(x, images, "l2")[both].mean() for x in (own, other)]
    assert abs(lengths[0] / lengths[1] - 1) < 0.05


@pytest.mark.slow
def test_deepfool_on_a_wide_resnet_prints_its_advantage(capsys):
    """The trained network of the small CIFAR run, where there is one; times are told, not judged."""
    from acsr_ray.corpus.labelled import read_labelled
    from acsr_ray.models.classifier import load_classifier

    root = Path(__file__).parents[2]
    run, shards = root / ".runs/cifar10-small/baseline", root / ".data/cifar10"
    shards = sorted(shards.glob("test-*.parquet"))
    if not run.is_dir() or not shards:
        pytest.skip("needs the trained baseline and CIFAR-10's test split")
    classifier = load_classifier(run, "baseline")
    data = read_labelled([str(shards[0])], classifier.config.image_size)
    images = torch.from_numpy(data.pixels[:100]).permute(0, 3, 1, 2).contiguous() / 255
    labels = torch.from_numpy(data.labels[:100])
    results, seconds = [], []
    for config in (AttackConfig(name="deepfool", strengths=()), PAIRS["deepfool"][1]):
        started = time.perf_counter()
        results.append(run_attack(config, classifier.model, images, labels, seed=0).unrounded)
        seconds.append(time.perf_counter() - started)
    with capsys.disabled():
        print(f"\nDeepFool, 100 images: {seconds[0]:.1f} s, torchattacks {seconds[1] / seconds[0]:.1f} x")
    _compare(classifier.model, images, labels, *results)
