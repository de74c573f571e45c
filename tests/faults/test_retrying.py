"""A retry that is killed, at every point and at random, and goes on: no row lost, none doubled."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from acsr_ray.corpus.ledger import Ledger

DRIVER = Path(__file__).parent / "drivers" / "retry.py"
SHARDS, ROWS = 4, 20
USUAL, RAISED = 16384, 30000
POINTS = {
    "lease taken": 1,
    "claimed": 1,
    "staged": 2,
    "linked": 2,
    "published": 3,
    "before snapshot": 2,
    "snapshot linked": 1,
    "superseded removed": 2,
    "parked half moved": 1,
    "parked moved": 1,
    "order closed": 2,
}
QUICK = ("published", "superseded removed")


def start(source, output, side, counter=os.devnull, **faults):
    environment = {**os.environ, "ACSR_FAULTS": json.dumps(faults), "ACSR_COUNTER": str(counter)}
    return subprocess.Popen(
        [sys.executable, str(DRIVER), str(source), str(output), str(side)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(source, output, side):
    job = start(source, output, side)
    out, err = job.communicate(timeout=60)
    assert job.returncode == 0, err
    return json.loads(out.splitlines()[-1])


def rows_of(output):
    """Return id -> (image, reason) of every visible row, each of which is there once."""
    found = {}
    for path in (Path(output) / "data").rglob("*.parquet"):
        for row in pq.read_table(path).to_pylist():
            assert row["image_id"] not in found
            found[row["image_id"]] = row["image"] and row["image"]["bytes"], row["acsr_reason"]
    return found


def identities(output):
    files = (Path(output) / "data").rglob("*.parquet")
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in files}


def untouched(output):
    """Return the files that hold no quarantined row."""
    kept = set(Ledger(str(output)).storage.names("_acsr/quarantine"))
    return {name: value for name, value in identities(output).items() if name not in kept}


def check(output, expected):
    assert rows_of(output) == expected
    ledger = Ledger(str(output))
    assert ledger.published() == ledger.snapshot().names()
    assert set(ledger.storage.names("_acsr/quarantine")) <= ledger.published()
    assert not ledger.storage.names("_acsr/staging")
    assert not ledger.storage.names("_acsr/ready")
    assert not ledger.binding.retry_order().is_open


@pytest.fixture(scope="module")
def source(make_corpus, tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("retry") / "in", SHARDS, ROWS)


@pytest.fixture
def output(source, tmp_path):
    """An output of which one row in five is quarantined, half of them only under the usual limit."""
    finish(source, tmp_path / "out", USUAL)
    reasons = [reason for _, reason in rows_of(tmp_path / "out").values()]
    assert (reasons.count("too_large"), reasons.count("decoder_timeout"), len(reasons)) == (8, 8, 80)
    return tmp_path / "out"


@pytest.fixture(scope="module")
def expected(source, tmp_path_factory):
    """The rows of a run from nothing under the raised limit: all of them purified."""
    output = tmp_path_factory.mktemp("retry") / "out"
    finish(source, output, USUAL)
    finish(source, output, RAISED)
    found = rows_of(output)
    assert len(found) == SHARDS * ROWS
    assert all(image is not None and reason is None for image, reason in found.values())
    check(output, found)
    return found


@pytest.mark.parametrize(
    "point", [pytest.param(p, marks=() if p in QUICK else pytest.mark.slow) for p in POINTS]
)
def test_killed_at_a_point_and_resumed(source, output, expected, tmp_path, point):
    before = untouched(output)
    job = start(
        source, output, RAISED, tmp_path / "counter", kill_at={"point": point, "count": POINTS[point]}
    )
    assert job.wait(60) == -signal.SIGKILL, "the point was passed"
    rows_of(output)
    summary = finish(source, output, RAISED)
    assert summary["retry"]["number"] == (2 if point == "order closed" else 1)
    check(output, expected)
    assert before.items() <= identities(output).items()
    # Another run finds nothing to do, whatever its predecessor left.
    done = identities(output)
    finish(source, output, RAISED)
    assert identities(output) == done


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_killed_again_and_again_at_random_times(source, output, expected, tmp_path, seed):
    generator, before = random.Random(seed), untouched(output)
    for _ in range(4):
        job = start(source, output, RAISED, tmp_path / "counter")
        with contextlib.suppress(subprocess.TimeoutExpired):
            job.wait(0.4 + generator.random())
        job.kill()
        job.communicate()
        rows_of(output)
    finish(source, output, RAISED)
    check(output, expected)
    assert before.items() <= identities(output).items()


@pytest.mark.slow
def test_a_run_after_a_killed_retry_loses_nothing(source, output, expected, tmp_path):
    """It is not the retry that goes on: what the retry had parked is removed, and done again by the retry."""
    job = start(source, output, RAISED, tmp_path / "counter", kill_at={"point": "published", "count": 5})
    assert job.wait(60) == -signal.SIGKILL
    rows = rows_of(output)
    assert len(rows) == SHARDS * ROWS
    refused = start(source, output, USUAL)
    _, err = refused.communicate(timeout=60)
    assert refused.returncode == 2
    assert "max_side" in err
    assert rows_of(output) == rows
    finish(source, output, RAISED)
    check(output, expected)
