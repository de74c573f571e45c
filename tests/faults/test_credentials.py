"""Credentials of the driver reach workers on nodes that have none, and nothing that is written."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from acsr_ray.corpus.ledger import Ledger

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(900)]

SECRET, KEY = "a-very-secret-value", "a-key-of-the-driver"


def written(*places):
    """Yield every file below some folders with its bytes."""
    for place in places:
        for path in Path(place).rglob("*"):
            if path.is_file() and not path.is_symlink():
                yield path, path.read_bytes()


def test_workers_of_bare_nodes_read_and_write_as_the_driver(
    start_nodes, store, corpus, oracle, tiny_bundle, tmp_path, monkeypatch
):
    for name in store.environment:
        monkeypatch.delenv(name)
    nodes = start_nodes()
    endpoint = store.environment["AWS_ENDPOINT_URL"]
    source = store.upload(corpus, "in")

    def run(output, environment, *options):
        command = [
            sys.executable,
            "-m",
            "acsr_ray.cli",
            "purify-corpus",
            "--input",
            source,
            "--output",
            output,
        ]
        command += ["--bundle", str(tiny_bundle), "--unit-rows", "50", "--ray.actors", "1", *options]
        surroundings = {**os.environ, **environment, "RAY_ADDRESS": nodes.cluster.address}
        done = subprocess.run(command, env=surroundings, capture_output=True, text=True, timeout=280)
        (tmp_path / f"log-{len(list(tmp_path.iterdir()))}").write_text(done.stdout + done.stderr)
        assert done.returncode == 0, done.stderr
        return done.stdout

    # As the store's own tools take them; only the driver has them.
    own = {"AWS_ENDPOINT_URL": endpoint, "AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET}
    run("s3://corpus/one", own)
    # By option, under names of ours.
    asked = ["--storage.endpoint-url", endpoint, "--storage.region", "eu-central-1"]
    asked += ["--storage.access-key-variable", "NIGHT_KEY", "--storage.secret-key-variable", "NIGHT_SECRET"]
    run("s3://corpus/two", {"NIGHT_KEY": KEY, "NIGHT_SECRET": SECRET}, *asked)
    # Where it is asked binds no output: the same run by another way has nothing to do.
    assert "nothing to do" in run("s3://corpus/two", own)
    for name, value in store.environment.items():
        monkeypatch.setenv(name, value)
    found = list(written(nodes.cluster.head_node.get_session_dir_path(), tmp_path))
    assert any(b"ReadUnits" in data for _, data in found), "there are logs of the workers"
    for output in ("s3://corpus/one", "s3://corpus/two"):
        oracle.check(output)
        storage = Ledger(output).storage
        found += [(name, storage.read(name)) for name in storage.names("")]
    for place, data in found:
        assert SECRET.encode() not in data, place
        assert KEY.encode() not in data, place
