"""The whole method once on a tiny corpus: baseline, semantics, robust encoder, bundle, purified corpus."""

import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from acsr_ray import Purifier
from acsr_ray.artifacts import ArtifactError
from acsr_ray.clustering.elbow import ElbowConfig
from acsr_ray.corpus.writing import write_shard
from acsr_ray.distributed.bundling import BuildBundleSettings, build_bundle
from acsr_ray.distributed.dictionaries import DictionaryConfig
from acsr_ray.distributed.encoders import CompareEncodersSettings, compare_encoders
from acsr_ray.distributed.purify import purify_corpus
from acsr_ray.distributed.purify_settings import PurifyCorpusSettings
from acsr_ray.distributed.semantics import LearnSemanticsSettings, learn_semantics
from acsr_ray.distributed.training import (
    TrainBaselineSettings,
    TrainRobustSettings,
    train_baseline,
    train_robust,
)
from acsr_ray.sparse import CbpdnConfig, CdlConfig
from acsr_ray.training.loop import OptimizerConfig
from acsr_ray.training.objectives import InnerAttack
from acsr_ray.training.settings import RunSettings

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]

HERE = RunSettings(workers=0)
CLASSES = ("bars", "columns", "checks")


def striped_shard(path, count, seed):
    """Three classes that differ in the direction of their stripes."""
    generator = np.random.default_rng(seed)
    labels = np.arange(count) % 3
    phase = generator.integers(0, 4, count)
    y, x = np.mgrid[:16, :16]
    patterns = [
        [(y + p) // 2 % 2, (x + p) // 2 % 2, ((x + p) // 2 + y // 2) % 2][label]
        for label, p in zip(labels, phase, strict=True)
    ]
    noise = generator.integers(0, 60, (count, 16, 16, 3))
    pixels = (np.stack(patterns)[..., None] * 160 + noise).astype(np.uint8)
    write_shard(path, pixels, labels, [f"{path.stem}-{i}" for i in range(count)], CLASSES)
    return str(path)


def test_corpus_to_purified_corpus(tmp_path, ray_local):
    train = (striped_shard(tmp_path / "train.parquet", 90, 0),)
    validation = (striped_shard(tmp_path / "validation.parquet", 30, 1),)
    optimizer = OptimizerConfig(epochs=3, batch_size=16, crop_padding=0)
    metrics = train_baseline(
        TrainBaselineSettings(
            train=train,
            validation=validation,
            output=tmp_path / "baseline",
            architecture="wrn-10-1",
            image_size=16,
            run=HERE,
            optimizer=optimizer,
        )
    )
    assert metrics["validation_accuracy"] > 0.8

    semantics = LearnSemanticsSettings(
        train=train,
        baseline=tmp_path / "baseline",
        output=tmp_path / "semantics",
        elbow=ElbowConfig(k_max=3, one_blob_test=False),
        dictionary=DictionaryConfig(
            images=10, cdl=CdlConfig(num_atoms=8, support=5, epochs=1, code=CbpdnConfig(iterations=10))
        ),
    )
    found = learn_semantics(semantics)
    assert found["images"] == 90
    assert found["clusters"] >= 3
    files = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "semantics/dictionaries").iterdir()}
    assert len(files) == found["clusters"]
    assert learn_semantics(semantics) == found
    assert files == {p.name: p.stat().st_mtime_ns for p in (tmp_path / "semantics/dictionaries").iterdir()}

    train_robust(
        TrainRobustSettings(
            train=train,
            validation=validation,
            baseline=tmp_path / "baseline",
            semantics=tmp_path / "semantics",
            output=tmp_path / "robust",
            attack=InnerAttack(kind="single_step"),
            run=HERE,
            optimizer=optimizer.model_copy(update={"peak_lr": 0.02}),
        )
    )
    bundling = BuildBundleSettings(
        name="stripes",
        baseline=tmp_path / "baseline",
        semantics=tmp_path / "semantics",
        robust=tmp_path / "robust",
        output=tmp_path / "bundle",
        validation=validation,
        cbpdn=CbpdnConfig(iterations=10),
    )
    chosen = build_bundle(bundling)
    assert chosen["own class, clean"] > 0.8
    manifest = json.loads((tmp_path / "bundle/manifest.json").read_text())
    assert manifest["bundle"]["class_names"] == list(CLASSES)
    measured = manifest["selection_on_validation"]
    robust = [entry for entry in measured if entry["encoder"] == "f_rob"]
    assert (len(robust), len(measured)) == (6, 9)
    best = max(robust, key=lambda entry: entry["clean"] + entry["attacked"])
    page = (tmp_path / "bundle/report.html").read_text()
    assert all(name in page for name in CLASSES)
    assert page.count('class="panel"') == found["clusters"]
    assert "(chosen)" in page
    assert best["clean"] == chosen["own class, clean"]

    # The comparison of encoders measures the same, and finds an encoder as good as itself.
    twin = tmp_path / "twin"
    shutil.copytree(tmp_path / "robust", twin)
    comparison = CompareEncodersSettings(
        encoders=(tmp_path / "robust", twin),
        semantics=tmp_path / "semantics",
        test=validation,
        output=tmp_path / "compared",
    )
    rows = compare_encoders(comparison)
    (tied,) = (e for e in robust if (e["gaussians"], e["selection"]) == ("robust", "tied"))
    shares = [float(cell.split()[0]) for cell in rows["robust"].split(" | ")[:3]]
    assert shares == pytest.approx([100 * tied[n] for n in ("clean", "attacked", "same_cluster")], abs=0.06)
    assert rows["robust"].endswith("reference | ")
    assert rows["twin"].split(" | ")[3].startswith("+0.0 [")
    assert rows["twin"].endswith(" | 1")
    strong = compare_encoders(comparison.model_copy(update={"norm": "linf", "epsilon": 0.3}))["robust"]
    strong_shares = [float(cell.split()[0]) for cell in strong.split(" | ")[:3]]
    assert strong_shares[0] == shares[0]
    assert max(strong_shares[1:]) < min(shares) - 20
    manifest = json.loads((twin / "manifest.json").read_text())
    (twin / "manifest.json").write_text(json.dumps({**manifest, "semantics_digest": "other"}))
    with pytest.raises(ArtifactError, match="twin was not trained with"):
        compare_encoders(comparison)

    purify_corpus(
        PurifyCorpusSettings(
            input=validation[0], output=str(tmp_path / "out"), bundle=str(tmp_path / "bundle")
        )
    )
    (shard,) = (tmp_path / "out/data").glob("*.parquet")
    rows = pq.read_table(shard)
    assert set(rows["acsr_status"].to_pylist()) == {"purified"}
    assert (rows["acsr_class"].to_numpy() == rows["label"].to_numpy()).mean() > 0.8

    # What the pipeline wrote is what the library gives, to the last level of a pixel.
    from acsr_ray.corpus.labelled import read_labelled

    original = read_labelled(validation, 16).pixels
    written = read_labelled([str(shard)], 16).pixels
    images = torch.from_numpy(original).permute(0, 3, 1, 2) / 255
    direct = Purifier.load(tmp_path / "bundle")(images).permute(0, 2, 3, 1) * 255
    assert (direct.numpy() - written).__abs__().max() <= 0.5 + 1e-2


def test_artifacts_of_different_runs_are_not_mixed(tmp_path, ray_local):
    train = (striped_shard(tmp_path / "train.parquet", 30, 0),)
    optimizer = OptimizerConfig(epochs=1, batch_size=10, crop_padding=0)
    for name, seed in (("baseline", 0), ("other", 1)):
        train_baseline(
            TrainBaselineSettings(
                train=train,
                output=tmp_path / name,
                architecture="wrn-10-1",
                image_size=16,
                run=HERE,
                optimizer=optimizer,
                seed=seed,
            )
        )
    learn_semantics(
        LearnSemanticsSettings(
            train=train,
            baseline=tmp_path / "baseline",
            output=tmp_path / "semantics",
            elbow=ElbowConfig(k_max=1),
            dictionary=DictionaryConfig(
                images=2, cdl=CdlConfig(num_atoms=2, support=5, epochs=1, code=CbpdnConfig(iterations=2))
            ),
        )
    )
    train_robust(
        TrainRobustSettings(
            train=train,
            baseline=tmp_path / "baseline",
            semantics=tmp_path / "semantics",
            output=tmp_path / "robust",
            attack=InnerAttack(kind="single_step"),
            run=HERE,
            optimizer=optimizer,
        )
    )
    with pytest.raises(ArtifactError, match="baseline"):
        build_bundle(
            BuildBundleSettings(
                name="mixed",
                baseline=tmp_path / "other",
                semantics=tmp_path / "semantics",
                robust=tmp_path / "robust",
                output=tmp_path / "bundle",
                gaussians="baseline",
                selection="mahalanobis",
            )
        )
