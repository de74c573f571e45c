"""Units: what is stored is what was measured, and each attacker sees what its name says and no more."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from acsr_ray.attacks.rounding import round_to_pixels, rounding_slack
from acsr_ray.attacks.run import run_attack
from acsr_ray.corpus.images import to_unit_range
from acsr_ray.defenses.base import Defense
from acsr_ray.evaluation.attackers import craft, selection_distances
from acsr_ray.evaluation.cells import (
    Chunk,
    attack_unit,
    calibrate_unit,
    defend_unit,
    defense_of,
    fingerprint,
    stored_pixels,
    target_of,
)
from acsr_ray.evaluation.cluster_defenses import FixedCluster
from acsr_ray.evaluation.defenses import DefenseConfig
from acsr_ray.evaluation.grid import GridError, SweepAttack, SweepTarget
from acsr_ray.models.targets import TargetConfig, build_target, save_target
from acsr_ray.purification.purifier import Purifier

COUNT, SIDE, CLASSES = 12, 32, 3
EPSILON = 6 / 255
PGD = {"name": "pgd", "epsilon": EPSILON, "steps": 6}


@dataclass(frozen=True)
class Setup:
    """A target, the images that it gets right, and the purifier in front of it."""

    target: SweepTarget
    chunk: Chunk
    acsr: DefenseConfig
    bundle: Path

    @property
    def classify(self):
        return target_of(self.target, "cpu").model

    @property
    def images(self):
        return torch.from_numpy(to_unit_range(self.chunk.pixels))

    @property
    def labels(self):
        return torch.from_numpy(self.chunk.labels)

    @property
    def keys(self):
        return torch.from_numpy(self.chunk.keys)

    def craft(self, defense: Defense | None, seed=0, **entry):
        attack = SweepAttack.model_validate({"name": "x", "attack": PGD, **entry})
        return craft(attack, self.classify, defense, self.images, self.labels, self.keys, seed)

    def loss(self, model, images):
        """Return the cross-entropy (N,) of what a corpus would store."""
        with torch.no_grad():
            return F.cross_entropy(model(round_to_pixels(images)), self.labels, reduction="none")


@pytest.fixture(scope="module")
def setup(tmp_path_factory, smooth_pixels, tiny_bundle):
    config = TargetConfig(architecture="small_cnn", num_classes=CLASSES)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = build_target(config)
    pixels = (64 + smooth_pixels(COUNT, SIDE, SIDE, 2) // 2).astype(np.uint8)
    images = torch.from_numpy(to_unit_range(pixels))
    with torch.no_grad():
        # Decided but not saturated answers, spread over the classes: logits of unit variance, times two.
        raw = model(images)
        scale = 2 / raw.std(0)
        model.fc.weight.mul_(scale[:, None])
        model.fc.bias.copy_((model.fc.bias - raw.mean(0)) * scale)
        labels = model(images).argmax(1).numpy()
    assert len(set(labels.tolist())) == CLASSES
    folder = tmp_path_factory.mktemp("target") / "net"
    save_target(folder, model, config, ("a", "b", "c"), {})
    chunk = Chunk(pixels, labels, np.arange(40, 40 + COUNT))
    acsr = DefenseConfig(name="acsr", artifact=str(tiny_bundle))
    return Setup(SweepTarget(name="net", location=str(folder)), chunk, acsr, tiny_bundle)


def attack(setup, defense=None, seed=0, chunk=None, **entry):
    settings = SweepAttack.model_validate({"name": "x", "attack": PGD, **entry})
    return attack_unit(chunk or setup.chunk, settings, setup.target, defense, seed=seed, device="cpu")


@pytest.mark.parametrize(
    "config",
    [
        PGD,
        {"name": "fgsm", "norm": "relative_l2", "epsilon": 0.04},
        {"name": "pgd", "norm": "l2", "epsilon": 0.8, "steps": 4},
        {"name": "cw", "norm": "relative_l2", "epsilon": 0.05, "steps": 20},
        {"name": "deepfool", "steps": 10},
    ],
    ids=lambda config: f"{config['name']}-{config.get('norm', 'linf')}",
)
def test_what_is_stored_is_the_rounded_attack_and_its_norms(setup, config):
    table = attack(setup, attack=config)
    entry = SweepAttack.model_validate({"name": "x", "attack": config})
    expected = run_attack(entry.attack, setup.classify, setup.images, setup.labels, seed=0, keys=setup.keys)
    stored = torch.from_numpy(to_unit_range(stored_pixels(table)))
    torch.testing.assert_close(stored, expected.rounded, rtol=0, atol=1e-7)
    np.testing.assert_array_equal(table["key"].to_numpy(), setup.chunk.keys)
    with torch.no_grad():
        seen = setup.classify(expected.unrounded).argmax(1)
    np.testing.assert_array_equal(table["float_prediction"].to_numpy(), seen.numpy())

    change = (stored - setup.images).double().flatten(1)
    length = setup.images.double().flatten(1).norm(dim=1)
    assert (change.abs().amax(1) > 0).double().mean() > 0.5
    np.testing.assert_allclose(table["linf"].to_numpy(), change.abs().amax(1), atol=1e-6)
    np.testing.assert_allclose(table["l2"].to_numpy(), change.norm(dim=1), atol=1e-5)
    np.testing.assert_allclose(table["relative_l2"].to_numpy(), change.norm(dim=1) / length, atol=1e-6)
    if entry.attack.epsilon is not None:
        norm = entry.attack.norm
        slack = rounding_slack(norm, (3, SIDE, SIDE)) / (length.numpy() if norm == "relative_l2" else 1)
        assert (table[norm].to_numpy() <= entry.attack.epsilon * 1.001 + slack).all()


def test_an_image_is_attacked_alike_in_any_chunk(setup):
    whole = attack(setup)
    chunk = setup.chunk
    rows = slice(5, 9)
    part = attack(setup, chunk=Chunk(chunk.pixels[rows], chunk.labels[rows], chunk.keys[rows]))
    difference = stored_pixels(whole)[rows].astype(int) - stored_pixels(part)
    # Matrix products differ in their last bits between batch sizes, and a sign then in a pixel.
    assert (difference != 0).mean() < 0.01
    other = attack(setup, chunk=replace(chunk, keys=chunk.keys + 100))
    assert (stored_pixels(whole) != stored_pixels(other)).mean() > 0.05


def test_the_seed_matters_where_random_numbers_are_drawn(setup):
    fgsm = {"name": "fgsm", "epsilon": EPSILON}
    assert attack(setup, seed=0)["image"] != attack(setup, seed=1)["image"]
    assert attack(setup, seed=0)["image"] == attack(setup, seed=0)["image"]
    assert attack(setup, attack=fgsm, seed=0)["image"] == attack(setup, attack=fgsm, seed=1)["image"]


def test_gray_box_ignores_the_defence_and_white_box_beats_it_behind_the_defence(setup):
    acsr = defense_of(setup.acsr, "cpu")
    gray, seen = setup.craft(None)
    assert seen is setup.classify
    white, pipeline = setup.craft(acsr, knowledge="white_box")

    def defended(images):
        return setup.classify(acsr(images))

    torch.testing.assert_close(pipeline(setup.images), defended(setup.images))
    before = setup.loss(defended, setup.images)
    behind_gray, behind_white = setup.loss(defended, gray.rounded), setup.loss(defended, white.rounded)
    assert behind_white.mean() > behind_gray.mean() > before.mean()
    assert (behind_white > behind_gray).float().mean() > 0.6
    # And the other way round, each is best at what it was made for.
    assert setup.loss(setup.classify, gray.rounded).mean() > setup.loss(setup.classify, white.rounded).mean()


def test_transfer_is_the_gray_box_attack_on_another_target(setup, tmp_path):
    config = TargetConfig(architecture="small_cnn", num_classes=CLASSES)
    torch.manual_seed(9)
    save_target(tmp_path / "lender", build_target(config), config, (), {})
    lender = SweepTarget(name="lender", location=str(tmp_path / "lender"), source_only=True)
    entry = SweepAttack.model_validate(
        {"name": "x", "attack": PGD, "knowledge": "transfer", "source": "lender"}
    )
    table = attack_unit(setup.chunk, entry, lender, None, seed=0, device="cpu")
    model = target_of(lender, "cpu").model
    expected = run_attack(entry.attack, model, setup.images, setup.labels, seed=0, keys=setup.keys)
    torch.testing.assert_close(
        torch.from_numpy(to_unit_range(stored_pixels(table))), expected.rounded, rtol=0, atol=1e-7
    )


def test_bpda_attacks_what_has_no_gradient(setup):
    jpeg = defense_of(DefenseConfig(name="jpeg", quality=60), "cpu")
    attacked, pipeline = setup.craft(jpeg, knowledge="bpda")

    def defended(images):
        return setup.classify(jpeg(images))

    torch.testing.assert_close(pipeline(setup.images), defended(setup.images))
    assert setup.loss(defended, attacked.rounded).mean() > setup.loss(defended, setup.images).mean() + 0.1


def test_white_box_needs_a_gradient_or_square(setup):
    jpeg = DefenseConfig(name="jpeg")
    with pytest.raises(GridError, match="Jpeg has no gradient; use bpda or square"):
        attack(setup, jpeg, knowledge="white_box")
    square = {"name": "square", "epsilon": EPSILON, "queries": 60}
    attacked = attack(setup, jpeg, knowledge="white_box", attack=square)
    images = torch.from_numpy(to_unit_range(stored_pixels(attacked)))

    def defended(x):
        return setup.classify(defense_of(jpeg, "cpu")(x))

    assert setup.loss(defended, images).mean() > setup.loss(defended, setup.images).mean()


def test_an_ensemble_has_no_single_image_for_bpda(setup):
    crops = defense_of(DefenseConfig(name="crop_ensemble", crops=3, crop=0.9), "cpu")
    with pytest.raises(GridError, match="CropEnsemble classifies more than one image"):
        setup.craft(crops, knowledge="bpda")


def test_fixed_dictionaries_are_those_of_the_clean_images(setup):
    acsr = defense_of(setup.acsr, "cpu")
    purifier = acsr.purifier
    clusters = purifier.select(purifier.latents(setup.images)).index
    assert len(clusters.unique()) > 1
    fixed, pipeline = setup.craft(acsr, knowledge="white_box_fixed")
    for row in (0, 5):
        one = slice(row, row + 1)
        alone, _ = craft(
            SweepAttack.model_validate({"name": "x", "attack": PGD, "knowledge": "white_box"}),
            setup.classify,
            FixedCluster(purifier, int(clusters[row])),
            setup.images[one],
            setup.labels[one],
            setup.keys[one],
            0,
        )
        assert (fixed.rounded[one] != alone.rounded).float().mean() < 0.02
    # What it was meant to fool still chooses for itself.
    torch.testing.assert_close(pipeline(setup.images), setup.classify(acsr(setup.images)))


def test_fixed_dictionaries_are_all_that_the_defence_averages(setup):
    # FGSM's one gradient is at the clean images, where the fixed choice is the defence's own.
    config = DefenseConfig(name="acsr", artifact=str(setup.bundle), top_k=3)
    fgsm = {"name": "fgsm", "epsilon": EPSILON}
    fixed, white = (
        attack(setup, config, knowledge=knowledge, attack=fgsm)["image"]
        for knowledge in ("white_box_fixed", "white_box")
    )
    assert fixed == white
    nearest = attack(setup, setup.acsr, knowledge="white_box_fixed", attack=fgsm)["image"]
    assert fixed != nearest


def test_fixed_dictionaries_of_another_rule_are_those_of_that_rule(setup):
    farthest = defense_of(DefenseConfig(name="rank", artifact=str(setup.bundle), rank=4), "cpu")
    nearest = defense_of(setup.acsr, "cpu")
    one, _ = setup.craft(farthest, knowledge="white_box_fixed")
    two, _ = setup.craft(nearest, knowledge="white_box_fixed")
    assert (one.rounded != two.rounded).float().mean() > 0.05


@pytest.mark.parametrize("rule", ["mahalanobis", "gaussian_loglik", "tied"])
def test_selection_distances_choose_what_the_purifier_chooses(setup, make_bundle, tmp_path, rule):
    purifier = Purifier.load(make_bundle(tmp_path / rule, selection=rule))
    latents = purifier.latents(setup.images)
    expected = purifier.select(latents)
    distances = selection_distances(purifier, setup.images)
    assert torch.equal(distances.argmin(1), expected.index)
    if rule != "gaussian_loglik":
        torch.testing.assert_close(distances.amin(1).float(), expected.distance, rtol=1e-4, atol=1e-4)
    images = setup.images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(selection_distances(purifier, images).sum(), images)
    assert torch.isfinite(gradient).all()
    assert (gradient.flatten(1).norm(dim=1) > 0).all()


def test_selection_leads_to_another_cluster(setup):
    acsr = defense_of(setup.acsr, "cpu")
    strong = {"name": "pgd", "epsilon": 12 / 255, "steps": 10}
    attacked, _ = setup.craft(acsr, knowledge="selection", attack=strong)
    plain, _ = setup.craft(None, attack=strong)

    def moved(images):
        purifier = acsr.purifier
        before = purifier.select(purifier.latents(setup.images)).index
        return (purifier.select(purifier.latents(images)).index != before).float().mean()

    assert moved(attacked.rounded) >= 0.5
    assert moved(attacked.rounded) > moved(plain.rounded)


def high_share(images, clean):
    """Return the share of the perturbation's energy above a quarter of the sampling rate on some axis."""
    energy = torch.fft.fft2((images - clean).double()).abs().square().sum((0, 1))
    frequency = torch.fft.fftfreq(SIDE).abs()
    high = torch.maximum(frequency[:, None], frequency[None, :]) > 0.25
    return (energy[high].sum() / energy.sum()).item()


def test_low_frequency_attacks_change_low_frequencies_only(setup):
    acsr = defense_of(setup.acsr, "cpu")
    low, pipeline = setup.craft(acsr, knowledge="low_frequency")
    white, _ = setup.craft(acsr, knowledge="white_box")
    assert setup.images.min() > EPSILON
    assert setup.images.max() < 1 - EPSILON
    assert high_share(low.unrounded, setup.images) < 0.05
    assert high_share(white.unrounded, setup.images) > 0.2
    assert (low.unrounded - setup.images).abs().max() <= EPSILON * 1.0001
    gained = setup.loss(pipeline, low.rounded) - setup.loss(pipeline, setup.images)
    assert gained.mean() > 0.02


@pytest.mark.parametrize("knowledge", ["selection", "white_box_fixed"])
def test_only_purifiers_choose_clusters(setup, knowledge):
    with pytest.raises(GridError, match="Gaussian chooses no cluster"):
        attack(setup, DefenseConfig(name="gaussian"), knowledge=knowledge)


def test_expectation_over_the_defences_randomness(setup):
    config = DefenseConfig(name="random_cluster", artifact=str(setup.bundle))
    pgd = {**PGD, "steps": 2}
    one, four, again = (
        attack(setup, config, knowledge="white_box", attack=pgd, eot_samples=draws)["image"]
        for draws in (1, 3, 3)
    )
    assert four != one
    assert four == again
    shield = DefenseConfig(name="shield")
    assert attack(setup, shield, knowledge="bpda", attack=pgd, eot_samples=2).num_rows == COUNT


def test_a_white_box_sees_a_whole_ensemble(setup):
    config = DefenseConfig(name="crop_ensemble", crops=4, crop=0.8)
    ensemble = defense_of(config, "cpu")
    _, pipeline = setup.craft(ensemble, knowledge="white_box", attack={"name": "fgsm", "epsilon": EPSILON})
    torch.testing.assert_close(pipeline(setup.images), ensemble.logits(setup.classify, setup.images))


@pytest.mark.parametrize("kind", ["none", "jpeg", "acsr", "median"])
def test_outcomes_are_those_of_a_pipeline_made_by_hand(setup, kind):
    config = setup.acsr if kind == "acsr" else DefenseConfig(name=kind)
    attacked = attack(setup)
    outcome = defend_unit(setup.chunk, attacked, setup.target, config, device="cpu")
    images = torch.from_numpy(to_unit_range(stored_pixels(attacked)))
    with torch.no_grad():
        defended = (defense_of(config, "cpu")(images) * 255).round() / 255
        probabilities = setup.classify(defended).softmax(1)
    np.testing.assert_array_equal(outcome["prediction"].to_numpy(), probabilities.argmax(1))
    np.testing.assert_array_equal(outcome["label"].to_numpy(), setup.chunk.labels)
    np.testing.assert_array_equal(outcome["key"].to_numpy(), setup.chunk.keys)
    np.testing.assert_allclose(np.stack(outcome["probabilities"].to_pylist()), probabilities, atol=1e-5)
    np.testing.assert_allclose(outcome["confidence"].to_numpy(), probabilities.amax(1), atol=1e-5)
    squared = (defended - setup.images).double().square().flatten(1).mean(1)
    np.testing.assert_allclose(outcome["psnr"].to_numpy(), -10 * squared.log10(), atol=1e-3)
    assert ((outcome["ssim"].to_numpy() > 0) & (outcome["ssim"].to_numpy() < 1)).all()


def test_clean_images_without_a_defence_are_right_and_unchanged(setup):
    outcome = defend_unit(setup.chunk, None, setup.target, DefenseConfig(name="none"), device="cpu")
    np.testing.assert_array_equal(outcome["prediction"].to_numpy(), setup.chunk.labels)
    assert np.isinf(outcome["psnr"].to_numpy()).all()
    np.testing.assert_allclose(outcome["ssim"].to_numpy(), 1)


@pytest.mark.parametrize("kind", ["acsr", "shield", "crop_ensemble"])
def test_an_outcome_does_not_depend_on_the_other_images(setup, kind):
    config = setup.acsr if kind == "acsr" else DefenseConfig(name=kind)
    whole = defend_unit(setup.chunk, None, setup.target, config, device="cpu")
    order = np.array([7, 2, 11])
    chunk = setup.chunk
    some = Chunk(chunk.pixels[order], chunk.labels[order], chunk.keys[order])
    part = defend_unit(some, None, setup.target, config, device="cpu")
    for name in ("prediction", "label", "key"):
        np.testing.assert_array_equal(part[name].to_numpy(), whole[name].to_numpy()[order])
    for name in ("confidence", "psnr", "ssim"):
        np.testing.assert_allclose(part[name].to_numpy(), whole[name].to_numpy()[order], atol=1e-5)


def test_ensembles_average_the_probabilities_of_their_members(setup):
    config = DefenseConfig(name="crop_ensemble", crops=5, crop=0.7)
    outcome = defend_unit(setup.chunk, None, setup.target, config, device="cpu")
    shown = []

    def classify(images):
        rounded = (images * 255).round() / 255
        shown.append(setup.classify(rounded).softmax(1))
        return setup.classify(rounded)

    with torch.no_grad():
        defense_of(config, "cpu").logits(classify, setup.images)
    assert len(shown) == 5
    np.testing.assert_allclose(
        np.stack(outcome["probabilities"].to_pylist()), torch.stack(shown).mean(0), atol=1e-5
    )
    # No single image was defended, so none is compared.
    assert np.isnan(outcome["psnr"].to_numpy()).all()
    assert np.isnan(outcome["ssim"].to_numpy()).all()


def test_calibration_finds_the_share_of_clean_accuracy(setup):
    entry = SweepAttack.model_validate({"name": "x", "attack": {"name": "noise", "epsilon": 0.001}})
    found, wanted = calibrate_unit(setup.chunk, entry.attack, 0.5, setup.target, seed=0, device="cpu")
    attacked = run_attack(found.config, setup.classify, setup.images, setup.labels, seed=0)
    with torch.no_grad():
        kept = (setup.classify(attacked.rounded).argmax(1) == setup.labels).float().mean().item()
    assert kept == pytest.approx(found.accuracy)
    assert abs(kept - 0.5) <= 1.5 / COUNT
    with torch.no_grad():
        clean = (setup.classify(setup.images).argmax(1) == setup.labels).float().mean().item()
    assert wanted == pytest.approx(0.5 * clean)


def test_fingerprints_tell_contents_apart_and_not_the_order_of_keys():
    assert fingerprint(["a", {"x": 1, "y": 2}]) == fingerprint(["a", json.loads('{"y": 2, "x": 1}')])
    assert len({fingerprint(parts) for parts in (["a"], ["a", None], ["a", 0], [0, "a"], [["a"]])}) == 5


def test_results_outside_the_budget_are_marked(setup):
    tight = attack(setup, attack={"name": "deepfool", "norm": "relative_l2", "epsilon": 1e-4, "steps": 20})
    wide = attack(setup, attack={"name": "deepfool", "norm": "relative_l2", "epsilon": 5.0, "steps": 20})
    # Not those that lie on the boundary already.
    assert sum(tight["scaled_back"].to_pylist()) > COUNT / 2
    assert not any(wide["scaled_back"].to_pylist())
