"""One unit of calibration: attacked on the classifier, rounded, purified, rounded, judged."""

import numpy as np
import pytest
import torch

from acsr_ray.attacks.rounding import round_to_pixels
from acsr_ray.attacks.run import run_attack
from acsr_ray.corpus.images import to_unit_range
from acsr_ray.evaluation.cells import Chunk
from acsr_ray.evaluation.doubt_samples import TRAFFIC_ATTACKS, collect_samples, observe
from acsr_ray.models.targets import load_target
from acsr_ray.purification.doubt import FEATURES
from acsr_ray.purification.judge import load_judge
from acsr_ray.purification.purifier import Purifier

ATTACK = TRAFFIC_ATTACKS["fgsm-linf-4"]


@pytest.fixture(scope="module")
def purifier(tiny_bundle):
    return Purifier.load(tiny_bundle)


@pytest.fixture(scope="module")
def judge(purifier, tiny_target):
    return load_judge(purifier, str(tiny_target))


@pytest.fixture(scope="module")
def chunk(smooth_pixels):
    return Chunk(smooth_pixels(12, 20, 20, seed=4), np.arange(12) % 3, np.arange(100, 112))


@pytest.mark.parametrize("attack", [None, ATTACK])
def test_rows_are_what_the_parts_give(chunk, purifier, judge, tiny_target, attack):
    table = observe(chunk, attack, purifier, judge, seed=1)
    target = load_target(str(tiny_target)).model
    images, labels = torch.from_numpy(to_unit_range(chunk.pixels)), torch.from_numpy(chunk.labels)
    if attack is not None:
        images = run_attack(attack, target, images, labels, seed=1, keys=torch.from_numpy(chunk.keys)).rounded
    with torch.no_grad():
        outcome = purifier.purify(images)
        after = target(round_to_pixels(outcome.images)).argmax(1)
        before = target(images).argmax(1)
    assert table["key"].to_pylist() == list(range(100, 112))
    assert table["wrong"].to_pylist() == (after != labels).tolist()
    assert table["wrong_bare"].to_pylist() == (before != labels).tolist()
    features = np.array(table["features"].to_pylist())
    changed = features[:, FEATURES.index("label_changed")]
    assert changed.tolist() == (before != after).double().tolist()
    # Of the purified image as it is stored, not of its floats.
    odds = features[:, FEATURES.index("log_odds")]
    stored, floats = (
        judge.compare(images, x).log_odds for x in (round_to_pixels(outcome.images), outcome.images)
    )
    assert odds.tolist() == stored.tolist() != floats.tolist()
    np.testing.assert_allclose(
        np.exp(features[:, FEATURES.index("log_residual")]), outcome.residual, rtol=1e-5
    )


def test_chunks_do_not_change_a_row(chunk, purifier, judge):
    whole = observe(chunk, None, purifier, judge, seed=0)
    head = observe(chunk.head(5), None, purifier, judge, seed=0)
    assert head.to_pylist() == whole.slice(0, 5).to_pylist()


def test_an_attack_makes_the_bare_classifier_wrong_more_often(chunk, purifier, judge):
    clean, attacked = (observe(chunk, attack, purifier, judge, seed=0) for attack in (None, ATTACK))
    assert sum(attacked["wrong_bare"].to_pylist()) > sum(clean["wrong_bare"].to_pylist())


def test_samples_are_the_rows_by_kind(chunk, purifier, judge):
    parts = {
        name: [observe(part, attack, purifier, judge, seed=0) for part in (chunk.head(4), chunk.head(2))]
        for name, attack in (("clean", None), ("fgsm", ATTACK))
    }
    samples = collect_samples(parts)
    assert samples.kinds == ("clean", "fgsm")
    assert samples.kind.tolist() == [0] * 6 + [1] * 6
    assert samples.image.tolist() == [100, 101, 102, 103, 100, 101] * 2
    assert samples.features.shape == (12, len(FEATURES))
    assert samples.features[4:6].tolist() == samples.features[:2].tolist()
    assert samples.attacked.tolist() == [False] * 6 + [True] * 6


@pytest.mark.parametrize("name", TRAFFIC_ATTACKS)
def test_every_attack_has_a_label(name):
    assert TRAFFIC_ATTACKS[name].label
