"""Files beside a run: the last content is written, and a storage in trouble neither fails nor holds up."""

import errno
import logging
import threading
import time
import uuid

import pytest

from acsr_ray.corpus.side_files import SideWriter
from acsr_ray.storage import DiskStorage, StorageError, open_storage, patiently


class Slow:
    """A storage that answers when it is let, and remembers."""

    root = "slow://"

    def __init__(self, error=None):
        self.written, self.error = [], error
        self.asked, self.go_on = threading.Event(), threading.Event()

    def write(self, name, data, deadline_s=None):
        self.asked.set()
        assert self.go_on.wait(20)
        if self.error is not None:
            raise self.error
        self.written.append((name, data))


def test_the_last_content_is_written_and_the_others_are_skipped():
    storage = Slow()
    writer = SideWriter(storage)
    writer.put("a", b"0")
    assert storage.asked.wait(10)
    for number in range(1, 50):
        writer.put("a", b"%d" % number)
        writer.put("b", b"%d" % number)
    storage.go_on.set()
    assert writer.close(10)
    assert storage.written == [("a", b"0"), ("a", b"49"), ("b", b"49")]


def test_a_storage_that_hangs_holds_nobody_up(caplog):
    storage = Slow()
    writer = SideWriter(storage)
    began = time.monotonic()
    writer.put("a", b"1")
    assert storage.asked.wait(10)
    writer.put("b", b"2")
    assert not writer.close(0.3)
    assert time.monotonic() - began < 5
    assert "does not answer" in caplog.text
    storage.go_on.set()
    time.sleep(0.1)
    assert storage.written == [("a", b"1")], "nothing is begun after the run"


@pytest.mark.parametrize(
    "error", [StorageError("no room left"), PermissionError(13, "denied"), FileNotFoundError("x")]
)
def test_trouble_is_told_once(error, caplog):
    storage = Slow(error)
    storage.go_on.set()
    writer = SideWriter(storage)
    for number in range(5):
        writer.put(f"file-{number}", b"1")
    with caplog.at_level(logging.WARNING):
        assert writer.close(10)
    assert len(caplog.records) == 1
    assert "the run goes on" in caplog.text


def test_one_that_lost_the_output_writes_nothing_more(tmp_path):
    ours = True
    writer = SideWriter(DiskStorage(tmp_path), lambda: ours)
    writer.put("a", b"1")
    while not (tmp_path / "a").exists():
        time.sleep(0.01)
    ours = False
    writer.put("a", b"2")
    assert writer.close(10)
    assert (tmp_path / "a").read_bytes() == b"1"


def test_a_swept_staging_file_costs_one_try(tmp_path, monkeypatch):
    storage, tries = DiskStorage(tmp_path), []
    real = storage.write

    def swept(name, data, deadline_s=None):
        tries.append(name)
        if len(tries) == 1:
            raise FileNotFoundError(name)
        real(name, data, deadline_s)

    monkeypatch.setattr(storage, "write", swept)
    writer = SideWriter(storage)
    writer.put("a", b"1")
    assert writer.close(10)
    assert (tmp_path / "a").read_bytes() == b"1"


def test_only_the_last_content_is_tried_again(tmp_path, monkeypatch):
    """While the run goes on, the next content is the next try."""
    storage, tries, busy = DiskStorage(tmp_path), [], 3
    closing = threading.Event()

    def sync(path):
        tries.append(closing.is_set())
        if len(tries) <= busy:
            raise OSError(errno.EAGAIN, "busy")

    monkeypatch.setattr(storage, "_stage", lambda data, stage=storage._stage: (sync(data), stage(data))[1])
    writer = SideWriter(storage)
    writer.put("a", b"1")
    while not tries:
        time.sleep(0.01)
    time.sleep(0.5)
    assert tries == [False]
    closing.set()
    writer.put("a", b"2")
    assert writer.close(20)
    assert (tmp_path / "a").read_bytes() == b"2"
    assert len(tries) == busy + 1


@pytest.mark.parametrize("place", ["disk", "objects"])
def test_a_write_with_a_deadline_of_its_own_tries_once(tmp_path, monkeypatch, place):
    calls = []

    def once(operation, what, deadline_s=None):
        calls.append(deadline_s)
        return patiently(operation, what, deadline_s)

    monkeypatch.setattr("acsr_ray.storage.patiently", once)
    storage = open_storage(str(tmp_path) if place == "disk" else f"memory://{uuid.uuid4().hex}")
    storage.write("a", b"1", deadline_s=0.0)
    storage.write("a", b"2")
    assert calls[:2] == [0.0, None]
    assert storage.read("a") == b"2"
