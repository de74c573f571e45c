"""Storage: whole files or none, never replaced by accident, errors outlived until a deadline."""

import errno
import os
import threading
import uuid

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from acsr_ray.storage import StorageError, StorageLocationError, open_storage, patience, patiently


@pytest.fixture(params=["disk", "objects"])
def storage(tmp_path, request):
    return open_storage(str(tmp_path / "out") if request.param == "disk" else f"memory://{uuid.uuid4().hex}")


def test_create_refuses_to_replace_and_write_replaces(storage):
    assert storage.create("a/b.txt", b"one")
    assert not storage.create("a/b.txt", b"two")
    assert storage.read("a/b.txt") == b"one"
    storage.write("a/b.txt", b"three")
    assert storage.read("a/b.txt") == b"three"
    assert storage.names("") == {"a/b.txt": 5}
    assert storage.names("a") == {"b.txt": 5}


def test_of_many_that_create_at_once_one_wins(storage):
    won, together = [], threading.Barrier(16)

    def attempt(number):
        together.wait()
        if storage.create("x", b"%02d" % number):
            won.append(number)

    threads = [threading.Thread(target=attempt, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if storage.root.startswith("memory"):
        won = won[-1:]  # fsspec's own store in memory is no store for threads
    assert [b"%02d" % number for number in won] == [storage.read("x")]
    assert set(storage.names("")) == {"x"}


def test_what_is_not_there(storage):
    with pytest.raises(FileNotFoundError):
        storage.read("nothing")
    storage.remove("nothing")
    assert storage.names("nothing") == {}
    storage.sweep()


def test_move_leaves_one_file_and_never_replaces(storage):
    storage.create("a", b"one")
    storage.move("a", "sub/b")
    assert (storage.read("sub/b"), set(storage.names(""))) == (b"one", {"sub/b"})
    storage.create("a", b"two")
    storage.move("a", "sub/b")
    assert (storage.read("sub/b"), set(storage.names(""))) == (b"one", {"sub/b"})
    # The second half of a move that was interrupted.
    storage.move("a", "sub/b")
    assert storage.read("sub/b") == b"one"


@given(data=st.binary(max_size=4096))
@settings(max_examples=25, deadline=None)
def test_bytes_come_back(tmp_path_factory, data):
    storage = open_storage(str(tmp_path_factory.mktemp("store")))
    assert storage.create("x", data)
    assert storage.read("x") == data


@pytest.mark.parametrize("location", ["http://host/out", "hf://datasets/x", "ftp://host/x", "gs://bucket/x"])
def test_stores_that_cannot_refuse_to_replace_are_refused(location):
    with pytest.raises(StorageLocationError, match="s3"):
        open_storage(location)


def test_a_passing_error_is_outlived():
    failures = [OSError(errno.EIO, "odd", "x"), TimeoutError("slow"), PermissionError("expired token")]

    def operation():
        if failures:
            raise failures.pop()
        return 7

    assert patiently(operation, "trying", 30) == 7


def test_an_error_that_stays_ends_at_the_deadline():
    calls = []

    def operation():
        calls.append(1)
        raise OSError(errno.EBUSY, "slow down")

    with pytest.raises(StorageError, match="failed for too long: trying"):
        patiently(operation, "trying", 1.0)
    assert len(calls) > 1
    assert StorageError.exit_code == 75


def test_who_has_less_patience_waits_less_and_only_meanwhile():
    tries = []

    def operation():
        tries.append(1)
        if len(tries) < 4:
            raise OSError("busy")

    with pytest.raises(StorageError, match="failed for too long"), patience(0.0):
        patiently(operation, "trying", 30)
    assert len(tries) == 1
    patiently(operation, "trying", 30)
    assert len(tries) == 4


@pytest.mark.parametrize("kind", [FileNotFoundError, FileExistsError, IsADirectoryError])
def test_what_another_try_cannot_mend_is_not_tried(kind):
    calls = []

    def operation():
        calls.append(1)
        raise kind("x")

    with pytest.raises(kind):
        patiently(operation, "trying", 30)
    assert len(calls) == 1


def test_a_folder_without_permission_is_told_at_once(tmp_path):
    def operation():
        raise PermissionError(errno.EACCES, "denied", str(tmp_path))

    with pytest.raises(PermissionError):
        patiently(operation, "trying", 30)


def test_a_full_disk_is_a_clean_stop_and_leaves_nothing(tmp_path, monkeypatch):
    storage = open_storage(str(tmp_path))

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StorageError, match="no room left"):
            storage.create("x", b"data")
    assert storage.names("") == {}
    assert storage.create("x", b"data")


def test_a_write_that_the_disk_lost_is_noticed(tmp_path, monkeypatch):
    """What is read back decides: here the disk keeps only the first half of what is written."""
    storage = open_storage(str(tmp_path))
    real = os.fsync

    def torn(descriptor):
        os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
        real(descriptor)

    monkeypatch.setenv("ACSR_STORAGE_DEADLINE_S", "0.5")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", torn)
        with pytest.raises(StorageError, match="does not hold"):
            storage.create("x", b"data" * 100)
    assert storage.names("") == {}


def test_room_is_told_for_disks_only(storage):
    free = storage.free_bytes()
    assert (free is None) == storage.root.startswith("memory")
    assert free is None or free > 0


def test_a_storage_that_can_refuse_is_accepted_and_left_clean(storage):
    storage.check_conditional()
    assert storage.names("") == {}


def test_a_store_that_ignores_the_condition_is_refused(monkeypatch):
    storage = open_storage(f"memory://{uuid.uuid4().hex}")
    monkeypatch.setattr(storage, "create", lambda name, data: storage.write(name, data) or True)
    with pytest.raises(StorageLocationError, match="If-None-Match"):
        storage.check_conditional()


def test_a_folder_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(StorageLocationError, match="cannot be written"):
        open_storage(str(tmp_path / "file" / "out")).check_conditional()


@pytest.mark.parametrize("code", ["412", "PreconditionFailed"])
def test_every_store_s_words_for_refusing_are_understood(monkeypatch, code):
    from botocore.exceptions import ClientError

    storage = open_storage(f"memory://{uuid.uuid4().hex}")

    def refuse(path, data, mode):
        response = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": 412}}
        raise OSError(errno.EINVAL, "refused") from ClientError(response, "PutObject")

    monkeypatch.setattr(storage._fs, "pipe_file", refuse)
    assert not storage.create("x", b"data")
