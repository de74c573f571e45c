"""Row 32: one job for a long time, from S3 to S3, with faults at random; nothing lost, doubled or leaked.

ACSR_SOAK_MINUTES=30 ACSR_SOAK_SEED=1 python -m pytest -m slow tests/faults/test_soak.py -s
"""

import contextlib
import hashlib
import io
import os
import random
import signal
import time
from collections import Counter

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from acsr_ray.corpus.ledger import Ledger

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(7200)]

MINUTES = float(os.environ.get("ACSR_SOAK_MINUTES", "2"))
SEED = int(os.environ.get("ACSR_SOAK_SEED", str(time.time_ns() % 10**6)))
BASE, SHARD_ROWS, SHARDS = 300, 100, 4000
KILLER, ODD = 300, 301
"""Images that bring their worker down each time, and that the purifier raises on."""
STORAGE_DEADLINE_S = "60"


def numbers(shard):
    """Return which base image each row of a shard is."""
    generator = random.Random(shard)
    found = [generator.randrange(BASE) for _ in range(SHARD_ROWS)]
    if shard % 150 == 20:
        found[generator.randrange(SHARD_ROWS)] = KILLER
    if shard % 40 == 10:
        found[generator.randrange(SHARD_ROWS)] = ODD
    return found


def table_of(shard, cells):
    keys = [f"{shard}-{row}" for row in range(SHARD_ROWS)]
    images = pa.array([cells[number] for number in numbers(shard)], cells.type)
    return pa.table({"image_id": keys, "image": images})


class Faults:
    """Does one thing after another to a job, its workers, its nodes and its store."""

    def __init__(self, generator, nodes, store, folder):
        self.generator, self.nodes, self.store, self.folder = generator, nodes, store, str(folder)
        self.done: Counter[str] = Counter()

    def next(self):
        deed = self.generator.choice(["worker", "worker", "stop", "stop", "node", "storm", "calm"])
        getattr(self, deed)()
        self.done[deed] += 1

    def workers(self):
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                # Other tests may have workers too.
                own = process.environ().get("ACSR_COUNTER", "").startswith(self.folder)
                if own and " ".join(process.cmdline()).startswith("ray::MapWorker"):
                    found.append(process)
        return found

    def worker(self):
        workers = self.workers()
        if workers:
            with contextlib.suppress(psutil.Error):
                self.generator.choice(workers).kill()

    def stop(self):
        """Stop a worker, a zombie in the making, and wake it after a while."""
        workers = self.workers()
        if not workers:
            return
        with contextlib.suppress(psutil.Error):
            victim = self.generator.choice(workers)
            victim.send_signal(signal.SIGSTOP)
            time.sleep(self.generator.uniform(1, 6))
            victim.send_signal(signal.SIGCONT)

    def node(self):
        position = self.generator.randrange(len(self.nodes.nodes))
        self.nodes.kill(position)
        del self.nodes.nodes[position]
        self.nodes.add()

    def storm(self):
        self.store.weather.share = self.generator.uniform(0.05, 0.2)

    def calm(self):
        self.store.weather.share = 0.0


def memory_of(process):
    memory = process.memory_full_info()
    return memory.uss / 2**20


def check(output, expected, shards):
    """Check that all rows of these shards are there once and as expected; return how many."""
    ledger = Ledger(output)
    snapshot = ledger.snapshot()
    assert ledger.published() == snapshot.names()
    found = {}
    for receipt in snapshot.receipts():
        data = ledger.storage.read(f"data/{receipt.name}")
        assert hashlib.sha256(data).hexdigest() == receipt.digest
        for row in pq.read_table(io.BytesIO(data)).to_pylist():
            assert row["image_id"] not in found, "doubled"
            image = row["image"]
            found[row["image_id"]] = (
                hashlib.sha256(image["bytes"]).hexdigest() if image else row["acsr_reason"]
            )
    wanted = {}
    for shard in shards:
        for row, number in enumerate(numbers(shard)):
            bad = {KILLER: "worker_crash", ODD: "stage_error"}
            wanted[f"{shard}-{row}"] = bad.get(number) or expected[f"id-{number}"]
    lost = wanted.keys() - found.keys()
    other = [key for key in wanted.keys() & found.keys() if wanted[key] != found[key]]
    print(f"rows {len(wanted)}, lost {len(lost)}, other than without faults {len(other)}")
    assert found == wanted
    return len(found)


def test_a_long_job_with_faults_at_random(
    start_nodes, start_purify, store, corpus, oracle, make_table, tmp_path, monkeypatch
):
    generator = random.Random(SEED)
    images = make_table(range(BASE + 2))["image"].combine_chunks()
    client = store.client
    uploaded = min(SHARDS, int(60 + 130 * MINUTES))
    for shard in range(uploaded):
        buffer = io.BytesIO()
        pq.write_table(table_of(shard, images), buffer)
        client.put_object(Bucket="corpus", Key=f"in/part-{shard:05d}.parquet", Body=buffer.getvalue())
    output = "s3://corpus/out"
    nodes = start_nodes()
    job = start_purify(
        "s3://corpus/in",
        output,
        address=nodes.cluster.address,
        faults={"rows": {str(KILLER): "exit", str(ODD): "error"}},
        environment={**store.environment, "ACSR_STORAGE_DEADLINE_S": STORAGE_DEADLINE_S},
        unit_rows=100,
        wave_units=200,
        stage_timeout_s=60,
        ray={"actors": 2},
    )
    driver = psutil.Process(job.process.pid)
    faults, samples = Faults(generator, nodes, store, tmp_path), []
    began = time.monotonic()
    next_fault = began + 45
    while time.monotonic() - began < 60 * MINUTES and job.process.poll() is None:
        time.sleep(2)
        with contextlib.suppress(psutil.Error):
            samples.append((time.monotonic() - began, memory_of(driver)))
        if time.monotonic() > next_fault:
            faults.next()
            next_fault = time.monotonic() + generator.uniform(5, 20)
    store.weather.share = 0.0
    ended_itself = job.process.poll() is not None
    if not ended_itself:
        job.process.send_signal(signal.SIGTERM)
    code = job.wait(120)
    assert code == (0 if ended_itself else 75), job.told()[-3000:]
    # What was not begun goes, so that the last, quiet run has an end.
    reached = {name.split(".")[0] for name in Ledger(output).finished()}
    kept = [shard for shard in range(uploaded) if f"part-{shard:05d}" in reached]
    for shard in set(range(uploaded)) - set(kept):
        client.delete_object(Bucket="corpus", Key=f"in/part-{shard:05d}.parquet")
    again = start_purify(
        "s3://corpus/in",
        output,
        address=nodes.cluster.address,
        faults={"rows": {str(KILLER): "exit", str(ODD): "error"}},
        environment=store.environment,
        unit_rows=100,
        wave_units=200,
        stage_timeout_s=60,
        ray={"actors": 2},
    )
    assert again.wait(1200) == 0, again.told()[-3000:]
    rows = check(output, oracle.images, kept)
    late = [(at / 60, size) for at, size in samples if at > 60 * MINUTES / 3]
    slope = float(np.polyfit(*zip(*late, strict=True), 1)[0])
    print(f"seed {SEED}, {MINUTES:g} minutes, {rows} rows, faults {dict(faults.done)}")
    print(f"requests {store.weather.counts}")
    print(f"driver {late[0][1]:.0f} to {late[-1][1]:.0f} MiB, slope {slope:+.2f} MiB a minute")
    assert slope < 2.0 or MINUTES < 10
