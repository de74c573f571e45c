"""One writer per output: a lease with a heartbeat, on nothing but put-if-absent.

`_acsr/lease/00000003.json` says who took the third lease, `00000003.beat` is rewritten by that holder alone.
The highest number holds. A second run watches the beat: does it change, somebody lives there; does it stand
still for `STALE_S`, or is the holder's process gone from this machine, the next number is free to create,
and of two that try one wins. Clocks of different machines are never compared.
"""

import json
import os
import re
import socket
import threading
import time
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from acsr_ray.config import FailedError
from acsr_ray.corpus.sources import CorpusError
from acsr_ray.storage import Storage, StorageError

BEAT_S = 3.0
STALE_S = 20.0
"""A beat that stood still for so long means a dead holder; six beats may be late."""
FOLDER = "_acsr/lease"
RELEASED = b"released"


class LeaseError(CorpusError):
    """Another run holds the output."""


class LeaseLostError(FailedError):
    """Another run took the output over, because this one's heartbeat stood still."""


@dataclass(frozen=True)
class Holder:
    """Who holds a lease: enough to see on the same machine whether the process still lives."""

    token: str
    host: str
    boot: str
    """Identity of the machine's last start and of the process's pid namespace, "" where unknown."""
    pid: int
    born: float
    """When the process started, because pids are used again."""
    since: str

    @classmethod
    def here(cls) -> Self:
        """Return this process."""
        since = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        pid = os.getpid()
        return cls(uuid.uuid4().hex, socket.gethostname(), _boot(), pid, _born(pid), since)

    def is_gone(self) -> bool:
        """Return whether the process surely lives no more; only to be known on its own machine."""
        if not self.boot or (self.host, self.boot) != (socket.gethostname(), _boot()):
            return False
        return _born(self.pid) != self.born


class Lease:
    """The right to write an output; a context manager that takes it, keeps it alive and gives it back.

    Args:
        storage: of the output.
        stale_s: how long a beat may stand still.
        beat_s: how often this one beats.

    Raises:
        LeaseError: on entry, when another run holds the output and lives.
    """

    def __init__(self, storage: Storage, *, stale_s: float = STALE_S, beat_s: float = BEAT_S) -> None:
        self.number = 0
        self._storage, self._stale_s, self._beat_s = storage, stale_s, beat_s
        self._closing = threading.Event()
        self._lost = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        me = Holder.here()
        while True:
            held = current(self._storage)
            if held and not self._is_free(held):
                raise LeaseError(f"{self._storage.root} is being written by {_told(self._storage, held)}")
            self.number = held + 1
            content = (json.dumps(asdict(me), indent=1) + "\n").encode()
            created = self._storage.create(_file(self.number, "json"), content)
            # Where a create's answer was lost, the lease that is there already is our own.
            if created or _holder(self._storage, self.number) == me:
                break
        self._beat(0)
        self._thread = threading.Thread(target=self._keep, daemon=True, name="lease")
        self._thread.start()
        for name in self._storage.names(FOLDER):
            if 0 < _number(name) < self.number:
                self._storage.remove(f"{FOLDER}/{name}")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._closing.set()
        if self._thread is not None:
            self._thread.join()
        if not self._lost.is_set():
            try:
                self._storage.write(_file(self.number, "beat"), RELEASED)
            except StorageError:
                if kind is None:
                    raise

    @property
    def is_lost(self) -> bool:
        """Whether the run is known to hold the output no more; asks nobody."""
        return self._lost.is_set()

    def check(self) -> None:
        """Raise `LeaseLostError` if another run took the output over."""
        if self._lost.is_set() or not holds(self._storage, self.number):
            self._lost.set()
            raise LeaseLostError(
                f"{self._storage.root} was taken over by {_told(self._storage, current(self._storage))}, "
                "because this run's heartbeat had stopped; what it published is kept"
            )

    def _keep(self) -> None:
        count = 0
        while not self._closing.wait(self._beat_s):
            count += 1
            try:
                if not holds(self._storage, self.number):
                    self._lost.set()
                    return
                self._beat(count)
            except (StorageError, OSError):
                # The run itself meets the same storage and stops; a lease that ends meanwhile is found.
                continue

    def _beat(self, count: int) -> None:
        self._storage.write(_file(self.number, "beat"), str(count).encode())

    def _is_free(self, number: int) -> bool:
        """Return whether the holder of a lease gave it back or died; waits to see it live or not."""
        holder = _holder(self._storage, number)
        ends = time.monotonic() + self._stale_s
        first = _beat_of(self._storage, number)
        while time.monotonic() < ends:
            if holder is not None and holder.is_gone():
                return True
            beat = _beat_of(self._storage, number)
            if beat == RELEASED or current(self._storage) != number:
                return beat == RELEASED
            if beat != first:
                return False
            time.sleep(min(0.5, self._stale_s / 10))
        return True


@dataclass(frozen=True)
class LeaseState:
    """Who took an output last, and what is known of it from outside."""

    number: int
    holder: Holder | None
    released: bool
    beat_age_s: float | None
    """Seconds since the last beat, by this machine's clock."""

    @property
    def lives(self) -> bool:
        """Whether it seems to be at work: not given back, not dead here, and a beat that is not old."""
        if self.released or (self.holder is not None and self.holder.is_gone()):
            return False
        return self.beat_age_s is not None and self.beat_age_s < STALE_S

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON value, without what only the holder itself has a use for."""
        told = ("host", "pid", "since")
        who = {} if self.holder is None else {key: getattr(self.holder, key) for key in told}
        age = None if self.beat_age_s is None else round(self.beat_age_s, 1)
        return {"lives": self.lives, "released": self.released, "beat_age_s": age, **who}


def look(storage: Storage) -> LeaseState | None:
    """Return the state of an output's last lease, None where there was none; takes and waits for nothing."""
    number = current(storage)
    if not number:
        return None
    released = _beat_of(storage, number) == RELEASED
    return LeaseState(number, _holder(storage, number), released, storage.age_s(_file(number, "beat")))


def holds(storage: Storage, number: int) -> bool:
    """Return whether a lease is the last one taken, in one request."""
    return current(storage) == number


def current(storage: Storage) -> int:
    """Return the number of the last lease taken, 0 where there was none."""
    return max((_number(name) for name in storage.names(FOLDER) if name.endswith(".json")), default=0)


def _number(name: str) -> int:
    """Return the number of a lease's file, 0 for files of other programs."""
    match = re.fullmatch(r"(\d{8})\.(json|beat)", name)
    return int(match[1]) if match else 0


def _file(number: int, suffix: str) -> str:
    return f"{FOLDER}/{number:08d}.{suffix}"


def _holder(storage: Storage, number: int) -> Holder | None:
    try:
        return Holder(**json.loads(storage.read(_file(number, "json"))))
    except FileNotFoundError:
        return None


def _beat_of(storage: Storage, number: int) -> bytes:
    try:
        return storage.read(_file(number, "beat"))
    except FileNotFoundError:
        return b""


def _told(storage: Storage, number: int) -> str:
    holder = _holder(storage, number)
    return f"process {holder.pid} of {holder.host} since {holder.since}" if holder else "another run"


def _boot() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}-{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return ""


def _born(pid: int) -> float:
    """Return when a process started, in clock ticks since the machine's; -1 where it is no more."""
    try:
        # The name, in brackets, may hold spaces.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return -1.0
    # A process that ended and was not waited for is gone all the same.
    return -1.0 if fields[0] in ("Z", "X") else float(fields[19])
