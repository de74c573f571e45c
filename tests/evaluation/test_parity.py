"""Own attacks against torchattacks on one network: same success, same norms; and the job that shows it."""

import csv

import pytest
import torch

from acsr_ray.config import ConfigError
from acsr_ray.evaluation import parity
from acsr_ray.evaluation.parity import (
    CompareAttacksSettings,
    Parity,
    attack_pairs,
    compare_attacks,
    compare_pair,
    parity_table,
)
from acsr_ray.models.targets import TargetConfig, build_target, save_target

pytest.importorskip("torchattacks")

PAIRS = attack_pairs(10 / 255, 0.5)
COUNTS = {"deepfool": 60, "cw": 12}


def compare(digits, name, pair) -> Parity:
    images, labels = digits.head(COUNTS.get(name, 120))
    return compare_pair(name, pair, digits.model, images, labels, count=len(images), repeats=1)


@pytest.mark.parametrize("name", PAIRS)
def test_own_attack_is_as_strong_and_as_small_as_torchattacks(digits, name):
    found = compare(digits, name, PAIRS[name])
    assert found.own_accuracy <= found.their_accuracy + 0.01
    assert found.own_accuracy >= found.their_accuracy - 0.05
    assert abs(found.norm_ratio - 1) < 0.05
    assert found.speed > 0


def test_a_weaker_attack_is_seen_as_weaker_and_a_longer_one_as_longer(digits):
    ours, theirs = PAIRS["fgsm"]
    weak = compare(digits, "fgsm", (ours.with_epsilon(2 / 255), theirs))
    assert weak.own_accuracy > weak.their_accuracy + 0.2
    assert weak.norm_ratio < 0.3
    assert compare(digits, "fgsm", (ours.with_epsilon(20 / 255), theirs)).norm_ratio > 1.8


def test_only_the_first_images_are_given_to_a_loop(digits):
    images, labels = digits.head(30)
    found = compare_pair("cw", PAIRS["cw"], digits.model, images, labels, count=4, repeats=1)
    assert found.images == 4


def test_an_attack_that_fools_nothing_has_no_norm_ratio(digits):
    pair = tuple(
        config.model_copy(update={"epsilon": 1e-9, "options": o})
        for config, o in zip(PAIRS["fgsm"], ({}, {"eps": 1e-9}), strict=True)
    )
    images, labels = digits.head(120)
    right = digits.model(images).argmax(1) == labels
    found = compare_pair("fgsm", pair, digits.model, images[right], labels[right], count=120, repeats=1)
    assert (found.own_accuracy, found.their_accuracy) == (1, 1)
    assert found.norm_ratio != found.norm_ratio


def test_the_job_writes_its_table(tmp_path, write_parquet, hf_table, encoded, smooth_pixels):
    pixels = smooth_pixels(12, 32, 32, seed=1)
    table = hf_table([encoded(image) for image in pixels])
    shard = write_parquet(tmp_path / "in" / "test-0.parquet", table)
    config = TargetConfig(architecture="small_cnn", num_classes=3)
    torch.manual_seed(0)
    save_target(tmp_path / "target", build_target(config), config, ("a", "b", "c"), {})
    settings = CompareAttacksSettings(
        target=str(tmp_path / "target"),
        test=(str(shard),),
        output=tmp_path / "out",
        attacks=("fgsm", "pgd"),
        images=8,
        repeats=1,
    )
    summary = compare_attacks(settings)
    assert list(summary) == ["table", "fgsm", "pgd"]
    header, *rows = csv.reader((tmp_path / "out" / "parity.csv").read_text().splitlines())
    assert [row[0] for row in rows] == ["fgsm", "pgd"]
    assert [row[1] for row in rows] == ["8", "8"]
    assert header[2:4] == ["accuracy left, ours", "accuracy left, torchattacks"]
    assert rows[0][2] == rows[0][3]
    assert "8 images" in (tmp_path / "out" / "parity.md").read_text()


def test_an_unknown_pair_is_refused_before_anything_is_read(tmp_path):
    settings = CompareAttacksSettings(
        target="/nowhere", test=("/nowhere",), output=tmp_path, attacks=("fgms",)
    )
    with pytest.raises(ConfigError, match="did you mean 'fgsm'"):
        compare_attacks(settings)


def test_the_table_shows_percents_and_ratios():
    settings = CompareAttacksSettings(target="t", test=("s",), output="out")
    table = parity_table([Parity("cw", 40, 0.005, 0.0125, 1.0123, 23.04)], settings)
    assert table.rows == (("cw", "40", "0.5", "1.2", "1.012", "23.0"),)


def test_speed_is_their_time_over_ours_per_image(digits, monkeypatch):
    images, labels = digits.head(30)
    seconds = iter([2.0, 8.0, 1.0, 4.0, 3.0, 12.0])
    monkeypatch.setattr(parity, "_timed", lambda call: (next(seconds), call()))
    found = compare_pair("cw", PAIRS["cw"], digits.model, images, labels, count=2, repeats=3)
    # Medians: 2 s for 30 images, 8 s for 2.
    assert found.speed == pytest.approx((8 / 2) / (2 / 30))
