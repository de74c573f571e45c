"""The job train_purifier on digits: a bundle in, one with a network out, for any number of workers."""

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from acsr_ray.artifacts import ArtifactError, artifact_digest, file_digest
from acsr_ray.cli import run_job
from acsr_ray.clustering.gaussians import Gaussians
from acsr_ray.config import ConfigError, parse_job
from acsr_ray.corpus.sources import CorpusError
from acsr_ray.distributed.latents import TRAINING_DATA
from acsr_ray.distributed.purifier_training import TrainPurifierSettings, check_surrogate, train_purifier
from acsr_ray.distributed.runtime import RaySettings
from acsr_ray.models.targets import TargetConfig, TargetError, build_target, load_target, save_target
from acsr_ray.purification.bundle import RECONSTRUCTION, AutoStrength, bundle_digest, load_bundle, save_bundle
from acsr_ray.purification.options import PurifyOptions
from acsr_ray.purification.purifier import Purifier
from acsr_ray.purification.unrolled import restore_unrolled
from acsr_ray.sparse.noise import noise_level
from acsr_ray.sparse.tikhonov import tikhonov_split
from acsr_ray.sparse.unrolled import UnrolledConfig
from acsr_ray.training.loop import AdamConfig
from acsr_ray.training.pairs import PairConfig
from acsr_ray.training.purifier import BEYOND, BY_RESPONSE, NOISE, RESPONSE, TELLING
from acsr_ray.training.settings import RunSettings

SCHEDULE = AdamConfig(
    epochs=2, batch_size=24, lanes=4, shuffle_rows=24, peak_lr=0.01, crop_padding=1, flip=False
)
NETWORK = UnrolledConfig(iterations=2, stride=3, deeper=(6,), sharing="filters")
CLASS_NAMES = ("ant", "bee", "cat")


@pytest.fixture(scope="module")
def digit_shards(digits, encoded, hf_table, write_parquet, tmp_path_factory):
    """Return training and validation shards of 96 and 24 digits."""
    folder = tmp_path_factory.mktemp("digits")
    pixels = (digits.images * 255).round().byte().permute(0, 2, 3, 1).numpy()

    def write(name, rows):
        table = hf_table([encoded(image) for image in pixels[rows]]).replace_schema_metadata(None)
        labels = pa.array(digits.labels[rows].tolist(), pa.int64())
        return str(write_parquet(folder / name, table.set_column(2, "label", labels)))

    return write("train.parquet", slice(0, 96)), write("val.parquet", slice(96, 120))


@pytest.fixture(scope="module")
def surrogate(digits, tmp_path_factory):
    path = tmp_path_factory.mktemp("surrogate") / "digits.pt"
    torch.jit.script(digits.model).save(str(path))
    return str(path)


@pytest.fixture(scope="module")
def settings(digit_shards, surrogate, tiny_bundle):
    def build(output, workers=0, **changes):
        values = {
            "train": (digit_shards[0],),
            "validation": (digit_shards[1],),
            "bundle": str(tiny_bundle),
            "surrogates": (surrogate,),
            "output": output,
            "image_size": 16,
            "network": NETWORK,
            "atoms": 8,
            "pairs": PairConfig(relative_l2=0.15),
            "optimizer": SCHEDULE,
            "seed": 3,
            "device": "cpu",
            "run": RunSettings(workers=workers, threads=1, cpus_per_worker=0.5),
            "ray": RaySettings(object_store_megabytes=100),
            **changes,
        }
        return TrainPurifierSettings(**values)

    return build


@pytest.fixture(scope="module")
def alone(settings, tmp_path_factory):
    """The run in this process."""
    output = tmp_path_factory.mktemp("alone") / "bundle"
    return train_purifier(settings(output)), output


def manifest_of(folder):
    return json.loads((folder / "manifest.json").read_text())


def test_the_new_bundle_purifies_with_the_network_by_default(alone, tiny_bundle, digits):
    metrics, output = alone
    assert metrics["output"] == str(output)
    assert metrics["train_images"] == 96
    assert metrics["validation_images"] == 24
    assert metrics["unreadable_images"] == 0
    assert metrics["surrogates_clean"] > 0.8
    assert metrics["surrogates_attacked"] < 0.5
    assert 0 <= metrics["surrogates_purified_attacked"] <= metrics["surrogates_purified_clean"] <= 1
    assert metrics["epoch_losses"][1] < metrics["epoch_losses"][0]
    bundle = load_bundle(output)
    assert bundle.config.reconstruction == "unrolled"
    assert bundle.config.unrolled == NETWORK
    images = digits.images[:6]
    purifier = Purifier.load(output)
    outcome = purifier.purify(images)
    selection = purifier.select(purifier.latents(images))
    network = restore_unrolled(bundle)
    with torch.no_grad():
        bands = tikhonov_split(images, bundle.config.tikhonov)
        expected = network(*bands, selection.index).clamp(0, 1)
    torch.testing.assert_close(outcome.images, expected, rtol=0, atol=1e-6)
    # What the bundle was stays beside it, bit for bit.
    paper = Purifier.load(output, options=PurifyOptions(reconstruction="cbpdn"))
    assert torch.equal(paper(images), Purifier.load(tiny_bundle)(images))
    old = load_bundle(tiny_bundle)
    kept = {"reconstruction", "unrolled", "auto_strength", "auto_by_response", "unrolled_strength"}
    assert bundle.config.model_dump(exclude=kept) == old.config.model_dump(exclude=kept)


def test_strength_auto_is_one_at_the_noise_of_clean_images(alone, digits):
    metrics, output = alone
    config = load_bundle(output).config
    _, highpass = tikhonov_split(digits.images[96:120], config.tikhonov)
    assert config.auto_strength.reference == metrics[NOISE]
    assert metrics[NOISE] == pytest.approx(noise_level(highpass).median().item(), rel=1e-5)
    assert config.auto_strength == AutoStrength(reference=metrics[NOISE])
    telling = AutoStrength(reference=metrics[RESPONSE], **BY_RESPONSE) if metrics[BEYOND] >= TELLING else None
    assert config.auto_by_response == telling
    assert config.unrolled_strength == 1


def test_training_has_moved_the_weights(alone, settings, tmp_path):
    """Against a run whose rate is all but nothing."""
    _, output = alone
    still = settings(tmp_path / "still", optimizer=SCHEDULE.model_copy(update={"peak_lr": 1e-12}))
    train_purifier(still)
    trained, start = load_bundle(output).reconstruction, load_bundle(tmp_path / "still").reconstruction
    assert trained.keys() == start.keys()
    moved = {name for name in trained if (trained[name] - start[name]).abs().max() > 1e-4}
    fixed = {name for name in trained if name.endswith((".step", ".unit"))}
    # All filters of the clusters that digits belong to, and none of the others'.
    met = {name.split(".")[1] for name in moved}
    assert moved == {name for name in trained.keys() - fixed if name.split(".")[1] in met}
    assert 1 <= len(met) < 4


def test_provenance_is_kept_and_added_to(alone, settings, tiny_bundle, surrogate, tmp_path):
    metrics, output = alone
    manifest, old = manifest_of(output), manifest_of(tiny_bundle)
    assert manifest["origin"] == old["origin"] == "tests"
    assert manifest["kind"] == "bundle"
    added = manifest["reconstruction"]
    assert added["bundle_digest"] == bundle_digest(tiny_bundle)
    assert added["surrogates"] == [load_target(surrogate).digest]
    assert len(added[TRAINING_DATA]) == len(added["settings_digest"]) == 64
    assert added["metrics"] == {name: value for name, value in metrics.items() if name != "output"}
    # A bundle travels: it names no folder of the machine that made it.
    text = (output / "manifest.json").read_text()
    assert str(output.parent) not in text
    assert surrogate not in text
    for name in ("encoder", "clusters", "dictionaries"):
        assert file_digest(output / f"{name}.safetensors") == file_digest(tiny_bundle / f"{name}.safetensors")
    # From this bundle goes another on, whose own training is recorded.
    network = UnrolledConfig(iterations=1, stride=5, deeper=())
    changes = {"bundle": str(output), "network": network, "name": "second", "validation": ()}
    train_purifier(settings(tmp_path / "second", **changes))
    second = load_bundle(tmp_path / "second")
    assert second.config.name == "second"
    assert second.config.unrolled == network
    assert torch.equal(second.atoms, load_bundle(tiny_bundle).atoms)
    again = manifest_of(tmp_path / "second")
    assert again["origin"] == "tests"
    assert again["reconstruction"]["bundle_digest"] == artifact_digest(output)
    assert {"validation_images", NOISE}.isdisjoint(again["reconstruction"]["metrics"])
    # No validation images, no other noise level.
    assert second.config.auto_strength == load_bundle(output).config.auto_strength


@pytest.mark.ray
@pytest.mark.slow
def test_two_workers_make_the_run_of_one_process(alone, settings, tmp_path, ray_local):
    """With filters of each cluster's own, most of which a worker's share of a batch does not meet."""
    metrics, output = alone
    found = train_purifier(settings(tmp_path / "bundle", 2))
    assert found["epoch_losses"] == pytest.approx(metrics["epoch_losses"], rel=1e-3)
    assert found["surrogates_purified_clean"] == pytest.approx(metrics["surrogates_purified_clean"], abs=0.05)
    references = [load_bundle(folder).config.auto_strength for folder in (tmp_path / "bundle", output)]
    assert references[0] == references[1] != AutoStrength()
    weights, expected = (load_bundle(folder).reconstruction for folder in (tmp_path / "bundle", output))
    assert weights.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_allclose(weights[name], tensor, atol=5e-3, err_msg=name)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize(("sharing", "workers"), [("global", 2), ("thresholds", 1)])
def test_workers_make_the_run_of_one_process(workers, sharing, settings, tmp_path, ray_local):
    network = NETWORK.model_copy(update={"sharing": sharing})
    # Parts of a worker's share, clean rows rarer than one in a part, and averaged weights.
    optimizer = SCHEDULE.model_copy(update={"accumulate": 2, "ema_decay": 0.9})
    changes = {
        "network": network,
        "optimizer": optimizer,
        "pairs": PairConfig(relative_l2=0.15, clean=0.05),
    }
    here = train_purifier(settings(tmp_path / "here", **changes))
    there = train_purifier(settings(tmp_path / "there", workers, **changes))
    assert there["epoch_losses"] == pytest.approx(here["epoch_losses"], rel=1e-3)
    weights, expected = (load_bundle(tmp_path / name).reconstruction for name in ("there", "here"))
    for name, tensor in expected.items():
        np.testing.assert_allclose(weights[name], tensor, atol=5e-3, err_msg=name)


@pytest.mark.parametrize("written", ["folder", "relative"])
def test_the_bundle_it_starts_from_is_not_overwritten(written, settings, make_bundle, tmp_path, monkeypatch):
    folder = make_bundle(tmp_path / "b")
    before = artifact_digest(folder)
    monkeypatch.chdir(tmp_path)
    output = {"folder": folder, "relative": tmp_path / "x" / ".." / "b"}[written]
    with pytest.raises(ArtifactError, match="choose another --output"):
        train_purifier(settings(output, bundle="b"))
    assert artifact_digest(folder) == before


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"surrogates": ("/nowhere/target",)}, TargetError, "no target '/nowhere/target'"),
        ({"surrogates": ("/nowhere/target.pt",)}, TargetError, "the file does not exist"),
        ({"surrogates": ("no_such_module:make",)}, TargetError, "cannot import target"),
        ({"bundle": "no-such-bundle"}, ArtifactError, "no bundle 'no-such-bundle'"),
        ({"train": ("/nowhere.parquet",)}, CorpusError, "does not exist"),
        (
            {"network": UnrolledConfig(stride=3), "atoms": 33},
            ConfigError,
            "does not fit bundle .*33 atoms cannot be chosen from 32",
        ),
        ({"atoms": 9}, ConfigError, "does not fit bundle .*9 atoms cannot be chosen from 8"),
        ({"network": UnrolledConfig()}, ConfigError, "stride 2 does not fit atoms of 5 pixels"),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_written(settings, tmp_path, changes, error, message):
    with pytest.raises(error, match=message):
        train_purifier(settings(tmp_path / "out", **changes))
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def write_surrogate(tmp_path):
    def write(names, side=16, classes=None):
        config = TargetConfig(architecture="wrn-10-1", num_classes=classes or len(names), image_size=side)
        save_target(tmp_path / "surrogate", build_target(config), config, names, {})
        return str(tmp_path / "surrogate")

    return write


TEN = tuple(f"digit {label}" for label in range(10))
NUMBERED = tuple(map(str, range(10)))


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ((CLASS_NAMES,), "has 3 classes, the shards have 10"),
        ((NUMBERED, 32), "takes images of 32 pixels a side, --image-size is 16"),
    ],
)
def test_a_surrogate_of_other_images_or_classes_is_refused(
    settings, made, write_surrogate, tmp_path, message
):
    run = settings(tmp_path / "out", surrogates=(write_surrogate(*made),))
    with pytest.raises(ConfigError, match=f"surrogate .*{message}"):
        train_purifier(run)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("own", "shards", "bundle", "message"),
    [
        # By the names of the shards, whatever the bundle's are.
        (TEN, TEN, CLASS_NAMES, None),
        (TEN, TEN, TEN[::-1], None),
        (NUMBERED, TEN, TEN, None),
        ((), TEN, TEN, None),
        (TEN[::-1], TEN, TEN[::-1], "has classes digit 9, .*; those of the images are digit 0, "),
        (CLASS_NAMES, TEN, TEN, "has 3 classes, the shards have 10"),
        (TEN, CLASS_NAMES, CLASS_NAMES, "has 10 classes, the shards have 3"),
        # By those of the bundle, where it may be of the same corpus.
        (TEN, NUMBERED, TEN, None),
        (TEN, NUMBERED, NUMBERED, None),
        (NUMBERED, NUMBERED, TEN, None),
        (TEN[::-1], NUMBERED, TEN, "has classes digit 9, .*; those of the images are digit 0, "),
        (TEN, NUMBERED[:3], CLASS_NAMES, "has 10 classes, the shards have 3"),
        # By the labels alone, which may be some of the classes.
        (TEN, NUMBERED, CLASS_NAMES, None),
        (TEN, NUMBERED[:9], TEN, None),
        (CLASS_NAMES, NUMBERED, TEN[:4], "has 3 classes, the shards have 10"),
    ],
)
def test_surrogates_are_of_the_images_classes(own, shards, bundle, message, write_surrogate):
    target = load_target(write_surrogate(own, classes=len(own) or 10))
    refused = pytest.raises(ConfigError, match=f"surrogate mine {message}") if message else nullcontext()
    with refused:
        check_surrogate("mine", target, 16, shards, bundle)


def test_a_surrogate_that_cannot_read_the_images_is_refused(surrogate):
    target = load_target(surrogate)
    check_surrogate("mine", target, 16, NUMBERED, TEN)
    with pytest.raises(ConfigError, match="surrogate mine takes no images of 24 pixels a side"):
        check_surrogate("mine", target, 24, NUMBERED, TEN)


def test_training_goes_on_from_a_trained_network(alone, settings, tmp_path):
    _, output = alone
    still = SCHEDULE.model_copy(update={"peak_lr": 1e-12, "epochs": 1})
    train_purifier(settings(tmp_path / "next", init=output, optimizer=still, seed=9))
    first, second = load_bundle(output).reconstruction, load_bundle(tmp_path / "next").reconstruction
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], tensor) for name, tensor in second.items())
    added = manifest_of(tmp_path / "next")["reconstruction"]
    assert added["init_digest"] == artifact_digest(output)
    assert manifest_of(output)["reconstruction"]["init_digest"] is None


def test_a_network_of_other_clusters_is_no_start(settings, make_unrolled_bundle, tiny_bundle, tmp_path):
    """With filters of each cluster's own, which another bundle has another number of."""
    bundle = load_bundle(tiny_bundle)
    gaussians = Gaussians(**{name: tensor[:3] for name, tensor in vars(bundle.gaussians).items()})
    three = replace(bundle, gaussians=gaussians, atoms=bundle.atoms[:3])
    save_bundle(tmp_path / "three", three, {})
    start = make_unrolled_bundle(tmp_path / "start", "filters", network=NETWORK)
    with pytest.raises(ArtifactError, match="do not fit"):
        train_purifier(settings(tmp_path / "out", bundle=str(tmp_path / "three"), init=start, validation=()))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("change", [{"iterations": 3}, {"deeper": ()}, {"sharing": "global"}])
def test_a_network_of_another_shape_is_no_start(change, alone, settings, tmp_path):
    _, output = alone
    network = NETWORK.model_copy(update=change)
    with pytest.raises(ArtifactError, match="not the one that is to be trained"):
        train_purifier(settings(tmp_path / "out", init=output, network=network))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("atoms", [7, 64])
def test_a_network_of_other_atoms_is_no_start(atoms, alone, settings, tmp_path):
    _, output = alone
    with pytest.raises(ArtifactError, match=f"has 8 atoms, --atoms is {atoms}"):
        train_purifier(settings(tmp_path / "out", init=output, atoms=atoms))
    assert list(tmp_path.iterdir()) == []


def test_a_bundle_without_a_network_is_no_start(settings, tiny_bundle, tmp_path):
    with pytest.raises(ArtifactError, match="not the one that is to be trained"):
        train_purifier(settings(tmp_path / "out", init=tiny_bundle))


def test_half_precision_is_close_and_half_the_size(alone, settings, tmp_path, digits):
    _, output = alone
    train_purifier(settings(tmp_path / "whole", half_precision=False))
    sizes = [(folder / RECONSTRUCTION).stat().st_size for folder in (output, tmp_path / "whole")]
    assert sizes[0] < 0.7 * sizes[1]
    half, whole = (Purifier.load(folder)(digits.images[:8]) for folder in (output, tmp_path / "whole"))
    assert 0 < (half - whole).abs().max() < 1 / 255


@pytest.mark.parametrize(
    ("arguments", "init"),
    [([], "dictionary"), (["--init", "random"], "random"), (["--init", "some/folder"], Path("some/folder"))],
)
def test_starts_on_the_command_line(arguments, init):
    common = ["--train", "a", "--surrogates", "b", "--output", "d"]
    assert parse_job(TrainPurifierSettings, "train_purifier", [*common, *arguments]).init == init


def test_a_surrogate_is_needed(settings, tmp_path):
    with pytest.raises(ValueError, match="surrogates"):
        settings(tmp_path / "out", surrogates=())


def test_the_command_line_makes_the_same_bundle(
    alone, settings, digit_shards, surrogate, tiny_bundle, tmp_path
):
    _, output = alone
    (tmp_path / "run.yaml").write_text(
        "train_purifier:\n"
        f"  surrogates: [{surrogate}]\n"
        "  network: {iterations: 2, stride: 3, deeper: [6]}\n"
        "  optimizer: {epochs: 2, batch_size: 24, lanes: 4, shuffle_rows: 24, crop_padding: 1}\n"
    )
    arguments = [
        *("--config", str(tmp_path / "run.yaml"), "--train", digit_shards[0], "--bundle", str(tiny_bundle)),
        *("--output", str(tmp_path / "out"), "--image-size", "16", "--network.sharing", "filters"),
        *("--atoms", "8", "--pairs.relative-l2", "0.15", "--optimizer.no-flip", "--seed", "3"),
        *("--optimizer.peak-lr", "0.01"),
        *("--device", "cpu", "--run.workers", "0", "--validation", digit_shards[1]),
    ]
    run_job("train_purifier", arguments)
    trained, expected = (load_bundle(folder).reconstruction for folder in (tmp_path / "out", output))
    assert trained.keys() == expected.keys()
    assert all(torch.equal(trained[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(
    ("arguments", "field", "value"),
    [
        (["--network.deeper"], "deeper", ()),
        (["--network.deeper", "8", "16"], "deeper", (8, 16)),
        (["--network.low-band", "passed"], "low_band", "passed"),
        (["--network.no-noise-adaptive"], "noise_adaptive", False),
        ([], "iterations", 3),
    ],
)
def test_networks_on_the_command_line(arguments, field, value):
    common = ["--train", "a", "--surrogates", "b", "c", "--output", "d"]
    parsed = parse_job(TrainPurifierSettings, "train_purifier", [*common, *arguments])
    assert getattr(parsed.network, field) == value
    assert parsed.surrogates == ("b", "c")
    assert isinstance(parsed.optimizer, AdamConfig)
    assert parsed.optimizer.clip_norm == 1.0
