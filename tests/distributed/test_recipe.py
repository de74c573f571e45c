"""From a corpus to a bundle by a recipe: the plan, what is skipped, and what a change makes anew."""

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from acsr_ray.config import ConfigError
from acsr_ray.distributed.recipe import MakeBundleSettings, make_bundle, plan_recipe
from acsr_ray.purification.bundle import load_bundle

JOBS = ["train_baseline", "learn_semantics", "train_robust", "build_bundle", "train_purifier"]


def recipe(folder, shard):
    optimizer = {"epochs": 1, "batch_size": 12, "crop_padding": 0}
    here = {"workers": 0}
    common = {"train": [str(shard)], "device": "cpu"}
    baseline, semantics = str(folder / "baseline"), str(folder / "semantics")
    return {
        "train_baseline": {
            **common,
            "output": baseline,
            "architecture": "wrn-10-1",
            "image_size": 16,
            "optimizer": optimizer,
            "run": here,
        },
        "learn_semantics": {
            **common,
            "baseline": baseline,
            "output": semantics,
            "elbow": {"k_max": 1},
            "dictionary": {
                "images": 2,
                "cdl": {"num_atoms": 2, "support": 5, "epochs": 1, "code": {"iterations": 2}},
            },
        },
        "train_robust": {
            **common,
            "baseline": baseline,
            "semantics": semantics,
            "output": str(folder / "robust"),
            "attack": {"kind": "single_step"},
            "optimizer": optimizer,
            "run": here,
        },
        "build_bundle": {
            "name": "tints",
            "baseline": baseline,
            "semantics": semantics,
            "robust": str(folder / "robust"),
            "output": str(folder / "bundle"),
            "gaussians": "baseline",
            "selection": "mahalanobis",
        },
        "train_purifier": {
            **common,
            "bundle": str(folder / "bundle"),
            "surrogates": [baseline],
            "output": str(folder / "purifier"),
            "image_size": 16,
            "atoms": 2,
            "network": {"iterations": 1, "stride": 1, "deeper": []},
            "optimizer": optimizer,
            "run": here,
        },
    }


@pytest.fixture
def written(tmp_path, smooth_pixels, encoded, hf_table, write_parquet):
    pixels = smooth_pixels(36, 16, 16, 0) // 2
    pixels[np.arange(36), :, :, np.arange(36) % 3] += 120
    shard = write_parquet(tmp_path / "train.parquet", hf_table([encoded(image) for image in pixels]))
    content = recipe(tmp_path, shard)

    def write(**changes):
        for path, value in changes.items():
            job, _, name = path.partition("__")
            content[job][name] = value
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
        return tmp_path / "recipe.yaml"

    return write


def reasons(path):
    return {planned.stage.job: planned.reason for planned in plan_recipe(path)}


@pytest.mark.ray
def test_stages_run_once_and_a_change_runs_what_depends_on_it(written, tmp_path, ray_local):
    path = written()
    assert set(reasons(path).values()) == {
        "not there yet",
        "its baseline is made anew",
        "its bundle is made anew",
    }
    planned = make_bundle(MakeBundleSettings(recipe=path, dry_run=True))
    assert planned["run now"] == []
    assert not (tmp_path / "baseline").exists()
    assert make_bundle(MakeBundleSettings(recipe=path))["run now"] == JOBS
    assert load_bundle(tmp_path / "bundle").config.reconstruction == "cbpdn"
    trained = load_bundle(tmp_path / "purifier").config
    assert (trained.name, trained.reconstruction) == ("tints", "unrolled")
    assert set(reasons(path).values()) == {None}
    again = make_bundle(MakeBundleSettings(recipe=path))
    assert (again["run now"], again["done before"]) == ([], JOBS)
    # Where a stage runs does not matter to what it makes.
    assert set(reasons(written(train_baseline__run={"workers": 0, "keep": 4})).values()) == {None}
    elsewhere = {"k_max": 1, "task_cpus": 0.5, "task_gpus": 0.0}
    assert set(reasons(written(learn_semantics__elbow=elsewhere)).values()) == {None}
    path = written(train_robust__alpha=0.3)
    assert reasons(path) == {
        "train_baseline": None,
        "learn_semantics": None,
        "train_robust": "made with other settings: alpha",
        "build_bundle": "its robust is made anew",
        "train_purifier": "its bundle is made anew",
    }
    assert make_bundle(MakeBundleSettings(recipe=path))["run now"] == JOBS[2:]
    path = written(build_bundle__name="other")
    assert reasons(path)["build_bundle"] == "made with other settings"
    assert reasons(written(build_bundle__name="tints", train_purifier__atoms=1)) == {
        **dict.fromkeys(JOBS),
        "train_purifier": "made with other settings",
    }
    path = written(train_purifier__atoms=2, train_purifier__surrogates=[str(tmp_path / "robust")])
    assert reasons(path)["train_purifier"] in ("made with other settings", "trained against other surrogates")
    shard = tmp_path / "train.parquet"
    before = shard.read_bytes()
    pq.write_table(pq.read_table(shard).slice(1), shard)
    assert reasons(path)["train_baseline"] == "its shards were changed"
    shard.write_bytes(before)
    assert reasons(path)["train_baseline"] is None
    (tmp_path / "semantics" / "assignments.parquet").write_bytes(b"x")
    assert "was changed" in reasons(path)["learn_semantics"]
    assert reasons(path)["build_bundle"] == "its semantics is made anew"


def test_stages_must_hand_their_folders_on(written, tmp_path):
    with pytest.raises(ConfigError, match=r"train_robust\.semantics is .*elsewhere"):
        plan_recipe(written(train_robust__semantics=str(tmp_path / "elsewhere")))


def test_the_last_stage_may_be_left_out(written):
    path = written()
    content = yaml.safe_load(path.read_text())
    del content["train_purifier"]
    path.write_text(yaml.safe_dump(content))
    assert list(reasons(path)) == JOBS[:-1]


def test_every_stage_has_its_section(written):
    path = written()
    content = yaml.safe_load(path.read_text())
    del content["train_robust"]
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(ConfigError, match="no section train_robust"):
        plan_recipe(path)
