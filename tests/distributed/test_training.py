"""Training on Ray: the same run for one worker and two, and through kills."""

import json

import numpy as np
import pytest

from acsr_ray.artifacts import load_tensors
from acsr_ray.distributed.runtime import RaySettings
from acsr_ray.distributed.training import TrainTargetSettings, train_target
from acsr_ray.training.loop import OptimizerConfig
from acsr_ray.training.settings import RunSettings

pytestmark = pytest.mark.ray

SIDE = 32
SCHEDULE = OptimizerConfig(epochs=3, batch_size=24, peak_lr=0.02, crop_padding=2)


@pytest.fixture(scope="module")
def shards(tmp_path_factory, smooth_pixels, encoded, hf_table, write_parquet):
    """Return training and validation shards; class k is brighter in channel k than in the others."""
    folder = tmp_path_factory.mktemp("tints")

    def write(name, count, seed):
        pixels = smooth_pixels(count, SIDE, SIDE, seed) // 2
        pixels[np.arange(count), :, :, np.arange(count) % 3] += 60
        return str(write_parquet(folder / name, hf_table([encoded(image) for image in pixels])))

    return write("train.parquet", 240, 0), write("val.parquet", 60, 1)


def settings(shards, output, workers, **changes):
    values = {
        "train": (shards[0],),
        "validation": (shards[1],),
        "output": output,
        "architecture": "small_cnn",
        "image_size": SIDE,
        "optimizer": SCHEDULE,
        "device": "cpu",
        "run": RunSettings(
            workers=workers, lanes=4, window_rows=64, threads=1, cpus_per_worker=0.5, **changes
        ),
        "ray": RaySettings(object_store_megabytes=100),
    }
    return TrainTargetSettings(**values)


@pytest.fixture(scope="module")
def alone(shards, tmp_path_factory):
    """The run in this process."""
    output = tmp_path_factory.mktemp("alone") / "target"
    return train_target(settings(shards, output, 0)), output


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_make_the_run_of_one_process(workers, alone, shards, tmp_path, ray_local):
    metrics, output = alone
    found = train_target(settings(shards, tmp_path / "target", workers))
    assert found["validation_accuracy"] == pytest.approx(metrics["validation_accuracy"], abs=0.04)
    assert len(found["epoch_losses"]) == 3
    assert found["epoch_losses"] == pytest.approx(metrics["epoch_losses"], rel=1e-3)
    weights, expected = (load_tensors(folder / "weights.safetensors") for folder in (tmp_path / "target", output))
    assert weights.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_allclose(weights[name], tensor, atol=2e-3, err_msg=name)
    manifest = json.loads((tmp_path / "target" / "manifest.json").read_text())
    assert manifest["metrics"]["train_images"] == 240
