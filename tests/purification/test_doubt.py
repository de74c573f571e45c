"""Doubt: features by definition, the logistic function, and an artifact that is data and checked."""

import json
import math

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from acsr_ray.artifacts import ArtifactError, json_digest
from acsr_ray.purification.doubt import FEATURES, DoubtModel, Logistic, image_features, load_doubt
from acsr_ray.purification.judge import Opinion
from acsr_ray.purification.options import PurifyOptions

COUNT = len(FEATURES)


def logistic(**changes) -> Logistic:
    fields = {
        "features": FEATURES,
        "mean": (0.0,) * COUNT,
        "scale": (1.0,) * COUNT,
        "coefficients": (0.0,) * COUNT,
        "intercept": 0.0,
        **changes,
    }
    return Logistic(**fields)


def opinion(count: int) -> Opinion:
    generator = torch.Generator().manual_seed(0)
    return Opinion(
        torch.randint(3, (count,), generator=generator),
        torch.randint(3, (count,), generator=generator),
        torch.randn(count, generator=generator).double() * 5,
        torch.rand(count, generator=generator).double() * 9,
    )


def test_features_are_those_of_the_definitions():
    said = opinion(20)
    rng = np.random.default_rng(0)
    noise, distance, residual = rng.uniform(0.01, 0.1, 20), rng.uniform(5, 20, 20), rng.uniform(0.01, 1, 20)
    found = image_features(said, noise, distance, residual, latent_length=64)
    assert found.shape == (20, COUNT)
    for row in range(20):
        expected = {
            "log_residual": math.log(residual[row]),
            "distance": distance[row] / 8,
            "log_noise": math.log(noise[row]),
            "label_changed": float(said.label_before[row].item() != said.label_after[row].item()),
            "log_odds": said.log_odds[row].item(),
            "divergence": math.log(1 + said.divergence[row].item()),
        }
        assert found[row].tolist() == pytest.approx([expected[name] for name in FEATURES])
    assert 0 < found[:, FEATURES.index("label_changed")].mean() < 1


def test_unchanged_flat_and_black_images_have_finite_features():
    found = image_features(opinion(2), np.zeros(2), np.ones(2), np.array([0, 1e9]), latent_length=4)
    assert np.isfinite(found).all()
    assert found[1, 0] == 0


def test_probability_is_the_logistic_function():
    rng = np.random.default_rng(1)
    rows, mean, scale = rng.normal(size=(30, COUNT)), rng.normal(size=COUNT), rng.uniform(0.5, 2, COUNT)
    weights = rng.normal(size=COUNT)
    model = logistic(mean=tuple(mean), scale=tuple(scale), coefficients=tuple(weights), intercept=0.3)
    found = model.probability(rows)
    assert found.dtype == np.float32
    for row, value in zip(rows, found, strict=True):
        log_odds = 0.3 + sum(w * (x - m) / s for w, x, m, s in zip(weights, row, mean, scale, strict=True))
        assert value == pytest.approx(1 / (1 + math.exp(-log_odds)), rel=1e-6)


@pytest.mark.parametrize("column", range(COUNT))
@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_doubt_rises_or_falls_with_a_feature_by_the_sign_of_its_coefficient(column, sign):
    coefficients = [0.0] * COUNT
    coefficients[column] = sign * 0.5
    rows = np.zeros((5, COUNT))
    rows[:, column] = np.arange(5)
    steps = np.diff(logistic(coefficients=tuple(coefficients)).probability(rows))
    assert (np.sign(steps) == sign).all()


def test_one_row_is_doubted_as_among_others():
    rows = np.random.default_rng(2).normal(size=(100, COUNT))
    model = logistic(coefficients=tuple(np.linspace(-1, 1, COUNT)), intercept=0.1)
    alone = np.concatenate([model.probability(rows[i : i + 1]) for i in range(100)])
    assert (alone == model.probability(rows)).all()
    assert model.probability(rows[:0]).shape == (0,)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_cannot_be_judged_is_for_people(value):
    rows = np.zeros((3, COUNT))
    rows[1, 4] = value
    assert logistic(intercept=-2.0).probability(rows).tolist() == pytest.approx([0.1192, 1, 0.1192], abs=1e-4)


@pytest.mark.parametrize("shape", [(3,), (3, COUNT - 1)])
def test_other_features_are_refused(shape):
    with pytest.raises(ValueError, match="features must be"):
        logistic().probability(np.zeros(shape))


@pytest.mark.parametrize(
    "changes",
    [
        {"features": FEATURES[::-1]},
        {"mean": (0.0,)},
        {"scale": (0.0,) * COUNT},
        {"coefficients": (math.nan,) * COUNT},
        {"intercept": math.inf},
    ],
)
def test_numbers_that_are_no_model_are_refused(changes):
    with pytest.raises(ValidationError):
        logistic(**changes)


def test_a_saved_model_comes_back_to_the_last_bit(tmp_path, tiny_bundle, make_doubt):
    numbers = np.random.default_rng(3).normal(size=COUNT)
    given = logistic(coefficients=tuple(numbers.tolist()), intercept=1 / 3)
    found = load_doubt(make_doubt(tmp_path / "doubt", tiny_bundle, logistic=given))
    assert isinstance(found, DoubtModel)
    assert found.logistic == given
    assert [path.name for path in (tmp_path / "doubt").iterdir()] == ["manifest.json"]


def _edit(path, change):
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def _reweigh(manifest):
    manifest["doubt"]["logistic"]["coefficients"][0] += 0.1


def _rename(manifest):
    manifest["kind"] = "bundle"


def _empty(manifest):
    del manifest["doubt"]


def _cut(manifest):
    del manifest["doubt"]["classifier"]
    manifest["model_digest"] = json_digest(manifest["doubt"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_reweigh, "was changed"),
        (_empty, "was changed"),
        (_rename, "not a 'doubt'"),
        (_cut, "no usable doubt model"),
    ],
)
def test_a_changed_artifact_is_refused(tmp_path, tiny_bundle, make_doubt, change, message):
    directory = make_doubt(tmp_path / "doubt", tiny_bundle)
    _edit(directory / "manifest.json", change)
    with pytest.raises(ArtifactError, match=message):
        load_doubt(directory)


@pytest.mark.parametrize(
    ("fitted", "given", "message"),
    [
        ("bundle", "a" * 64, "leave --target away"),
        ("a" * 64, "bundle", "target aaaaaaaaaaaa; give --target"),
        ("a" * 64, "b" * 64, "target aaaaaaaaaaaa, not bbbbbbbbbbbb"),
    ],
)
def test_another_classifier_is_refused(fitted, given, message):
    options = PurifyOptions(reconstruction="cbpdn")
    model = DoubtModel(
        bundle="c" * 64, options=options, classifier=fitted, image_size=16, logistic=logistic()
    )
    model.check(bundle="c" * 64, options=options, classifier=fitted)
    with pytest.raises(ArtifactError, match=message):
        model.check(bundle="c" * 64, options=options, classifier=given)
    with pytest.raises(ArtifactError, match="for bundle cccccccccccc, not dddddddddddd"):
        model.check(bundle="d" * 64, options=options, classifier=fitted)


def test_another_purifier_is_refused():
    options = PurifyOptions(reconstruction="unrolled", strength=0.5)
    model = DoubtModel(bundle="c", options=options, classifier="t", image_size=16, logistic=logistic())
    given = PurifyOptions(reconstruction="cbpdn", strength="auto")
    with pytest.raises(ArtifactError, match=r"reconstruction unrolled, not cbpdn, strength 0\.5, not auto$"):
        model.check(bundle="c", options=given, classifier="t")
