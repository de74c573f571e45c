"""Credentials of the driver reach workers on nodes that have none, and nothing that is written."""

from pathlib import Path

import pytest

from acsr_ray.corpus.ledger import Ledger

pytestmark = [pytest.mark.slow, pytest.mark.ray]

SECRET, KEY = "a-very-secret-value", "a-key-of-the-driver"


def written(*places):
    """Yield every file below some folders that can be read."""
    for place in places:
        for path in Path(place).rglob("*"):
            if path.is_file() and not path.is_symlink():
                yield path, path.read_bytes()


def test_workers_of_bare_nodes_read_and_write_as_the_driver(
    start_nodes, store, start_purify, corpus, oracle, tmp_path, monkeypatch
):
    for name in store.environment:
        monkeypatch.delenv(name)
    nodes = start_nodes()
    endpoint = store.environment["AWS_ENDPOINT_URL"]
    source = store.upload(corpus, "in")
    address = nodes.cluster.address

    def run(output, environment, **settings):
        job = start_purify(source, output, address=address, environment=environment, unit_rows=50, **settings)
        assert job.wait() == 0, job.told()
        return job.told()

    # As the store's own tools take them; only the driver has them.
    own = {"AWS_ENDPOINT_URL": endpoint, "AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET}
    told = [run("s3://corpus/one", own)]
    # By option, under names of ours.
    named = {
        "endpoint_url": endpoint,
        "region": "eu-central-1",
        "access_key_variable": "NIGHT_KEY",
        "secret_key_variable": "NIGHT_SECRET",
    }
    told.append(run("s3://corpus/two", {"NIGHT_KEY": KEY, "NIGHT_SECRET": SECRET}, storage=named))
    for name, value in store.environment.items():
        monkeypatch.setenv(name, value)
    for output in ("s3://corpus/one", "s3://corpus/two"):
        oracle.check(output)
    # Where it is asked binds no output: the same run by another way has nothing to do.
    assert "nothing to do" in run("s3://corpus/two", own)
    logs = nodes.cluster.head_node.get_session_dir_path()
    found = list(written(logs, tmp_path))
    assert any(b"WatchedChain" in data or b"ReadUnits" in data for _, data in found), "there are logs"
    private = [Ledger(output).storage for output in ("s3://corpus/one", "s3://corpus/two")]
    found += [(name, storage.read(name)) for storage in private for name in storage.names("")]
    for place, data in found:
        assert SECRET.encode() not in data, place
        assert KEY.encode() not in data, place
