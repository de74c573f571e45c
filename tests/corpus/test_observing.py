"""A run that is observed: its files say how it stands and how it ended, and are never seen half written."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from acsr_ray.config import FailedError, ResumableStop
from acsr_ray.corpus.facts import UnitFacts
from acsr_ray.corpus.observing import ObservedRun, Pace, outcome_of, read_plan, record_file
from acsr_ray.corpus.run_record import NoListener, RunAbout, RunTally
from acsr_ray.storage import DiskStorage, StorageError

ABOUT = RunAbout("20260101T000000Z-000001", "2026-01-01T00:00:00Z", "in", "out", "tiny", {"limit": None})
FACTS = UnitFacts({"purified": 3, "quarantined": 1}, {"empty": 1})


class Quiet:
    """A console that only remembers."""

    def __init__(self):
        self.shown, self.closed = [], []

    def show(self, progress):
        self.shown.append(progress)

    def close(self, progress):
        self.closed.append(progress)


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr("acsr_ray.corpus.observing.TICK_SECONDS", 0.01)


def files(folder):
    record = json.loads((folder / record_file(ABOUT.run)).read_text())
    return record, json.loads((folder / "_acsr/progress.json").read_text())


def wait_until(true, seconds=20):
    ends = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < ends, "it never came true"
        time.sleep(0.01)


def test_files_while_it_runs_and_when_it_is_done(tmp_path, quick):
    tally, console = RunTally(), Quiet()
    tally.corpus = lambda: {"rows": 40, "statuses": {"purified": 40}, "quarantined": {}}
    pace = Pace(progress=0.02, record=0.02)
    with ObservedRun(ABOUT, tally, DiskStorage(tmp_path), console=console, pace=pace) as run:
        wait_until((tmp_path / record_file(ABOUT.run)).exists)
        assert files(tmp_path)[0]["outcome"] == "running"
        tally.plan(8)
        tally.done("u0", FACTS)
        wait_until(lambda: files(tmp_path)[0]["images"] == files(tmp_path)[1]["images_done"] == 4)
        assert files(tmp_path)[1]["outcome"] == files(tmp_path)[0]["outcome"] == "running"
        assert files(tmp_path)[0]["corpus"]["images"] == 40
        tally.done("u1", FACTS)
    record, progress = files(tmp_path)
    assert record == json.loads(json.dumps(run.record))
    assert (record["outcome"], record["images"], record["units"], record["detail"]) == ("done", 8, 2, "")
    assert (progress["outcome"], progress["images_done"], progress["run"]) == ("done", 8, ABOUT.run)
    assert console.closed[0]["outcome"] == "done"
    assert console.shown
    assert not list((tmp_path / "_acsr/staging").iterdir())


def end_with(error, storage):
    """Do one unit and end with an error."""
    tally = RunTally()
    with ObservedRun(ABOUT, tally, storage, console=Quiet()):
        tally.done("u0", FACTS)
        raise error


@pytest.mark.parametrize(
    ("error", "outcome", "detail"),
    [
        (ResumableStop("stopped on request"), "stopped", "stopped on request"),
        (StorageError("no room left"), "stopped", "no room left"),
        (KeyboardInterrupt(), "stopped", "interrupted (KeyboardInterrupt)"),
        (FailedError("2 units failed"), "failed", "2 units failed"),
        (ZeroDivisionError("by zero"), "failed", "ZeroDivisionError: by zero"),
    ],
)
def test_how_it_ended_is_in_its_record(tmp_path, error, outcome, detail):
    with pytest.raises(type(error)):
        end_with(error, DiskStorage(tmp_path))
    record, progress = files(tmp_path)
    assert (record["outcome"], record["detail"], record["images"]) == (outcome, detail, 4)
    assert progress["outcome"] == outcome
    assert outcome_of(error) == (outcome, detail)


def test_a_storage_in_trouble_neither_fails_nor_delays_a_stop(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("acsr_ray.corpus.observing.STOP_SECONDS", 0.5)

    class Broken(DiskStorage):
        def write(self, name, data, deadline_s=None):
            if "record" in name:
                time.sleep(60)
            raise OSError(5, "Input/output error", name)

    began = time.monotonic()
    with pytest.raises(ResumableStop):
        end_with(ResumableStop("stopped on request"), Broken(tmp_path))
    assert time.monotonic() - began < 3
    assert "the run goes on" in caplog.text


def test_readers_see_whole_files_only(tmp_path, quick):
    tally, broken, seen = RunTally(), [], set()
    ends = threading.Event()

    def read():
        while not ends.is_set():
            for name in ("_acsr/progress.json", record_file(ABOUT.run)):
                try:
                    seen.add(len(json.loads((tmp_path / name).read_bytes())))
                except FileNotFoundError:
                    continue
                except ValueError as error:
                    broken.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    pace = Pace(progress=0.0, record=0.0)
    with ObservedRun(ABOUT, tally, DiskStorage(tmp_path), console=Quiet(), pace=pace):
        for number in range(60):
            tally.done(f"u{number}", UnitFacts({"purified": 1}, {}, {f"0/{number}": 1}))
            time.sleep(0.01)
    ends.set()
    reader.join()
    assert not broken
    assert len(seen) == 2, "both files were read"


def test_a_killed_run_leaves_a_whole_record_that_says_running(tmp_path):
    code = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from acsr_ray.corpus import observing\n"
        "from acsr_ray.corpus.facts import UnitFacts\n"
        "from acsr_ray.corpus.run_record import RunAbout, RunTally\n"
        "from acsr_ray.storage import DiskStorage\n"
        "observing.TICK_SECONDS = 0.01\n"
        "tally = RunTally()\n"
        f"about = RunAbout({ABOUT.run!r}, '', 'in', 'out', 'tiny', {{}})\n"
        "with observing.ObservedRun(about, tally, DiskStorage(Path(sys.argv[1])), "
        "pace=observing.Pace(0.0, 0.0)):\n"
        "    while True:\n"
        "        tally.done('u', UnitFacts({'purified': 1}))\n"
        "        time.sleep(0.001)\n"
    )
    job = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)])
    path = tmp_path / record_file(ABOUT.run)
    wait_until(lambda: path.exists() and json.loads(path.read_bytes())["images"] > 20, 60)
    os.kill(job.pid, signal.SIGKILL)
    job.wait()
    record, progress = files(tmp_path)
    assert record["outcome"] == progress["outcome"] == "running"
    assert record["images"] > 20


def test_listeners_hear_of_the_end(tmp_path, quick):
    class Ear(NoListener):
        heard = ()

        def tick(self, progress):
            self.heard += (progress["outcome"],)

    ear = Ear()
    with ObservedRun(ABOUT, RunTally(ear), DiskStorage(tmp_path), console=Quiet()):
        wait_until(lambda: ear.heard)
    assert (ear.heard[0], ear.heard[-1]) == ("running", "done")


def test_a_plan_is_read_if_it_can_be(tmp_path, caplog):
    storage = DiskStorage(tmp_path)
    assert read_plan(storage) is None
    storage.write("_acsr/plan.json", b'{"schema_version": 1, "images": 5}')
    assert read_plan(storage) == {"schema_version": 1, "images": 5}
    assert not caplog.records
    for damaged in (b"{", b"[]", b"\xff"):
        storage.write("_acsr/plan.json", damaged)
        assert read_plan(storage) is None
    assert "cannot be read" in caplog.text
