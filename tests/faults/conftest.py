"""A Ray cluster of several nodes on this machine, and drivers that are programs of their own."""

import contextlib
import hashlib
import http.client
import io
import json
import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from moto.backends import get_backend
from moto.server import ThreadedMotoServer
from PIL import Image
from s3fs import S3FileSystem

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

    def add(self) -> None:
        """Add a node like the others."""
        self.nodes.append(self.cluster.add_node(num_cpus=1, object_store_memory=100 * 2**20))

    def drain(self, position: int, seconds: float) -> None:
        """Give a node the notice that a spot machine gets, so many seconds before it goes."""
        from ray._raylet import GcsClient
        from ray.core.generated import autoscaler_pb2

        client = GcsClient(address=self.cluster.address)
        reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
        deadline = int((time.time() + seconds) * 1000)
        node = self.nodes[position].node_id
        accepted, told = client.drain_node(node, reason, "spot notice", deadline)
        assert accepted, told

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


ERRORS = {
    "busy": (503, "SlowDown"),
    "expired": (400, "ExpiredToken"),
    "internal": (500, "InternalError"),
}
HOP = ("connection", "transfer-encoding", "keep-alive", "content-length", "date", "server")


@dataclass
class Weather:
    """How often, and how, requests fail on their way to the store."""

    share: float = 0.0
    seed: int = 0
    dead: bool = False
    counts: dict[str, int] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def draw(self) -> str | None:
        with self.lock:
            self.seed += 1
            generator = random.Random(self.seed)
            deed = None
            if self.dead:
                deed = "busy"
            elif generator.random() < self.share:
                deed = generator.choice(["busy", "expired", "internal", "reset", "lost", "slow"])
            name = deed or "fine"
            self.counts[name] = self.counts.get(name, 0) + 1
            return deed


def proxy_to(port: int, weather: Weather) -> ThreadingHTTPServer:
    """Return a proxy in front of the store that fails as the weather has it."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def pass_on(self) -> None:
            length = int(self.headers.get("Content-Length", 0))
            body = self.rfile.read(length)
            deed = weather.draw()
            if deed == "reset":
                self.close_connection = True
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                self.connection.close()
                return
            if deed in ERRORS:
                status, code = ERRORS[deed]
                text = f"<Error><Code>{code}</Code><Message>told by the test</Message></Error>".encode()
                self.answer(status, [("Content-Type", "application/xml")], text)
                return
            if deed == "slow":
                time.sleep(0.5)
            store = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
            store.request(self.command, self.path, body, dict(self.headers))
            reply = store.getresponse()
            data = reply.read()
            if deed == "lost":
                # The store has done it; its answer never arrives.
                self.close_connection = True
                self.connection.close()
                return
            headers = [(k, v) for k, v in reply.getheaders() if k.lower() not in HOP]
            self.answer(reply.status, headers, data, reply.getheader("Content-Length"))

        def answer(self, status, headers, data, length=None) -> None:
            self.send_response(status)
            for name, value in headers:
                self.send_header(name, value)
            head = self.command == "HEAD"
            self.send_header("Content-Length", (length or "0") if head else str(len(data)))
            self.end_headers()
            if not head:
                self.wfile.write(data)

        def log_message(self, *args) -> None:
            return

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = pass_on

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


@dataclass
class Store:
    """An S3 store behind a proxy."""

    client: object
    weather: Weather
    environment: dict[str, str]

    def upload(self, folder: Path, prefix: str) -> str:
        for path in sorted(folder.iterdir()):
            self.client.put_object(Bucket="corpus", Key=f"{prefix}/{path.name}", Body=path.read_bytes())
        return f"s3://corpus/{prefix}"


@pytest.fixture
def store(monkeypatch) -> Iterator[Store]:
    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    # All servers of a process share one state.
    get_backend("s3").reset()
    _, port = moto.get_host_and_port()
    weather = Weather()
    proxy = proxy_to(port, weather)
    environment = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{proxy.server_port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "very-secret",
        "AWS_DEFAULT_REGION": "eu-central-1",
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    # An instance remembers its endpoint, which was another test's.
    S3FileSystem.clear_instance_cache()
    client = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{port}", region_name="eu-central-1")
    place = {"LocationConstraint": "eu-central-1"}
    client.create_bucket(Bucket="corpus", CreateBucketConfiguration=place)
    yield Store(client, weather, environment)
    proxy.shutdown()
    moto.stop()


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
    from acsr_ray.distributed.purify import purify_corpus
    from acsr_ray.distributed.purify_settings import PurifyCorpusSettings

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

    def wait(self, seconds: float = 400) -> int:
        """Wait for the end and return the exit code."""
        return self.process.wait(seconds)

    def told(self) -> str:
        """Return what it printed and logged."""
        return self.log.read_text()

    def until(self, condition: Callable[[], bool], seconds: float = 300) -> None:
        """Wait until something holds, while the job lives."""
        ends = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, f"it ended first:\n{self.told()}"
            assert time.monotonic() < ends, f"it took too long:\n{self.told()}"
            time.sleep(0.02)


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
