"""The libraries of hf and gs against small servers that speak as those services do."""

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from acsr_ray.corpus.sources import find_source
from acsr_ray.corpus.units import plan_units, read_unit
from acsr_ray.filesystems import StorageSettings, connected, resolve_connection

TOKEN = "hf_secret"


class Service:
    """A server of files, which remembers who asked for what."""

    def __init__(self, files):
        self.files: dict[str, bytes] = files
        self.asked: list[tuple[str, str | None, str | None]] = []
        service = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self):
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                place = urlsplit(self.path)
                service.asked.append(
                    (place.path, self.headers.get("Range"), self.headers.get("Authorization"))
                )
                status, headers, data = service.reply(unquote(place.path), parse_qs(place.query), body)
                span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
                if status == 200 and span:
                    end = min(int(span[2] or len(data)), len(data) - 1)
                    headers["Content-Range"] = f"bytes {span[1]}-{end}/{len(data)}"
                    status, data = 206, data[int(span[1]) : end + 1]
                self.send_response(status)
                for name, value in {"Content-Length": len(data), **headers}.items():
                    self.send_header(name, str(value))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(data)

            do_GET = do_HEAD = do_POST = answer

            def log_message(self, *args):
                return

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def reply(self, path, query, body):
        raise NotImplementedError


def as_json(content, status=200):
    return status, {"Content-Type": "application/json"}, json.dumps(content).encode()


class Hub(Service):
    """The part of the Hub's interface that a data set's files are read by."""

    ROOT = "/api/datasets/me/photos"
    COMMIT = "c" * 40

    def entry(self, path):
        data = self.files[path]
        return {"type": "file", "path": path, "size": len(data), "oid": f"{hash(data) & 0xFFFFFFFF:040x}"}

    def reply(self, path, query, body):
        if path.startswith(f"{self.ROOT}/tree/"):
            below = path.removeprefix(f"{self.ROOT}/tree/").partition("/")[2]
            return as_json([self.entry(name) for name in sorted(self.files) if name.startswith(below)])
        if path.startswith(f"{self.ROOT}/paths-info/"):
            wanted = parse_qs(body.decode()).get("paths") or json.loads(body)["paths"]
            found = [self.entry(name) for name in wanted if name in self.files]
            found += [
                {"type": "directory", "path": name, "oid": "d" * 40} for name in wanted if name == "data"
            ]
            return as_json(found)
        if path.startswith(self.ROOT):
            return as_json({"id": "me/photos", "sha": self.COMMIT, "siblings": []})
        name = re.sub(r"^/datasets/me/photos/resolve/[^/]+/", "", path)
        if name in self.files:
            return 200, {"ETag": '"x"', "X-Repo-Commit": self.COMMIT}, self.files[name]
        return as_json({"error": "nothing"}, 404)


class Google(Service):
    """The part of Google's JSON interface that a bucket's objects are read by."""

    def entry(self, name):
        data = self.files[name]
        return {
            "kind": "storage#object",
            "name": name,
            "bucket": "ours",
            "size": str(len(data)),
            "etag": "CAE=",
            "generation": "1",
            "md5Hash": f"{hash(data) & 0xFFFFFFFF:08x}",
            "updated": "2026-01-02T03:04:05.000Z",
            "timeCreated": "2026-01-02T03:04:05.000Z",
        }

    def reply(self, path, query, body):
        if path.rstrip("/") == "/storage/v1/b/ours/o":
            prefix = query.get("prefix", [""])[0]
            return as_json(
                {"items": [self.entry(name) for name in sorted(self.files) if name.startswith(prefix)]}
            )
        name = re.sub(r"^/(download/)?storage/v1/b/ours/o/", "", path)
        if name not in self.files:
            return as_json({"error": {"code": 404, "message": "nothing"}}, 404)
        if path.startswith("/download/") or query.get("alt") == ["media"]:
            return 200, {"Content-Type": "application/octet-stream"}, self.files[name]
        return as_json(self.entry(name))


@pytest.fixture
def shards(tmp_path, write_shard):
    return {
        f"data/{number}.parquet": write_shard(tmp_path / f"{number}.parquet", 5, seed=number).read_bytes()
        for number in range(2)
    }


def check(location, service, **settings):
    """Read a corpus of two shards of five rows; return the units before and after one of them changed."""
    asked = StorageSettings(endpoint_url=service.url, **settings)
    connection = resolve_connection(asked, StorageSettings(), "", {"NIGHT_TOKEN": TOKEN})
    with connected(connection):
        before = plan(location)
        rows = [row for unit in before for row in read_unit(unit).to_pylist()]
        assert len(rows) == 10
        assert [row["id"] for row in rows] == [*range(1000, 1005)] * 2
        assert all(shard.version and shard.digest for shard in find_source(location))
        service.files["data/1.parquet"] = service.files["data/0.parquet"]
        after = plan(location)
    return before, after


def plan(location):
    return plan_units(location, image_column="image", unit_rows=3, unit_megabytes=32.0, limit=None)


def names(units):
    return [unit.output_name("f") for unit in units]


@pytest.mark.parametrize("settings", [{"token_variable": "NIGHT_TOKEN"}, {"anonymous": True}])
def test_a_data_set_of_the_hub(shards, settings):
    pytest.importorskip("huggingface_hub")
    hub = Hub(shards)
    before, after = check("hf://datasets/me/photos/data", hub, **settings)
    assert names(after)[:2] == names(before)[:2]
    assert not set(names(after)[2:]) & set(names(before))
    whose = {f"Bearer {TOKEN}"} if "token_variable" in settings else {None}
    assert {who for _, _, who in hub.asked} == whose
    hub.server.shutdown()


def test_a_bucket_of_google(shards, monkeypatch):
    # Where this is on, it speaks another protocol too, to an address of its own.
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    pytest.importorskip("gcsfs")
    google = Google(shards)
    before, after = check("gs://ours/data", google, anonymous=True)
    assert names(after)[:2] == names(before)[:2]
    assert not set(names(after)[2:]) & set(names(before))
    assert any(span for path, span, _ in google.asked if "0.parquet" in path)
    google.server.shutdown()
