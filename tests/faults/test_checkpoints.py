"""Row 26 of the fault matrix: a rank, or a node, dies while a checkpoint is written."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]

DRIVER = Path(__file__).parent / "drivers" / "train_heavy.py"
MEGABYTES = 400


def start(shard, output, workers):
    environment = {**os.environ, "RAY_worker_niceness": "0", "PYTHONPATH": str(DRIVER.parent)}
    return subprocess.Popen(
        [sys.executable, str(DRIVER), str(shard), str(output), str(workers), str(MEGABYTES), "0.5"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finished(job):
    out, err = job.communicate(timeout=300)
    assert job.returncode == 0, err
    return json.loads(out.splitlines()[-1]), err


def half_written(storage):
    """Return the checkpoints that have begun to arrive and are not whole."""
    found = []
    for folder in storage.glob("heavy/checkpoint_*"):
        state = folder / "state.safetensors"
        whole = state.exists() and state.stat().st_size > MEGABYTES * 2**20
        if not (whole and (folder / "manifest.json").exists()):
            found.append(folder)
    return found


def wait_for_a_second_checkpoint(job, storage):
    """Wait until the first whole checkpoint is there, and another one is on its way."""
    ends = time.monotonic() + 200
    while not (half_written(storage) and len(list(storage.glob("heavy/checkpoint_*"))) > 1):
        assert job.poll() is None, job.communicate()
        assert time.monotonic() < ends
        time.sleep(0.002)


def ranks(driver):
    return [
        process
        for process in psutil.Process(driver).children(recursive=True)
        if "RayTrainWorker" in " ".join(process.cmdline())
    ]


def test_a_rank_killed_while_a_checkpoint_is_written_goes_on_from_the_one_before(write_shard, tmp_path):
    shard = write_shard(tmp_path / "shard.parquet", 128, 16)
    expected, _ = finished(start(shard, tmp_path / "alone" / "model", 0))
    job = start(shard, tmp_path / "killed" / "model", 2)
    storage = tmp_path / "killed" / ".runs"
    wait_for_a_second_checkpoint(job, storage)
    victims = ranks(job.pid)
    for process in victims:
        process.send_signal(signal.SIGKILL)
    time.sleep(0.2)
    assert len(victims) == 2
    torn = half_written(storage)
    assert torn, "the checkpoint was finished before the kill"
    metrics, log = finished(job)
    assert metrics["epoch_losses"] == pytest.approx(expected["epoch_losses"], rel=1e-3)
    assert "going on at" in log


def test_a_lost_node_is_followed_by_another_and_training_goes_on(start_nodes, write_shard, tmp_path):
    shard = write_shard(tmp_path / "shard.parquet", 128, 16)
    expected, _ = finished(start(shard, tmp_path / "alone" / "model", 0))
    nodes = start_nodes(PYTHONPATH=os.pathsep.join([str(DRIVER.parent), os.environ.get("PYTHONPATH", "")]))
    # More than half a CPU for each of two workers: one is on each node.
    job = nodes.start(DRIVER.name, shard, tmp_path / "killed" / "model", 2, MEGABYTES, 0.6)
    wait_for_a_second_checkpoint(job, tmp_path / "killed" / ".runs")
    nodes.kill(0)
    nodes.add()
    metrics, log = finished(job)
    assert metrics["epoch_losses"] == pytest.approx(expected["epoch_losses"], rel=1e-3)
    assert "going on at" in log
