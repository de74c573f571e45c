"""Dictionary tasks: each result kept on arrival, finished ones skipped, a failure names its cluster."""

import numpy as np
import pytest
import torch

from acsr_ray.artifacts import load_tensors
from acsr_ray.distributed.dictionaries import (
    ClusterImages,
    DictionaryConfig,
    DictionaryError,
    learn_dictionaries,
)

pytestmark = pytest.mark.ray

CLUSTERS = [ClusterImages(0, k, tuple((f"shard-{k}", row) for row in range(3 + k))) for k in range(4)]


def fake_learner(failing: str | None):
    """A dictionary that tells what it was learnt from, in place of the minutes that a real one takes."""

    def learn(rows, config, seed, device):
        if rows[0][0] == failing:
            raise ValueError("no image has sides of at least 8 pixels")
        return np.full((2, 3, 4, 4), float(len(rows)), np.float32), (2.0, 1.0)

    return learn


def learn(directory, config, failing=None, clusters=CLUSTERS):
    return learn_dictionaries(
        clusters, config, directory, seed=0, max_in_flight=2, learn=fake_learner(failing)
    )


def test_results_are_saved_in_order_and_a_rerun_learns_nothing(tmp_path, ray_local):
    config = DictionaryConfig(task_cpus=0.5)
    paths = learn(tmp_path, config)
    assert [load_tensors(path)["atoms"][0, 0, 0, 0].item() for path in paths] == [3, 4, 5, 6]
    stamps = [path.stat().st_mtime_ns for path in paths]
    assert learn(tmp_path, config.model_copy(update={"task_cpus": 0.25})) == paths
    assert [path.stat().st_mtime_ns for path in paths] == stamps


def test_a_changed_cluster_or_setting_is_relearnt_alone(tmp_path, ray_local):
    config = DictionaryConfig(task_cpus=0.5)
    before = learn(tmp_path, config)
    grown = [*CLUSTERS[:3], ClusterImages(0, 3, (*CLUSTERS[3].rows, ("shard-3", 99)))]
    after = learn(tmp_path, config, clusters=grown)
    assert after[:3] == before[:3]
    assert after[3] != before[3]
    assert set(learn(tmp_path, config.model_copy(update={"images": 2}))).isdisjoint(before)


def test_one_failure_names_its_cluster_and_keeps_the_others(tmp_path, ray_local):
    config = DictionaryConfig(task_cpus=0.5)
    with pytest.raises(DictionaryError, match=r"class 0 cluster 2: .*sides of at least"):
        learn(tmp_path, config, failing="shard-2")
    kept = {path.name for path in tmp_path.glob("*.safetensors")}
    assert len(kept) == 3
    stamps = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.safetensors")}
    paths = learn(tmp_path, config)
    assert len({path.name for path in paths} - kept) == 1
    assert all((tmp_path / name).stat().st_mtime_ns == stamp for name, stamp in stamps.items())


def test_sampling_is_seeded_and_bounded(tmp_path, ray_local):
    many = [ClusterImages(1, 0, tuple(("shard", row) for row in range(50)))]

    def rows_learnt(rows, config, seed, device):
        return np.array([row for _, row in rows], np.float32).reshape(-1, 1, 1, 1), (1.0,)

    config = DictionaryConfig(images=10, task_cpus=0.5)
    for directory in ("a", "b"):
        learn_dictionaries(many, config, tmp_path / directory, seed=3, max_in_flight=1, learn=rows_learnt)
    first, second = (
        load_tensors(next((tmp_path / directory).glob("*.safetensors")))["atoms"].flatten()
        for directory in ("a", "b")
    )
    assert torch.equal(first, second)
    assert len(first.unique()) == 10
