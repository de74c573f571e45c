"""Training on Ray: the same run for one worker and two, and through kills."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import torch

from acsr_ray.artifacts import artifact_digest, begin_artifact, finish_artifact, load_tensors, save_tensors
from acsr_ray.clustering.assignments import ASSIGNMENTS, GAUSSIANS, Assignments
from acsr_ray.clustering.gaussians import fit_gaussians
from acsr_ray.corpus.labelled import parquet_shards
from acsr_ray.distributed.runtime import RaySettings
from acsr_ray.distributed.training import (
    TrainBaselineSettings,
    TrainRobustSettings,
    TrainTargetSettings,
    train_baseline,
    train_robust,
    train_target,
)
from acsr_ray.training.loop import OptimizerConfig
from acsr_ray.training.objectives import InnerAttack
from acsr_ray.training.settings import RunSettings

pytestmark = pytest.mark.ray

JOB = Path(__file__).parents[2] / "jobs" / "train_target.py"

SIDE = 32
SCHEDULE = OptimizerConfig(epochs=3, batch_size=24, peak_lr=0.02, crop_padding=2, lanes=4, shuffle_rows=64)


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
        "run": RunSettings(workers=workers, threads=1, cpus_per_worker=0.5, **changes),
        "ray": RaySettings(object_store_megabytes=100),
    }
    return TrainTargetSettings(**values)


@pytest.fixture(scope="module")
def alone(shards, tmp_path_factory):
    """The run in this process."""
    output = tmp_path_factory.mktemp("alone") / "target"
    return train_target(settings(shards, output, 0)), output


@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_workers_make_the_run_of_one_process(workers, alone, shards, tmp_path, ray_local, monkeypatch):
    metrics, output = alone
    # Paths are those of the job, wherever Ray puts its workers.
    monkeypatch.chdir(Path(shards[0]).parent)
    names = [Path(shard).name for shard in shards]
    found = train_target(settings(names, tmp_path / "target", workers))
    assert found["validation_accuracy"] == pytest.approx(metrics["validation_accuracy"], abs=0.04)
    assert len(found["epoch_losses"]) == 3
    assert found["epoch_losses"] == pytest.approx(metrics["epoch_losses"], rel=1e-3)
    weights, expected = (
        load_tensors(folder / "weights.safetensors") for folder in (tmp_path / "target", output)
    )
    assert weights.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_allclose(weights[name], tensor, atol=2e-3, err_msg=name)
    manifest = json.loads((tmp_path / "target" / "manifest.json").read_text())
    assert manifest["metrics"]["train_images"] == 240
    (events,) = (tmp_path / ".runs").glob("*/tensorboard/events*")
    assert events.read_bytes().count(b"images_per_second") == 3


@pytest.mark.slow
def test_checkpoints_go_to_any_uri_and_a_finished_run_is_not_made_again(alone, shards, tmp_path, ray_local):
    metrics, _ = alone
    storage = tmp_path / "elsewhere"
    options = {"storage": storage.as_uri(), "name": "mine"}
    first = train_target(settings(shards, tmp_path / "a" / "target", 1, **options))
    assert first["epoch_losses"] == pytest.approx(metrics["epoch_losses"], rel=1e-3)
    saved = sorted(storage.glob("mine/checkpoint_*/state.safetensors"))
    assert saved
    assert not (tmp_path / "a" / ".runs").exists()
    # The same name: the weights come from the closing checkpoint, without a step.
    again = train_target(settings(shards, tmp_path / "b" / "target", 1, **options))
    assert again == first
    assert sorted(storage.glob("mine/checkpoint_*/state.safetensors")) == saved
    # Other images to measure on are measured, without training.
    other = settings(shards, tmp_path / "b" / "target", 1, **options)
    other = other.model_copy(update={"validation": (shards[0],)})
    assert train_target(other)["validation_images"] == 240
    assert len(sorted(storage.glob("mine/checkpoint_*"))) <= len(saved) + 1
    weights = [load_tensors(tmp_path / name / "target" / "weights.safetensors") for name in "ab"]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    # Other settings under the same name begin anew.
    shorter = settings(shards, tmp_path / "c" / "target", 1, **options)
    shorter = shorter.model_copy(update={"optimizer": SCHEDULE.model_copy(update={"epochs": 1})})
    assert len(train_target(shorter)["epoch_losses"]) == 1


@pytest.mark.slow
def test_rst_on_two_workers_is_that_of_one_process(shards, tmp_path, ray_local):
    """GroupNorm, so that no worker's batch statistics enter; every image has its cluster on every worker."""
    common = {"train": (shards[0],), "validation": (shards[1],), "device": "cpu"}
    train_baseline(
        TrainBaselineSettings(
            **common,
            output=tmp_path / "baseline",
            architecture="wrn-10-1-gn",
            image_size=16,
            optimizer=SCHEDULE.model_copy(update={"epochs": 1}),
            run=RunSettings(workers=0),
        )
    )
    rng = np.random.default_rng(0)
    cluster_id = rng.integers(0, 2, 240).astype(np.int32)
    labels = pq.read_table(shards[0])["label"].to_numpy()
    semantics = tmp_path / "semantics"
    begin_artifact(semantics)
    (uri,) = parquet_shards([shards[0]])
    Assignments([uri] * 240, np.arange(240), labels, cluster_id).save(semantics / ASSIGNMENTS)
    latents = np.abs(rng.standard_normal((240, 64))) + labels[:, None]
    save_tensors(semantics / GAUSSIANS, fit_gaussians(latents, labels, cluster_id).pack())
    content = {"baseline_digest": artifact_digest(tmp_path / "baseline")}
    finish_artifact(semantics, "semantics", [ASSIGNMENTS, GAUSSIANS], content)
    found = {}
    for name, workers, alpha in (("one", 0, 0.3), ("two", 2, 0.3), ("plain", 0, 0.0)):
        found[name] = train_robust(
            TrainRobustSettings(
                **common,
                baseline=tmp_path / "baseline",
                semantics=semantics,
                output=tmp_path / name,
                attack=InnerAttack(steps=2),
                alpha=alpha,
                optimizer=SCHEDULE.model_copy(update={"epochs": 2}),
                run=RunSettings(workers=workers, threads=1, cpus_per_worker=0.5),
            )
        )["epoch_losses"]
    assert found["two"] == pytest.approx(found["one"], rel=1e-3)
    # The term is there: without it the loss is another one.
    assert found["one"] != pytest.approx(found["plain"], rel=1e-2)


def train_processes(driver: int) -> list[psutil.Process]:
    """Return the training workers that a driver's local Ray has started."""
    found = []
    for process in psutil.Process(driver).children(recursive=True):
        try:
            if "RayTrainWorker" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def start(shards, output, **options):
    """Start the job as a program and return its process."""
    arguments = [
        *("--train", shards[0], "--validation", shards[1], "--output", str(output)),
        *("--architecture", "small_cnn", "--image-size", str(SIDE), "--device", "cpu"),
        *("--optimizer.epochs", "3", "--optimizer.batch-size", "24", "--optimizer.peak-lr", "0.02"),
        *("--optimizer.crop-padding", "2", "--run.workers", "2", "--optimizer.lanes", "4"),
        *("--optimizer.shuffle-rows", "64", "--run.threads", "1", "--run.cpus-per-worker", "0.5"),
        *("--run.checkpoint-steps", "2", "--ray.object-store-megabytes", "100"),
        *(f"--run.{name.replace('_', '-')}={value}" for name, value in options.items()),
    ]
    environment = {**os.environ, "RAY_worker_niceness": "0"}
    return subprocess.Popen([sys.executable, str(JOB), *arguments], env=environment, stderr=subprocess.PIPE)


def wait_for(condition, seconds=120):
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        if found := condition():
            return found
        time.sleep(0.05)
    raise TimeoutError


def checkpoints(output):
    """Return the checkpoints that Ray Train knows of, oldest first; others on disk were never finished."""
    for snapshot in (output.parent / ".runs").glob("*/checkpoint_manager_snapshot.json"):
        with contextlib.suppress(json.JSONDecodeError):
            results = json.loads(snapshot.read_text())["checkpoint_results"]
            return [snapshot.parent / result["checkpoint_dir_name"] for result in results]
    return []


def went_on(log):
    """Return how many steps the last restart of a job did not make again; an epoch has ten."""
    epoch, step = re.findall(rb"going on at epoch (\d+), step (\d+)", log)[-1]
    return 10 * (int(epoch) - 1) + int(step) - 1


@pytest.mark.slow
def test_a_killed_worker_costs_the_steps_since_the_last_checkpoint_and_no_more(alone, shards, tmp_path):
    metrics, _ = alone
    output = tmp_path / "target"
    job = start(shards, output)
    wait_for(lambda: checkpoints(output))
    os.kill(train_processes(job.pid)[-1].pid, signal.SIGKILL)
    _, log = job.communicate(timeout=240)
    assert job.returncode == 0, log.decode()
    assert went_on(log) > 0
    found = json.loads((output / "manifest.json").read_text())["metrics"]
    assert found["epoch_losses"] == pytest.approx(metrics["epoch_losses"], rel=1e-3)
    assert found["validation_accuracy"] == pytest.approx(metrics["validation_accuracy"], abs=0.04)


@pytest.mark.slow
def test_a_killed_driver_goes_on_and_passes_over_a_damaged_checkpoint(alone, shards, tmp_path):
    metrics, _ = alone
    output = tmp_path / "target"
    job = start(shards, output)
    wait_for(lambda: len(checkpoints(output)) > 1)
    family = psutil.Process(job.pid).children(recursive=True)
    for process in [psutil.Process(job.pid), *family]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    job.communicate()
    newest = checkpoints(output)[-1] / "state.safetensors"
    newest.write_bytes(newest.read_bytes()[:1000])
    job = start(shards, output)
    _, log = job.communicate(timeout=240)
    assert job.returncode == 0, log.decode()
    assert b"is passed over" in log
    assert went_on(log) > 0
    found = json.loads((output / "manifest.json").read_text())["metrics"]
    assert found["epoch_losses"] == pytest.approx(metrics["epoch_losses"], rel=1e-3)
