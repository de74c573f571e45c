"""A Ray cluster of several nodes on this machine, and drivers that are programs of their own."""

import contextlib
import hashlib
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from acsr_ray.columns import STATUS
from acsr_ray.corpus.ledger import Ledger

DRIVERS = Path(__file__).parent / "drivers"
ENVIRONMENT = {"RAY_worker_niceness": "0", "OMP_NUM_THREADS": "1"}


@dataclass
class Nodes:
    """A head without CPUs and GPUs, and two nodes."""

    cluster: Any
    nodes: list[Any]

    def kill(self, position: int) -> None:
        """SIGKILL all processes of a node."""
        self.cluster.remove_node(self.nodes[position], allow_graceful=False)

    def start(self, driver: str, *arguments: object, **environment: str) -> subprocess.Popen[str]:
        """Start a driver of `drivers/` on the cluster."""
        return subprocess.Popen(
            [sys.executable, str(DRIVERS / driver), *map(str, arguments)],
            env={
                **os.environ,
                **ENVIRONMENT,
                **environment,
                "RAY_ADDRESS": self.cluster.address,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )


@pytest.fixture
def start_nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Nodes]]:
    """Start a cluster; it is stopped after the test."""
    from ray.cluster_utils import Cluster

    started = []

    def start(*, cpus: int = 1, gpus: int = 0, dashboard: bool = False, **environment: str) -> Nodes:
        for name, value in {**ENVIRONMENT, **environment}.items():
            monkeypatch.setenv(name, value)
        memory = {"object_store_memory": 100 * 2**20}
        head = {"num_cpus": 0, "num_gpus": 0, "include_dashboard": dashboard, **memory}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        started.append(cluster)
        nodes = [cluster.add_node(num_cpus=cpus, num_gpus=gpus, **memory) for _ in range(2)]
        return Nodes(cluster, nodes)

    yield start
    for cluster in started:
        cluster.shutdown()


SHARDS, SHARD_ROWS, SIDE = 12, 25, 16
IMAGE_TYPE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def draw(number: int) -> bytes:
    """Return a PNG whose first pixel tells its number, which is how faults find it in a worker."""
    generator = np.random.default_rng(number)
    coarse = generator.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    pixels = coarse.repeat(SIDE // 4, axis=0).repeat(SIDE // 4, axis=1)
    pixels[0, 0] = number % 256, number // 256, 0
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def shard_table(numbers: range) -> pa.Table:
    """Return images with their numbers as ids."""
    cells = [{"bytes": draw(number), "path": f"{number}.png"} for number in numbers]
    return pa.table(
        {
            "image_id": pa.array([f"id-{number}" for number in numbers]),
            "image": pa.array(cells, IMAGE_TYPE),
        }
    )


def write_corpus(folder: Path, shards: int = SHARDS, rows: int = SHARD_ROWS) -> Path:
    """Write `shards` shards of `rows` images, numbered on."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(shards):
        table = shard_table(range(number * rows, (number + 1) * rows))
        pq.write_table(table, folder / f"part-{number:02d}.parquet")
    return folder


@dataclass(frozen=True)
class Oracle:
    """What a fault-free run gives: id -> digest of the purified image."""

    images: dict[str, str]

    def check(self, output: str | Path, quarantined: dict[str, str] | None = None) -> None:
        """Check that an output is that of a fault-free run, apart from rows that have to be quarantined."""
        ledger = Ledger(str(output))
        snapshot = ledger.snapshot()
        assert ledger.published() == snapshot.names(), "what is visible is what the snapshot lists"
        quarantined = quarantined or {}
        found: dict[str, str] = {}
        for receipt in snapshot.receipts():
            data = ledger.storage.read(f"data/{receipt.name}")
            assert hashlib.sha256(data).hexdigest() == receipt.digest
            for row in pq.read_table(io.BytesIO(data)).to_pylist():
                key = row["image_id"]
                assert key not in found, f"{key} is there twice"
                if row["image"] is None:
                    assert row[STATUS] == "quarantined"
                    found[key] = row["acsr_reason"]
                else:
                    found[key] = hashlib.sha256(row["image"]["bytes"]).hexdigest()
        assert found == self.images | quarantined
        private = ledger.storage.names("_acsr")
        left = [name for name in private if name.split("/")[0] in ("staging", "ready", "attempts")]
        assert not left, "a finished run leaves nothing half done"


def digests(output: Path) -> dict[str, str]:
    """Return the digest of every image of an output, by id."""
    found = {}
    for path in sorted((output / "data").rglob("*.parquet")):
        for row in pq.read_table(path).to_pylist():
            found[row["image_id"]] = hashlib.sha256(row["image"]["bytes"]).hexdigest()
    return found


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 images in 12 shards."""
    return write_corpus(tmp_path_factory.mktemp("faults") / "in")


@pytest.fixture(scope="session")
def make_corpus() -> Callable[..., Path]:
    return write_corpus


@pytest.fixture(scope="session")
def make_table() -> Callable[[range], pa.Table]:
    return shard_table


@pytest.fixture(scope="session")
def purify(tiny_bundle: Path) -> Callable[..., dict[str, Any]]:
    """Purify in this process."""
    from acsr_ray.distributed.purify import PurifyCorpusSettings, purify_corpus

    def run(source: Path | str, output: Path | str, **changes: Any) -> dict[str, Any]:
        fields = {"input": str(source), "output": str(output), "bundle": str(tiny_bundle), **changes}
        return purify_corpus(PurifyCorpusSettings.model_validate(fields))

    return run


@pytest.fixture(scope="session")
def oracle(
    corpus: Path, purify: Callable[..., dict[str, Any]], ray_local: None, tmp_path_factory: Any
) -> Oracle:
    """The fault-free run."""
    output = tmp_path_factory.mktemp("oracle") / "out"
    purify(corpus, output)
    return Oracle(digests(output))


@dataclass
class Job:
    """A purification in a process of its own."""

    process: subprocess.Popen[str]
    log: Path

    def wait(self, seconds: float = 240) -> int:
        """Wait for the end and return the exit code."""
        return self.process.wait(seconds)

    def told(self) -> str:
        """Return what it printed and logged."""
        return self.log.read_text()

    def until(self, condition: Callable[[], bool], seconds: float = 120) -> None:
        """Wait until something holds, while the job lives."""
        ends = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, f"it ended first:\n{self.told()}"
            assert time.monotonic() < ends, f"it took too long:\n{self.told()}"
            time.sleep(0.02)

    def workers(self, name: str) -> list[psutil.Process]:
        """Return the worker processes of this job, or of its cluster, whose title names a stage."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                title = " ".join(process.cmdline()) or process.name()
                if title.startswith("ray::") and name in title:
                    found.append(process)
        return found


@pytest.fixture
def start_purify(tiny_bundle: Path, tmp_path: Path) -> Iterator[Callable[..., Job]]:
    """Start a purification as a process of its own, with faults."""
    started: list[Job] = []

    def start(
        source: Path | str,
        output: Path | str,
        *,
        faults: dict[str, Any] | None = None,
        address: str | None = None,
        environment: dict[str, str] | None = None,
        **changes: Any,
    ) -> Job:
        settings = {
            "input": str(source),
            "output": str(output),
            "bundle": str(tiny_bundle),
            "unit_rows": 5,
            "ray": {"actors": 1},
            **changes,
        }
        number = len(started)
        log = tmp_path / f"job-{number}.log"
        surroundings = {
            **os.environ,
            **ENVIRONMENT,
            "ACSR_FAULTS": json.dumps(faults or {}),
            "ACSR_COUNTER": str(tmp_path / f"counter-{number}"),
            **(environment or {}),
        }
        surroundings.pop("RAY_ADDRESS", None)
        if address:
            surroundings["RAY_ADDRESS"] = address
        with log.open("w") as file:
            process = subprocess.Popen(
                [sys.executable, str(DRIVERS / "purify.py"), json.dumps(settings)],
                env=surroundings,
                stdout=file,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
        job = Job(process, log)
        started.append(job)
        return job

    yield start
    for job in started:
        # Its local Ray is in the same session, and ends with it.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(job.process.pid, 9)
        job.process.wait()
