"""Row 9: an S3 store that answers 503, breaks off, is slow or knows no credentials, a fifth of the time."""

import http.client
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import boto3
import pyarrow.parquet as pq
import pytest
from moto.backends import get_backend
from moto.server import ThreadedMotoServer
from s3fs import S3FileSystem

from acsr_ray.corpus.ledger import Ledger
from acsr_ray.storage import open_storage

DRIVERS = Path(__file__).parent / "drivers"
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


def publish(source, output, **environment):
    command = [sys.executable, str(DRIVERS / "publish.py"), source, output]
    surroundings = {**os.environ, "ACSR_FAULTS": "{}", "ACSR_COUNTER": os.devnull, **environment}
    return subprocess.Popen(
        command, env=surroundings, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def rows_of(output):
    ledger = Ledger(output)
    assert ledger.published() == ledger.snapshot().names()
    found = {}
    for name in sorted(ledger.published()):
        import io

        for row in pq.read_table(io.BytesIO(ledger.storage.read(f"data/{name}"))).to_pylist():
            assert row["image_id"] not in found
            found[row["image_id"]] = row["image"] and row["image"]["bytes"]
    return found


def test_objects_are_created_once_and_never_replaced(store):
    storage = open_storage("s3://corpus/out")
    assert storage.create("a/b", b"one")
    assert not storage.create("a/b", b"two")
    assert storage.read("a/b") == b"one"
    storage.write("a/b", b"three")
    storage.create("c", b"four")
    storage.move("c", "d")
    assert storage.names("") == {"a/b": 5, "d": 4}
    storage.remove("d")
    storage.remove("d")
    with pytest.raises(FileNotFoundError):
        storage.read("d")


def test_a_night_in_bad_weather_loses_and_doubles_nothing(store, make_corpus, tmp_path):
    source = store.upload(make_corpus(tmp_path / "in", 4, 25), "in")
    quiet = publish(source, "s3://corpus/quiet")
    assert quiet.wait(60) == 0, quiet.stderr.read()
    expected = rows_of("s3://corpus/quiet")
    assert len(expected) == 100
    store.weather.share = 0.2
    stormy = publish(source, "s3://corpus/stormy")
    _, err = stormy.communicate(timeout=200)
    assert stormy.returncode == 0, err
    store.weather.share = 0
    assert store.weather.counts["fine"] > 40
    assert sum(count for name, count in store.weather.counts.items() if name != "fine") > 10
    assert rows_of("s3://corpus/stormy") == expected
    assert "very-secret" not in err


def test_a_store_that_is_gone_stops_the_job_and_a_later_one_ends_it(store, make_corpus, tmp_path):
    source = store.upload(make_corpus(tmp_path / "in", 4, 25), "in")
    job = publish(source, "s3://corpus/out", ACSR_STORAGE_DEADLINE_S="3")
    ends = time.monotonic() + 60
    while not store.client.list_objects_v2(Bucket="corpus", Prefix="out/data/").get("KeyCount"):
        assert time.monotonic() < ends
    store.weather.dead = True
    _, err = job.communicate(timeout=120)
    assert job.returncode == 75, err
    assert "storage failed for too long" in err
    assert "very-secret" not in err
    store.weather.dead = False
    again = publish(source, "s3://corpus/out")
    assert again.wait(60) == 0, again.stderr.read()
    assert len(rows_of("s3://corpus/out")) == 100


def test_a_shard_uploaded_again_unchanged_is_not_done_again(store, make_corpus, tmp_path):
    """The store's own digest tells, so that not even the shard is read."""
    folder = make_corpus(tmp_path / "in", 2, 10)
    source = store.upload(folder, "in")
    assert publish(source, "s3://corpus/out").wait(60) == 0
    time.sleep(1.1)
    store.upload(folder, "in")
    again = publish(source, "s3://corpus/out")
    out, err = again.communicate(timeout=60)
    assert again.returncode == 0, err
    assert "nothing to do" in json.loads(out.splitlines()[-1])["this run"]


@pytest.mark.slow
@pytest.mark.ray
def test_the_whole_job_from_s3_to_s3_in_bad_weather(store, start_purify, corpus, oracle, tmp_path):
    source = store.upload(corpus, "in")
    output = "s3://corpus/out"
    store.weather.share = 0.2
    job = start_purify(source, output, environment=store.environment, unit_rows=25)
    job.until(lambda: job.told().count("images, ") > 0 or len(Ledger(output).published()) > 2, 240)
    job.process.send_signal(signal.SIGKILL)
    job.wait()
    again = start_purify(source, output, environment=store.environment, unit_rows=25)
    assert again.wait(400) == 0, again.told()
    store.weather.share = 0
    print(store.weather.counts)
    oracle.check(output)
