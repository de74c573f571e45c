"""One writer per output: a live holder is respected, a dead one followed, and of two that try one wins."""

import subprocess
import sys
import threading
import time
import uuid

import pytest

from acsr_ray.corpus.lease import Lease, LeaseError, LeaseLostError, current, holds
from acsr_ray.storage import open_storage

HOLDER = """
import sys, time
from acsr_ray.corpus.lease import Lease
from acsr_ray.storage import open_storage
with Lease(open_storage(sys.argv[1]), beat_s=0.1) as lease:
    print(lease.number, flush=True)
    time.sleep(600)
"""


@pytest.fixture(params=["disk", "objects"])
def storage(tmp_path, request):
    return open_storage(str(tmp_path) if request.param == "disk" else f"memory://{uuid.uuid4().hex}")


def start_holder(folder):
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline().strip() == "1"
    return process


def test_a_lease_is_taken_given_back_and_taken_again(storage):
    for number in (1, 2, 3):
        with Lease(storage) as lease:
            assert lease.number == current(storage) == number
            assert holds(storage, number)
            assert not holds(storage, number - 1)
            lease.check()
    assert all(name.startswith("00000003") for name in storage.names("_acsr/lease"))


def test_a_live_holder_is_respected(storage):
    with Lease(storage, beat_s=0.05), pytest.raises(LeaseError, match=r"written by process \d+"):
        Lease(storage, stale_s=2, beat_s=0.05).__enter__()
    with Lease(storage) as lease:
        assert lease.number == 2


def test_a_holder_whose_beat_stands_still_is_followed_and_finds_out(storage):
    first = Lease(storage, beat_s=0.3).__enter__()
    # As on another machine, where nothing is known of the process, and stopped from the outside.
    name = "_acsr/lease/00000001.json"
    storage.write(name, storage.read(name).replace(b'"boot": "', b'"boot": "another-'))
    first._closing.set()
    first._thread.join()
    began = time.monotonic()
    with Lease(storage, stale_s=1.0) as second:
        assert second.number == 2
        assert 0.9 < time.monotonic() - began < 10
        with pytest.raises(LeaseLostError, match="taken over by process"):
            first.check()
        assert first.is_lost
        assert not second.is_lost
        first.__exit__(None, None, None)
        second.check()


def test_a_killed_holder_of_the_same_machine_is_followed_at_once(tmp_path):
    process = start_holder(tmp_path)
    with pytest.raises(LeaseError, match=f"process {process.pid}"):
        Lease(open_storage(str(tmp_path)), stale_s=3).__enter__()
    process.kill()
    began = time.monotonic()
    # Not waited for yet: a zombie is as dead as one that is gone.
    with Lease(open_storage(str(tmp_path))) as lease:
        assert lease.number == 2
    assert time.monotonic() - began < 5
    process.wait()


@pytest.mark.slow
def test_a_stopped_holder_is_followed_within_thirty_seconds(tmp_path):
    import signal

    process = start_holder(tmp_path)
    process.send_signal(signal.SIGSTOP)
    try:
        began = time.monotonic()
        with Lease(open_storage(str(tmp_path))) as lease:
            assert lease.number == 2
        assert 15 < time.monotonic() - began < 30
    finally:
        process.kill()
        process.wait()


def test_of_many_that_try_at_once_one_wins(storage):
    taken, refused, together = [], [], threading.Barrier(8)

    def attempt():
        together.wait()
        try:
            with Lease(storage, stale_s=5, beat_s=0.05) as lease:
                taken.append(lease.number)
                time.sleep(1.0)
        except LeaseError:
            refused.append(1)

    threads = [threading.Thread(target=attempt) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert taken == [1]
    assert len(refused) == 7
