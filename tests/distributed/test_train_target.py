"""Training of target classifiers, end to end on tiny shards whose classes are tints."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from acsr_ray.artifacts import ArtifactError, file_digest, load_tensors, save_tensors
from acsr_ray.config import parse_job
from acsr_ray.corpus.labelled import read_labelled
from acsr_ray.corpus.sources import CorpusError
from acsr_ray.distributed.training import (
    TrainBaselineSettings,
    TrainTargetSettings,
    train_baseline,
    train_target,
)
from acsr_ray.models.targets import WEIGHTS, TargetConfig, TargetError, build_target, load_target, save_target
from acsr_ray.training.loop import OptimizerConfig, accuracy, predict
from acsr_ray.training.objectives import InnerAttack
from acsr_ray.training.robust import attacked_metrics
from acsr_ray.training.settings import RunSettings

SIDE = 16
HERE = RunSettings(workers=0)
SCHEDULE = OptimizerConfig(epochs=4, batch_size=24, peak_lr=0.05, crop_padding=2)
STILL = OptimizerConfig(epochs=1, batch_size=24, peak_lr=1e-12, weight_decay=0.0)
SINGLE_STEP = InnerAttack(kind="single_step", norm="linf", epsilon=8 / 255)


@pytest.fixture(scope="module")
def shards(tmp_path_factory, smooth_pixels, encoded, hf_table, write_parquet):
    """Return training and validation shards; class k is brighter in channel k than in the others."""
    folder = tmp_path_factory.mktemp("tints")

    def write(name, count, seed):
        pixels = smooth_pixels(count, SIDE, SIDE, seed) // 2
        pixels[np.arange(count), :, :, np.arange(count) % 3] += 120
        return write_parquet(folder / name, hf_table([encoded(image) for image in pixels]))

    return write("train.parquet", 120, 0), write("val.parquet", 60, 1)


@pytest.fixture
def settings(shards, tmp_path):
    """Return settings of a quick run that writes to tmp_path/target."""

    def build(**changes):
        values = {
            "train": (str(shards[0]),),
            "validation": (str(shards[1]),),
            "output": tmp_path / "target",
            "architecture": "alexnet",
            "width": 0.1,
            "image_size": SIDE,
            "optimizer": SCHEDULE,
            "device": "cpu",
            "run": HERE,
            **changes,
        }
        return TrainTargetSettings(**values)

    return build


def _manifest(folder: Path):
    return json.loads((folder / "manifest.json").read_text())


def _save_source(folder, num_classes=3, **changes):
    """Save an untrained target as an artifact to start from."""
    config = TargetConfig(
        architecture="alexnet", num_classes=num_classes, width=0.1, image_size=SIDE, **changes
    )
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = build_target(config)
    save_target(folder, model, config, tuple(map(str, range(num_classes))), {})
    return folder


def test_training_learns_and_writes_a_target(settings, shards, tmp_path):
    state = torch.get_rng_state()
    metrics = train_target(settings())
    assert torch.equal(torch.get_rng_state(), state)
    assert metrics["validation_accuracy"] > 0.9
    counts = {key: metrics[key] for key in ("train_images", "unreadable_images", "validation_images")}
    assert counts == {"train_images": 120, "unreadable_images": 0, "validation_images": 60}
    assert "pgd_accuracy" not in metrics
    target = load_target(str(tmp_path / "target"))
    assert (target.class_names, target.image_size) == (("ant", "bee", "cat"), SIDE)
    held_out = read_labelled([str(shards[1])], SIDE)
    measured = accuracy(predict(target.model, held_out.pixels), held_out.labels)
    assert measured == metrics["validation_accuracy"]
    manifest = _manifest(tmp_path / "target")
    assert manifest["metrics"] == metrics
    assert manifest["settings"]["optimizer"]["epochs"] == SCHEDULE.epochs
    assert manifest["target"]["num_classes"] == 3
    assert "fresh_layers" not in manifest


def test_adversarial_training_reports_attacked_accuracy_and_helps(settings, shards, tmp_path):
    attack = SINGLE_STEP.model_copy(update={"epsilon": 40 / 255})
    schedule = SCHEDULE.model_copy(update={"epochs": 8})
    clean = train_target(settings(optimizer=schedule, seed=2))
    robust = train_target(
        settings(adversarial=True, attack=attack, optimizer=schedule, seed=2, output=tmp_path / "robust")
    )
    plain = load_target(str(tmp_path / "target")).model
    against = attacked_metrics(plain, read_labelled([str(shards[1])], SIDE), attack, "cpu")
    assert clean["validation_accuracy"] > 0.9
    assert robust["pgd_images"] == 60
    assert robust["pgd_accuracy"] <= robust["validation_accuracy"]
    assert robust["pgd_accuracy"] > against["pgd_accuracy"] + 0.2
    assert _manifest(tmp_path / "robust")["metrics"]["pgd_accuracy"] == robust["pgd_accuracy"]


def test_without_validation_nothing_is_measured(settings):
    metrics = train_target(settings(validation=(), adversarial=True, attack=SINGLE_STEP, optimizer=STILL))
    assert set(metrics) == {"train_images", "unreadable_images", "epoch_losses"}


@pytest.mark.parametrize("adversarial", [False, True])
def test_the_seed_fixes_the_weights(settings, tmp_path, adversarial):
    schedule = SCHEDULE.model_copy(update={"epochs": 1})
    digests = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        # A different global state before each run must not matter.
        torch.rand(len(digests) + 1)
        folder = tmp_path / name
        changes = {"adversarial": adversarial, "attack": SINGLE_STEP, "optimizer": schedule}
        train_target(settings(output=folder, seed=seed, validation=(), **changes))
        digests.append(file_digest(folder / WEIGHTS))
    assert digests[0] == digests[1] != digests[2]


def test_training_may_start_from_a_target(settings, tmp_path):
    source = _save_source(tmp_path / "source")
    train_target(settings(init_weights=source, optimizer=STILL, validation=()))
    manifest = _manifest(tmp_path / "target")
    assert manifest["init_weights_digest"] == file_digest(source / WEIGHTS)
    assert manifest["fresh_layers"] == []
    before, after = (load_tensors(folder / WEIGHTS) for folder in (source, tmp_path / "target"))
    for name, tensor in before.items():
        if not name.endswith(("running_mean", "running_var", "num_batches_tracked")):
            torch.testing.assert_close(after[name], tensor, rtol=0, atol=1e-6)


@pytest.mark.parametrize("form", ["artifact", "file", "bare"])
def test_transfer_to_other_classes_keeps_the_trunk(settings, tmp_path, form):
    source = _save_source(tmp_path / "source", num_classes=8)
    weights = load_tensors(source / WEIGHTS)
    start = source
    if form != "artifact":
        start = tmp_path / "weights.safetensors"
        bare = {name.removeprefix("network."): tensor for name, tensor in weights.items()}
        save_tensors(start, weights if form == "file" else bare)
    train_target(settings(init_weights=start, optimizer=STILL, validation=()))
    manifest = _manifest(tmp_path / "target")
    assert manifest["fresh_layers"] == ["network.fc.bias", "network.fc.weight"]
    got = load_tensors(tmp_path / "target" / WEIGHTS)
    assert got["network.fc.weight"].shape[0] == 3
    trunk = got["network.features.0.0.weight"]
    torch.testing.assert_close(trunk, weights["network.features.0.0.weight"], rtol=0, atol=1e-6)


def test_a_baseline_of_the_pipeline_may_lend_its_weights(settings, shards, tmp_path):
    train_baseline(
        TrainBaselineSettings(
            train=(str(shards[0]),),
            output=tmp_path / "baseline",
            architecture="wrn-10-1",
            image_size=SIDE,
            optimizer=STILL,
            device="cpu",
            run=HERE,
        )
    )
    changes = {"architecture": "wrn-10-1", "width": 1.0, "optimizer": STILL, "validation": ()}
    train_target(settings(init_weights=tmp_path / "baseline", **changes))
    lent, got = (load_tensors(tmp_path / name / WEIGHTS) for name in ("baseline", "target"))
    torch.testing.assert_close(got["stem.weight"], lent["stem.weight"], rtol=0, atol=1e-6)
    assert _manifest(tmp_path / "target")["fresh_layers"] == []


def test_weights_that_cannot_be_used_are_refused(settings, tmp_path):
    source = _save_source(tmp_path / "source")
    with pytest.raises(TargetError, match="another architecture or width"):
        train_target(settings(init_weights=source, width=0.2))
    other = _save_source(tmp_path / "other", mean=(0.485, 0.456, 0.406))
    with pytest.raises(TargetError, match=r"trained with --mean 0\.485 0\.456 0\.406; give the same"):
        train_target(settings(init_weights=other))
    content = bytearray((source / WEIGHTS).read_bytes())
    content[-1] ^= 1
    (source / WEIGHTS).write_bytes(content)
    with pytest.raises(ArtifactError, match="was changed"):
        train_target(settings(init_weights=source))
    with pytest.raises(ArtifactError, match=r"manifest\.json is missing"):
        train_target(settings(init_weights=tmp_path))
    with pytest.raises(ArtifactError, match="not a readable safetensors file"):
        train_target(settings(init_weights=tmp_path / "none.safetensors"))
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "alexnett"}, "did you mean 'alexnet'"),
        ({"architecture": "vgg16"}, "vgg16 .* at least 32 pixels"),
        ({"architecture": "wrn-10-1", "width": 0.5}, "has no option width"),
        ({"architecture": "small_cnn", "width": 1.0}, "small_cnn takes images of 32"),
    ],
)
def test_what_cannot_be_built_fails_before_the_corpus_is_read(settings, changes, message):
    with pytest.raises(TargetError, match=message):
        train_target(settings(train=("/nowhere",), **changes))


def test_a_missing_corpus_is_refused(settings):
    with pytest.raises(CorpusError, match="/nowhere does not exist"):
        train_target(settings(train=("/nowhere",)))


def test_one_class_is_no_classifier(settings, smooth_pixels, encoded, hf_table, write_parquet, tmp_path):
    table = hf_table([encoded(image) for image in smooth_pixels(7, SIDE, SIDE, 0)]).replace_schema_metadata()
    labels = table.column_names.index("label")
    same = table.set_column(labels, "label", table["label"].combine_chunks().take([0] * 7))
    shard = write_parquet(tmp_path / "one.parquet", same)
    with pytest.raises(TargetError, match="needs two classes, the training shards have 1"):
        train_target(settings(train=(str(shard),)))


@pytest.mark.parametrize(
    ("architecture", "size", "given", "stride"),
    [
        ("alexnet", 48, None, 1),
        ("alexnet", 49, None, 2),
        ("alexnet", 64, 1, 1),
        ("alexnet", 16, 2, 2),
        ("wrn-10-1", 64, None, 1),
    ],
)
def test_the_stem_follows_the_image_size_unless_told(settings, tmp_path, architecture, size, given, stride):
    changes = {"optimizer": STILL, "validation": (), "image_size": size, "stem_stride": given}
    if architecture != "alexnet":
        changes["width"] = 1.0
    train_target(settings(architecture=architecture, **changes))
    target = load_target(str(tmp_path / "target"))
    assert _manifest(tmp_path / "target")["target"]["stem_stride"] == stride
    first = next(module for module in target.model.modules() if isinstance(module, torch.nn.Conv2d))
    assert first.stride == (stride, stride)
    assert target.image_size == size


@pytest.mark.parametrize("count", [1, 25])
@pytest.mark.parametrize("architecture", ["alexnet", "resnet50", "googlenet"])
def test_few_images_do_not_make_a_batch_of_one_that_norms_refuse(
    settings, write_shard, tmp_path, architecture, count
):
    # 25 images in batches of 24 leave one over; one image is a batch of one.
    shard = write_shard(tmp_path / "few.parquet", count, SIDE)
    metrics = train_target(
        settings(train=(str(shard),), validation=(), architecture=architecture, optimizer=STILL)
    )
    assert metrics["train_images"] == count


def test_normalisation_is_kept(settings, tmp_path):
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    train_target(settings(mean=mean, std=std, optimizer=STILL, validation=()))
    model = load_target(str(tmp_path / "target")).model
    torch.testing.assert_close(model.mean.flatten(), torch.tensor(mean))
    torch.testing.assert_close(model.std.flatten(), torch.tensor(std))


FLAGS = ("--train", "a", "b", "--output", "o")


def test_normalisation_from_flags_and_file(tmp_path):
    flags = ("--mean", "0.485", "0.456", "0.406", "--std", "0.229", "0.224", "0.225")
    given = parse_job(TrainTargetSettings, "train_target", [*FLAGS, *flags])
    path = tmp_path / "run.yaml"
    path.write_text(
        "train_target: {train: [a, b], output: o, mean: [0.485, 0.456, 0.406], std: [0.229, 0.224, 0.225]}"
    )
    read = parse_job(TrainTargetSettings, "train_target", ["--config", str(path)])
    assert given.mean == read.mean == (0.485, 0.456, 0.406)
    assert given.std == read.std == (0.229, 0.224, 0.225)
    won = parse_job(TrainTargetSettings, "train_target", ["--config", str(path), "--mean", "0", "0", "0"])
    assert (won.mean, won.std) == ((0.0, 0.0, 0.0), read.std)


@pytest.mark.parametrize("flags", [("--mean", "0.5", "0.5"), ("--std", "0.2", "0", "0.2")])
def test_wrong_normalisation_exits_2(flags, capsys):
    with pytest.raises(SystemExit) as exit_info:
        parse_job(TrainTargetSettings, "train_target", [*FLAGS, *flags])
    assert exit_info.value.code == 2
    captured = capsys.readouterr()
    assert flags[0].strip("-") in captured.out + captured.err
