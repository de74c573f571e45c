"""Downloads: whole and right, or not there."""

import hashlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from acsr_ray.corpus.fetching import BLOCK_BYTES, FetchError, fetch

CONTENT = bytes(range(256)) * (BLOCK_BYTES // 256 + 3)
DIGEST = hashlib.sha256(CONTENT).hexdigest()


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/missing":
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        self.wfile.write(CONTENT[: len(CONTENT) // 2] if self.path == "/cut" else CONTENT)

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()
        thread.join()


def test_a_download_arrives_byte_for_byte(tmp_path, server):
    fetch(f"{server}/whole", tmp_path / "a.bin", DIGEST.upper())
    assert (tmp_path / "a.bin").read_bytes() == CONTENT
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin"]


def test_leftovers_of_a_killed_run_are_overwritten(tmp_path):
    (tmp_path / "source").write_bytes(b"right")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".a.bin.part").write_bytes(b"half of something much longer")
    digest = hashlib.sha256(b"right").hexdigest()
    fetch((tmp_path / "source").as_uri(), tmp_path / "out" / "a.bin", digest)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a.bin"]
    assert (tmp_path / "out" / "a.bin").read_bytes() == b"right"


@pytest.mark.parametrize(
    ("path", "sha256", "message"),
    [
        ("/whole", "0" * 64, "has SHA-256 .* expected 000"),
        ("/cut", DIGEST, "has SHA-256|cannot download"),
        ("/missing", DIGEST, "cannot download .*404"),
    ],
)
def test_a_bad_download_leaves_nothing(tmp_path, server, path, sha256, message):
    with pytest.raises(FetchError, match=message):
        fetch(f"{server}{path}", tmp_path / "a.bin", sha256)
    assert list(tmp_path.iterdir()) == []


def test_a_bad_download_keeps_the_file_that_was_there(tmp_path, server):
    (tmp_path / "a.bin").write_bytes(b"old")
    with pytest.raises(FetchError):
        fetch(f"{server}/whole", tmp_path / "a.bin", "0" * 64)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a.bin", b"old")]


@pytest.mark.parametrize("url", ["ftp://x/y", "data:text/plain,x", "/etc/hostname", "file:///no/such/file"])
def test_addresses_that_cannot_be_downloaded(tmp_path, url):
    with pytest.raises(FetchError, match="cannot download"):
        fetch(url, tmp_path / "a.bin", DIGEST)
    assert list(tmp_path.iterdir()) == []
