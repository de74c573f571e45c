"""Rows 4, 6 and 7 on the publish path alone: killed at every point and at random; a zombie that wakes late.

The whole job is killed in `test_kills.py`; here nothing but publishing runs, in one process, so that every
point is reached in seconds.
"""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from acsr_ray.corpus.ledger import Ledger

DRIVERS = Path(__file__).parent / "drivers"
SHARDS, ROWS = 4, 25
POINTS = (
    "lease taken",
    "claimed",
    "quarantined",
    "staged",
    "linked",
    "published",
    "before snapshot",
    "snapshot staged",
    "snapshot linked",
    "snapshot removed",
    "progress told",
    "record begun",
    "record staged",
    "reported",
)
REPLACING = ("staged", "linked", "snapshot linked", "superseded removed", "parked half moved", "parked moved")


def cut(values, quick):
    """Return parameters of which all but some are slow."""
    return [pytest.param(v, marks=() if v in quick else pytest.mark.slow) for v in values]


def start(source, output, counter, **faults):
    environment = {**os.environ, "ACSR_FAULTS": json.dumps(faults), "ACSR_COUNTER": str(counter)}
    return subprocess.Popen(
        [sys.executable, str(DRIVERS / "publish.py"), str(source), str(output)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(source, output):
    job = start(source, output, os.devnull)
    out, err = job.communicate(timeout=60)
    assert job.returncode == 0, err
    return json.loads(out.splitlines()[-1])


def rows_of(output):
    """Return the (id, image, reason) of every visible row, sorted."""
    found = []
    for path in (Path(output) / "data").rglob("*.parquet"):
        for row in pq.read_table(path).to_pylist():
            found.append((row["image_id"], row["image"] and row["image"]["bytes"], row["acsr_reason"]))
    return sorted(found, key=lambda row: row[0])


def identities(output):
    """Return inode and time of every visible file: a file that was written again has others."""
    files = (Path(output) / "data").rglob("*.parquet")
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in files}


def check(output, expected):
    """Check rows, the snapshot, and that nothing half done is left."""
    assert rows_of(output) == expected
    ledger = Ledger(str(output))
    assert ledger.published() == ledger.snapshot().names()
    assert set(ledger.storage.names("_acsr/quarantine")) == ledger.published()
    assert not ledger.storage.names("_acsr/staging")
    assert not ledger.storage.names("_acsr/ready")


@pytest.fixture(scope="module")
def source(make_corpus, tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("publish") / "in", SHARDS, ROWS)


@pytest.fixture(scope="module")
def expected(source, tmp_path_factory):
    output = tmp_path_factory.mktemp("publish") / "out"
    summary = finish(source, output)
    assert summary["statuses"] == {"quarantined": 20, "purified": 80}
    found = rows_of(output)
    assert len(found) == SHARDS * ROWS
    check(output, found)
    return found


@pytest.mark.parametrize("point", cut(POINTS, ("linked", "snapshot linked")))
def test_killed_at_a_point_and_resumed(source, expected, tmp_path, point):
    output = tmp_path / "out"
    counts = {"staged": 5, "linked": 6, "published": 7, "quarantined": 5, "before snapshot": 3, "reported": 2}
    count = counts.get(point, 1)
    job = start(source, output, tmp_path / "counter", kill_at={"point": point, "count": count})
    assert job.wait(60) == -signal.SIGKILL, "the point was passed"
    before = identities(output) if (output / "data").exists() else {}
    for path in (output / "data").rglob("*"):
        # Whatever is visible is whole.
        assert path.is_dir() or pq.read_table(path).num_rows in (5, 10)
    finish(source, output)
    check(output, expected)
    after = identities(output)
    assert {name: after[name] for name in before} == before, "what was published is not done again"


@pytest.mark.parametrize("point", cut(REPLACING, ("superseded removed", "parked half moved")))
def test_killed_while_a_shard_is_replaced(source, expected, tmp_path, point, make_table):
    """A reader sees the old rows or the new ones, never both, and at the end the new ones."""
    own = tmp_path / "in"
    own.mkdir()
    for path in source.iterdir():
        (own / path.name).write_bytes(path.read_bytes())
    output = tmp_path / "out"
    finish(own, output)
    changed = make_table(range(1000, 1000 + ROWS))
    pq.write_table(changed, own / "part-01.parquet")
    counter = tmp_path / "counter"
    job = start(own, output, counter, kill_at={"point": point, "count": 2 if point == "linked" else 1})
    assert job.wait(60) == -signal.SIGKILL, "the point was passed"
    seen = [key for key, _, _ in rows_of(output)]
    assert len(seen) == len(set(seen))
    old, new = ({f"id-{n}" for n in range(first, first + ROWS)} for first in (ROWS, 1000))
    assert not (old & set(seen) and new & set(seen))
    finish(own, output)
    keys = {key for key, _, _ in rows_of(output)}
    assert keys == {key for key, _, _ in expected} - old | new
    check(output, rows_of(output))


@pytest.mark.parametrize("seed", cut(range(5), (0,)))
def test_killed_again_and_again_at_random_times(source, expected, tmp_path, seed):
    generator = random.Random(seed)
    output = tmp_path / "out"
    for _ in range(3):
        job = start(source, output, tmp_path / "counter")
        with contextlib.suppress(subprocess.TimeoutExpired):
            job.wait(0.4 + generator.random())
        job.kill()
        job.communicate()
    finish(source, output)
    check(output, expected)


def test_a_zombie_that_wakes_late_changes_nothing(source, expected, tmp_path):
    """It is stopped with its unit staged; another run takes over and ends; then it goes on."""
    output = tmp_path / "out"
    zombie = start(source, output, tmp_path / "counter", stop_at={"point": "staged", "count": 3})
    ends = time.monotonic() + 30
    while Path(f"/proc/{zombie.pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
        assert time.monotonic() < ends
        time.sleep(0.01)
    visible = identities(output)
    summary = finish(source, output)
    assert summary["images"] == SHARDS * ROWS
    after = identities(output)
    assert {name: after[name] for name in visible} == visible
    zombie.send_signal(signal.SIGCONT)
    _, err = zombie.communicate(timeout=30)
    assert zombie.returncode == 75, err
    assert "another run" in err
    assert identities(output) == after
    finish(source, output)
    check(output, expected)
