"""Row 9: an S3 store that answers 503, breaks off, is slow or knows no credentials, a fifth of the time."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from acsr_ray.corpus.ledger import Ledger
from acsr_ray.storage import open_storage

DRIVERS = Path(__file__).parent / "drivers"


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
    source = store.upload(make_corpus(tmp_path / "in", 2, 25), "in")
    quiet = publish(source, "s3://corpus/quiet")
    assert quiet.wait(60) == 0, quiet.stderr.read()
    expected = rows_of("s3://corpus/quiet")
    assert len(expected) == 50
    store.weather.share = 0.2
    stormy = publish(source, "s3://corpus/stormy")
    _, err = stormy.communicate(timeout=200)
    assert stormy.returncode == 0, err
    store.weather.share = 0
    assert store.weather.counts["fine"] > 20
    assert sum(count for name, count in store.weather.counts.items() if name != "fine") > 4
    assert rows_of("s3://corpus/stormy") == expected
    assert "very-secret" not in err


@pytest.mark.slow
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
