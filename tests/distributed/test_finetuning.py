"""Fine-tuning on purified shards, end to end on digits: what a strong purifier costs, and what comes back."""

import contextlib
import io
import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from acsr_ray.artifacts import ArtifactError, artifact_digest, load_tensors, save_tensors
from acsr_ray.cli import run_job
from acsr_ray.columns import LABEL, STATUS, UNIT
from acsr_ray.config import parse_job
from acsr_ray.corpus.images import DecodeLimits, to_pixels
from acsr_ray.corpus.labelled import read_labelled
from acsr_ray.corpus.sources import CorpusError
from acsr_ray.corpus.units import plan_units
from acsr_ray.corpus.writing import write_shard
from acsr_ray.distributed.finetuning import FinetuneTargetSettings, finetune_target
from acsr_ray.distributed.training import (
    TrainBaselineSettings,
    TrainTargetSettings,
    train_baseline,
    train_target,
)
from acsr_ray.models.targets import WEIGHTS, TargetConfig, TargetError, load_target
from acsr_ray.purification.bundle import bundle_digest
from acsr_ray.purification.purifier import Purifier
from acsr_ray.purification.stages import (
    DecodeImages,
    EncodeImages,
    PurifyImages,
    ReadUnits,
    SelectClusters,
    WriteUnits,
)
from acsr_ray.sparse.cbpdn import CbpdnConfig
from acsr_ray.sparse.tikhonov import TikhonovConfig
from acsr_ray.training.loop import OptimizerConfig, accuracy, predict
from acsr_ray.training.settings import RunSettings

SIDE = 16
TRAIN, VALIDATION = 600, 120
DAMAGED = 3
NAMES = tuple(f"digit {label}" for label in range(10))
NETWORK = {"architecture": "resnet9", "width": 0.125, "image_size": SIDE}
SCHEDULE = {"batch_size": 24, "crop_padding": 1, "flip": False}
STILL = OptimizerConfig(epochs=1, batch_size=24, peak_lr=1e-12, weight_decay=0.0)
WEAK = 0.01
"""A multiple of the bundle's strength that leaves the digits as they are."""


@dataclass(frozen=True)
class Places:
    """Folders and shards of one corpus."""

    train: str
    validation: str
    bundle: str
    purified: str
    target: Path


def draw_digits(first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    data = load_digits()
    grey = (data.images[first : first + count] * (255 / 16)).astype(np.uint8)
    resized = [Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BILINEAR) for image in grey]
    pixels = np.repeat(np.stack([np.asarray(image) for image in resized])[..., None], 3, -1)
    return pixels, data.target[first : first + count].astype(np.int64)


def write_digits(path: Path, first: int, count: int, names: tuple[str, ...] = NAMES) -> str:
    pixels, labels = draw_digits(first, count)
    write_shard(path, pixels, labels, [str(row) for row in range(count)], names)
    return str(path)


def damage(path: str, rows: int) -> None:
    """Take the image of some rows away."""
    table = pq.read_table(path)
    cells = pa.array([None] * rows + table["image"].to_pylist()[rows:], table["image"].type)
    pq.write_table(table.set_column(table.column_names.index("image"), "image", cells), path)


def purify(source: str, bundle: str, output: Path) -> str:
    """Purify shards as jobs/purify_corpus.py does, without Ray; return its data folder."""
    stages = (
        ReadUnits(),
        DecodeImages("image", DecodeLimits()),
        EncodeImages(bundle, "cpu", 64, threads=1),
        SelectClusters(bundle, threads=1),
        PurifyImages(bundle, "cpu", 64, threads=1),
        WriteUnits(str(output), "f" * 64, "image", keep_original=False),
    )
    for unit in plan_units(source, image_column="image", unit_rows=200, unit_megabytes=32, limit=None):
        table = pa.table({UNIT: [unit.to_json()]})
        for stage in stages:
            table = stage(table)
    return str(output / "data")


@pytest.fixture(scope="module")
def places(tmp_path_factory, make_bundle) -> Places:
    folder = tmp_path_factory.mktemp("finetuning")
    train = write_digits(folder / "train.parquet", 0, TRAIN)
    validation = write_digits(folder / "validation.parquet", TRAIN, VALIDATION)
    # A small penalty, so that ten iterations end near the optimum at the weak strength too.
    cbpdn = CbpdnConfig(lmbda=0.15, iterations=10, rho=1.0)
    bundle = str(make_bundle(folder / "strong", tikhonov=TikhonovConfig(lmbda=20), cbpdn=cbpdn))
    holed = write_digits(folder / "holed.parquet", 0, TRAIN)
    damage(holed, DAMAGED)
    train_target(
        TrainTargetSettings(
            train=(train,),
            output=folder / "target",
            optimizer=OptimizerConfig(epochs=5, peak_lr=0.1, **SCHEDULE),
            device="cpu",
            run=RunSettings(workers=0),
            **NETWORK,
        )
    )
    return Places(train, validation, bundle, purify(holed, bundle, folder / "out"), folder / "target")


def settings(places: Places, output: Path, **changes) -> FinetuneTargetSettings:
    """Return settings of a run that changes next to nothing and measures next to nothing."""
    values = {
        "train": (places.purified,),
        "validation": (places.validation,),
        "target": places.target,
        "output": output,
        "bundle": places.bundle,
        "strengths": (WEAK,),
        "validation_images": 5,
        "optimizer": STILL,
        "device": "cpu",
        "run": RunSettings(workers=0),
        **changes,
    }
    return FinetuneTargetSettings(**values)


@pytest.fixture(scope="module")
def job(places, tmp_path_factory):
    """Run the job as from the command line; return its folder, its manifest and what it printed."""
    output = tmp_path_factory.mktemp("job") / "finetuned"
    options = {
        "train": places.purified,
        "original": places.train,
        "validation": places.validation,
        "target": str(places.target),
        "output": str(output),
        "bundle": places.bundle,
        "optimizer.epochs": 4,
        "optimizer.batch-size": 24,
        "optimizer.peak-lr": 0.05,
        "optimizer.crop-padding": 1,
        "device": "cpu",
        "run.workers": 0,
    }
    flags = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        run_job("finetune_target", [*flags, "--optimizer.no-flip", "--strengths", str(WEAK), "1.0"])
    return output, json.loads((output / "manifest.json").read_text()), printed.getvalue()


def test_a_classifier_regains_on_purified_images_what_a_strong_purifier_cost_it(job):
    bare, weak, strong = job[1]["metrics"]["outcomes"]
    assert [found["strength"] for found in (bare, weak, strong)] == [None, WEAK, 1.0]
    assert bare["clean"]["before"]["value"] > 0.9
    assert strong["clean"]["before"]["value"] < bare["clean"]["before"]["value"] - 0.25
    assert strong["clean"]["difference"]["low"] > 0.1
    # It was also trained on originals, so bare images stay what they were.
    assert bare["clean"]["difference"]["value"] > -0.05
    assert weak["clean"]["before"]["value"] > bare["clean"]["before"]["value"] - 0.05
    assert job[1]["metrics"]["borne_strength"]["before"] in (None, WEAK)
    for found in (bare, weak, strong):
        assert found["attacked"]["before"] == found["attacked_itself"]["before"]
    assert bare["attacked"]["before"]["value"] < bare["clean"]["before"]["value"] - 0.1
    # The attack on the classifier as it was is a transfer attack for the one that came of it.
    assert bare["attacked_itself"]["after"]["value"] <= bare["attacked"]["after"]["value"]


def test_the_report_is_of_the_artifact_and_of_the_target_it_came_from(job, places):
    output, manifest, _ = job
    assert manifest["target_digest"] == artifact_digest(places.target)
    assert manifest["bundle_digest"] == bundle_digest(places.bundle)
    held_out = read_labelled([places.validation], SIDE)
    purifier = Purifier.load(places.bundle)
    purified = to_pixels(predict(purifier, held_out.pixels).numpy())
    bare, _, strong = manifest["metrics"]["outcomes"]
    for name, folder in (("before", places.target), ("after", output)):
        target = load_target(str(folder))
        assert (target.class_names, target.image_size) == (NAMES, SIDE)
        for found, pixels in ((bare, held_out.pixels), (strong, purified)):
            measured = accuracy(predict(target.model, pixels), held_out.labels)
            assert found["clean"][name]["value"] == pytest.approx(measured, abs=1e-6)
    assert manifest["metrics"]["validation_accuracy"] == bare["clean"]["after"]["value"]
    assert manifest["settings"]["strengths"] == [WEAK, 1.0]


def test_quarantined_rows_are_left_out_and_counted(job, places):
    statuses = pa.concat_tables(pq.read_table(p) for p in Path(places.purified).glob("*.parquet"))[STATUS]
    assert statuses.to_pylist().count("quarantined") == DAMAGED
    metrics = job[1]["metrics"]
    assert metrics["unreadable_images"] == DAMAGED
    assert (metrics["train_images"], metrics["original_images"]) == (2 * TRAIN, TRAIN)


def test_the_answer_is_written_and_printed(job):
    output, manifest, printed = job
    report = (output / "report.md").read_text()
    bare, weak, strong = manifest["metrics"]["outcomes"]
    for found, name in ((bare, "none"), (weak, "strength 0.01"), (strong, "strength 1")):
        cells = [f"{100 * found['clean'][when]['value']:.1f} [" for when in ("before", "after")]
        assert any(
            line.startswith(f"| {name} ") and all(cell in line.replace("\\", "") for cell in cells)
            for line in report.splitlines()
        )
    assert f"{DAMAGED}\n" in report.split("quarantined: ")[1]
    for text in (report, printed):
        (answer,) = re.findall(r"Strongest purifier .* before, .* after\.", text)
        borne = manifest["metrics"]["borne_strength"]
        shown = {
            name: "none of those measured" if s is None else f"strength {s:g}" for name, s in borne.items()
        }
        assert answer.endswith(f"{shown['before']} before, {shown['after']} after.")
    assert "Attacked images, strength 1" in printed


def kept(start: dict[str, torch.Tensor], folder: Path, prefix: str = "") -> bool:
    """Return whether all but the batch statistics is as it was."""
    found = load_tensors(folder / WEIGHTS)
    names = [name for name in start if "running" not in name and "tracked" not in name]
    assert names
    return all(torch.allclose(found[prefix + name], start[name], atol=1e-5) for name in names)


def test_it_starts_from_the_weights_of_the_target(places, tmp_path):
    start = load_tensors(places.target / WEIGHTS)
    summary = finetune_target(settings(places, tmp_path / "still"))
    assert kept(start, tmp_path / "still")
    # Without --original there are purified images only.
    assert (summary["train_images"], summary["original_images"]) == (TRAIN, 0)
    moving = OptimizerConfig(epochs=1, peak_lr=0.05, **SCHEDULE)
    finetune_target(settings(places, tmp_path / "moved", optimizer=moving))
    assert not kept(start, tmp_path / "moved")


def test_a_file_of_weights_will_do_with_its_network(places, tmp_path):
    start = load_tensors(places.target / WEIGHTS)
    bare = {name.removeprefix("network."): tensor for name, tensor in start.items()}
    save_tensors(tmp_path / "mine.safetensors", bare)
    changes = {"target": tmp_path / "mine.safetensors", "network": TargetConfig(**NETWORK)}
    finetune_target(settings(places, tmp_path / "finetuned", **changes))
    assert kept(bare, tmp_path / "finetuned", "network.")
    target = load_target(str(tmp_path / "finetuned"))
    assert target.class_names == tuple(str(label) for label in range(10))
    with pytest.raises(ArtifactError, match="do not fit"):
        finetune_target(settings(places, tmp_path / "x", **{**changes, "network": TargetConfig()}))


def test_a_baseline_will_do(places, tmp_path):
    train_baseline(
        TrainBaselineSettings(
            train=(places.train,),
            output=tmp_path / "baseline",
            architecture="wrn-10-1",
            image_size=SIDE,
            optimizer=STILL,
            device="cpu",
            run=RunSettings(workers=0),
        )
    )
    finetune_target(settings(places, tmp_path / "finetuned", target=tmp_path / "baseline"))
    assert kept(load_tensors(tmp_path / "baseline" / WEIGHTS), tmp_path / "finetuned")
    assert load_target(str(tmp_path / "finetuned")).class_names == NAMES


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"train": "train"}, CorpusError, r"train\.parquet was not purified: --train takes OUTPUT/data"),
        ({"original": "purified"}, CorpusError, "was purified: --original and --validation"),
        ({"validation": "purified"}, CorpusError, "was purified: --original and --validation"),
        ({"target": "my_package.models:filter"}, TargetError, "--target takes a folder of train_target"),
        ({"target": "/nowhere.safetensors"}, TargetError, "the file does not exist"),
        ({"target": "bundle"}, ArtifactError, "is a 'bundle' artifact, not a 'target'"),
        ({"network": TargetConfig(architecture="resnet9")}, TargetError, "knows its own network"),
        ({"output": "target"}, TargetError, "choose another --output"),
        ({"bundle": "no-such-bundle"}, ArtifactError, "no bundle 'no-such-bundle'"),
        ({"reconstruction": "unrolled"}, ArtifactError, "has no unrolled reconstruction"),
    ],
)
def test_what_cannot_be_used_is_refused_before_training(changes, error, message, places, tmp_path):
    def at(value):
        return getattr(places, value, value) if isinstance(value, str) else value

    values = {name: at(value) for name, value in changes.items()}
    listed = {n: (v,) for n, v in values.items() if n in ("train", "original", "validation")}
    with pytest.raises(error, match=message):
        finetune_target(settings(places, **{"output": tmp_path / "out", **values, **listed}))
    assert not (tmp_path / "out").exists()


def test_other_classes_are_refused(places, tmp_path):
    swapped = write_digits(tmp_path / "swapped.parquet", 0, 30, (NAMES[1], NAMES[0], *NAMES[2:]))
    with pytest.raises(TargetError, match=r"has classes digit 1, digit 0, .* the target has digit 0"):
        finetune_target(settings(places, tmp_path / "out", original=(swapped,)))
    table = pq.read_table(places.train).slice(0, 30).replace_schema_metadata()
    more = table.set_column(table.column_names.index(LABEL), LABEL, pa.array([10] * 30, pa.int64()))
    pq.write_table(more, tmp_path / "more.parquet")
    for option, named in (("original", "has labels 10 to 10"), ("validation", "have 11 classes")):
        with pytest.raises((TargetError, CorpusError), match=named):
            finetune_target(settings(places, tmp_path / "out", **{option: (str(tmp_path / "more.parquet"),)}))


@pytest.mark.parametrize(
    "flags", [("--strengths", "0"), ("--strengths",), ("--validation-images", "0"), ("--attack.epsilon", "0")]
)
def test_values_out_of_range_exit_2(flags, capsys):
    needed = ("--train", "a", "--validation", "b", "--target", "t", "--output", "o")
    with pytest.raises(SystemExit) as exit_info:
        parse_job(FinetuneTargetSettings, "finetune_target", [*needed, *flags])
    assert exit_info.value.code == 2
    captured = capsys.readouterr()
    assert flags[0].strip("-").split(".")[-1] in (captured.out + captured.err).replace("_", "-")


@pytest.mark.ray
@pytest.mark.slow
def test_on_ray_the_report_is_that_of_one_process(places, tmp_path, ray_local):
    schedule = OptimizerConfig(epochs=1, peak_lr=0.01, lanes=2, **SCHEDULE)
    found = {}
    for name, workers in (("here", 0), ("ray", 1)):
        run = RunSettings(workers=workers, threads=1, cpus_per_worker=0.5)
        changes = {"optimizer": schedule, "run": run, "validation_images": 60}
        found[name] = finetune_target(settings(places, tmp_path / name, **changes))
    assert found["ray"]["epoch_losses"] == pytest.approx(found["here"]["epoch_losses"], rel=1e-3)
    assert found["ray"]["Clean images, none"] == found["here"]["Clean images, none"]
