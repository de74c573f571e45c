"""Rows 28 and 30: a night without news over 10^5 shards, and the memory of the driver."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from acsr_ray.corpus.changes import list_corpus, shortened
from acsr_ray.corpus.lease import Lease
from acsr_ray.corpus.ledger import Ledger
from acsr_ray.corpus.night import Night, NightSettings
from acsr_ray.corpus.snapshot import Receipt, ShardEntry, Snapshot
from acsr_ray.corpus.stopping import StopRequest
from acsr_ray.corpus.units import UnitPlan

MOST_LINKS = 30_000
FINGERPRINT = "0123456789abcdef" * 4

MEASURE = """
import json, re, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from test_scale import look
began = time.monotonic()
summary = look(sys.argv[1], sys.argv[2])
# Of this program alone: what getrusage tells is also that of the process it was forked from.
peak = int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024
print(json.dumps({"seconds": time.monotonic() - began, "peak": peak, "told": summary["this run"]}))
"""


def link_all(file, names):
    """Make a file appear under many names, each copy under as many as a file system allows."""
    for first in range(0, len(names), MOST_LINKS):
        copy = file.with_suffix(f".{first}")
        shutil.copy2(file, copy)
        for name in names[first : first + MOST_LINKS]:
            os.link(copy, name)
        copy.unlink()


def build(source, output, shard, shards, rows):
    """Make an input of hard links to one shard, and the output of a night that has done them all."""
    source.mkdir()
    link_all(shard, [source / f"part-{number:06d}.parquet" for number in range(shards)])
    ledger = Ledger(str(output))
    entries = {}
    data = output / "data"
    data.mkdir(parents=True)
    names = []
    for found in list_corpus(str(source)):
        name = f"{found.relative}.rows-0000000-{rows - 1:07d}.01234567.parquet"
        names.append(data / name)
        receipt = Receipt(name, rows, {"purified": rows}, {}, 0, "f" * 64)
        entry = ShardEntry(found.uri, found.version, "c" * 64, (receipt,), shortened(FINGERPRINT))
        entries[found.relative] = entry
    (output / "one").write_bytes(b"x")
    link_all(output / "one", names)
    (output / "one").unlink()
    ledger.commit(Snapshot(1, entries))


def look(source, output):
    """Spend a night over a corpus, without the means to purify anything."""

    def nothing(units, parked):
        raise AssertionError(f"{len(units)} units are new")

    ledger = Ledger(str(output))
    with Lease(ledger.storage) as lease:
        night = Night(NightSettings(UnitPlan(), FINGERPRINT), ledger, lease, StopRequest(), nothing)
        night.run(list_corpus(str(source)))
        return night.summary(1.0)


def measured(source, output):
    here = str(Path(__file__).parent)
    command = [sys.executable, "-c", MEASURE, str(source), str(output), here]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.fixture
def shard(tmp_path, make_table):
    pq.write_table(make_table(range(2)), tmp_path / "one.parquet")
    return tmp_path / "one.parquet"


def test_a_night_without_news_reads_no_shard(tmp_path, shard):
    build(tmp_path / "in", tmp_path / "out", shard, 200, 2)
    # Damage of the same size and time is not noticed, as nothing is read.
    for path in (tmp_path / "in").iterdir():
        stat = path.stat()
        path.write_bytes(bytes(stat.st_size))
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert "nothing to do" in look(tmp_path / "in", tmp_path / "out")["this run"]


@pytest.mark.slow
def test_a_night_without_news_over_a_hundred_thousand_shards(tmp_path, shard):
    build(tmp_path / "in", tmp_path / "out", shard, 100_000, 10)
    began = time.monotonic()
    summary = look(tmp_path / "in", tmp_path / "out")
    seconds = time.monotonic() - began
    assert "nothing to do" in summary["this run"]
    assert summary["images"] == 1_000_000
    assert seconds < 60
    size = max(path.stat().st_size for path in (tmp_path / "out/_acsr/snapshots").iterdir())
    print(f"10^5 shards: {seconds:.1f} s, snapshot {size / 2**20:.1f} MiB")


@pytest.mark.slow
def test_a_million_rows_cost_the_driver_little(tmp_path, shard):
    """Units of 256 rows, as by default."""
    peaks = {}
    for rows in (10_000, 1_000_000):
        folder = tmp_path / str(rows)
        folder.mkdir()
        build(folder / "in", folder / "out", shard, -(-rows // 256), 256)
        peaks[rows] = measured(folder / "in", folder / "out")["peak"]
    print(f"driver: {peaks[10_000]:.0f} MiB for 10^4 rows, {peaks[1_000_000]:.0f} MiB for 10^6")
    assert peaks[1_000_000] - peaks[10_000] < 100
