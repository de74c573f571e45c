"""Files of an output, on a disk or in an object store, made visible at once and never replaced by accident.

`create` is put-if-absent: a hard link on disks, `If-None-Match: *` in S3 and its like. Every operation is
tried again, with jitter, until a deadline; what still fails then is a `StorageError`, after which the same
command goes on where it stopped.
"""

import contextlib
import errno
import hashlib
import importlib
import logging
import math
import os
import random
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Protocol, TypeVar

from acsr_ray.config import ResumableStop
from acsr_ray.filesystems import StorageLocationError as StorageLocationError
from acsr_ray.filesystems import open_filesystem as open_filesystem

logger = logging.getLogger(__name__)

ResultT = TypeVar("ResultT")

CONDITIONAL = ("s3", "s3a", "memory")
"""Protocols whose file systems can create an object only where there is none."""

DEADLINE_S = 120.0
"""How long an operation is tried again before the run stops; ACSR_STORAGE_DEADLINE_S, here and on the
workers, says otherwise."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.2, 10.0

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
PASSING = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EBUSY, errno.EINTR, errno.ENETDOWN)
"""What disks, network disks above all, may answer once and not the next time."""
NETWORK_ERRORS = (
    ("aiohttp", "ClientError"),
    ("botocore.exceptions", "BotoCoreError"),
    ("httpx", "TransportError"),
    ("google.auth.exceptions", "TransportError"),
)
"""What the libraries of s3, gs and hf raise over the network, where they are installed."""


class StorageError(ResumableStop):
    """A storage that did not answer, or is full; nothing published is lost, the same command goes on."""


class Storage(Protocol):
    """What an output needs of a storage; names are relative, with forward slashes."""

    root: str
    """Where it is, the same on every node."""

    def read(self, name: str) -> bytes:
        """Return a file's bytes; `FileNotFoundError` where there is none."""

    def create(self, name: str, data: bytes) -> bool:
        """Make a whole file visible unless there is one already; return whether it was made."""

    def write(self, name: str, data: bytes, deadline_s: float | None = None) -> None:
        """Write a file, or replace it at once; `deadline_s` as for `patiently`."""

    def move(self, source: str, target: str) -> None:
        """Rename a file, unless the target is there; then only the source goes."""

    def remove(self, name: str) -> None:
        """Remove a file if there is one."""

    def names(self, folder: str) -> dict[str, int]:
        """Return the files below a folder, relative to it, and their sizes."""

    def age_s(self, name: str) -> float | None:
        """Return seconds since a file was written, by this machine's clock; None where there is no file."""

    def sweep(self) -> None:
        """Remove what interrupted writers left."""

    def check_conditional(self) -> None:
        """Raise `StorageLocationError` unless `create` can refuse to replace."""

    def free_bytes(self) -> int | None:
        """Return the room that is left; None where that has no end."""


def open_storage(location: str) -> Storage:
    """Return the storage of an absolute path or URI.

    Raises:
        StorageLocationError: a URI whose store cannot create an object only where there is none.
    """
    protocol, separator, rest = location.partition("://")
    if not separator or protocol in ("file", "local"):
        return DiskStorage(Path(rest if separator else location))
    if protocol not in CONDITIONAL:
        raise StorageLocationError(f"an output cannot be at {location}: use a folder or s3://")
    return ObjectStorage(location)


_most_s: ContextVar[float] = ContextVar("most_s", default=math.inf)


@contextlib.contextmanager
def patience(seconds: float) -> Iterator[None]:
    """Let no operation of this thread be tried again for longer, until the block ends.

    Args:
        seconds: most of them for each operation, whatever else its deadline is.
    """
    before = _most_s.set(seconds)
    try:
        yield
    finally:
        _most_s.reset(before)


def patiently(operation: Callable[[], ResultT], what: str, deadline_s: float | None = None) -> ResultT:
    """Run an operation again, after pauses with jitter, while its error may pass.

    Args:
        operation: without effect when it fails, or safe to repeat.
        what: for the message.
        deadline_s: seconds after which no new try begins; `DEADLINE_S` unless given.

    Raises:
        StorageError: it failed until the deadline, or the storage is full.
        OSError: an error that another try cannot mend, such as `FileNotFoundError`.
    """
    if deadline_s is None:
        deadline_s = float(os.environ.get("ACSR_STORAGE_DEADLINE_S", DEADLINE_S))
    ends = time.monotonic() + min(deadline_s, _most_s.get())
    pause = FIRST_PAUSE_S
    while True:
        try:
            return operation()
        except _passing_errors() as error:
            if getattr(error, "errno", None) in FULL:
                raise StorageError(f"no room left: {what}: {error}") from error
            if not _may_pass(error):
                raise
            if time.monotonic() + pause > ends:
                raise StorageError(f"storage failed for too long: {what}: {_told(error)}") from error
            logger.warning("%s: %s; trying again", what, _told(error))
            time.sleep(random.uniform(pause / 2, pause))
            pause = min(2 * pause, LONGEST_PAUSE_S)


def _told(error: BaseException) -> str:
    return str(error) or type(error).__name__


@cache
def _passing_errors() -> tuple[type[Exception], ...]:
    """Return what storages raise; the network's own errors are no OSErrors."""
    found: list[type[Exception]] = [OSError]
    for module, name in NETWORK_ERRORS:
        with contextlib.suppress(ImportError):
            found.append(getattr(importlib.import_module(module), name))
    return tuple(found)


def _may_pass(error: Exception) -> bool:
    if isinstance(error, FileNotFoundError | FileExistsError | IsADirectoryError | NotADirectoryError):
        return False
    # Other errors of the local system come with a number; those of networks and object stores, expired
    # credentials among them, with many or none.
    remote = not isinstance(error, OSError) or error.errno is None or error.filename is None
    return remote or getattr(error, "errno", None) in PASSING


class DiskStorage:
    """A folder of a disk that all nodes share.

    Args:
        root: absolute; made when the first file is written.
    """

    STAGING = "_acsr/staging"

    def __init__(self, root: Path) -> None:
        self.root = str(root)
        self._root = root

    def read(self, name: str) -> bytes:
        """Return a file's bytes."""
        path = self._root / name
        return patiently(path.read_bytes, f"reading {path}")

    def create(self, name: str, data: bytes) -> bool:
        """Write a staging file, read it again, and link it under its name, which refuses to replace."""
        path = self._root / name

        def attempt() -> bool:
            try:
                staged = self._stage(data)
            except FileNotFoundError as error:
                raise StorageError(f"{path} is not written: another run swept its staging file") from error
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                os.link(staged, path)
            except FileExistsError:
                return False
            except FileNotFoundError as error:
                raise StorageError(f"{path} is not written: another run swept its staging file") from error
            finally:
                staged.unlink(missing_ok=True)
            _sync(path.parent)
            return True

        return patiently(attempt, f"writing {path}")

    def write(self, name: str, data: bytes, deadline_s: float | None = None) -> None:
        """Replace by rename."""
        path = self._root / name

        def attempt() -> None:
            staged = self._stage(data)
            path.parent.mkdir(parents=True, exist_ok=True)
            staged.replace(path)

        patiently(attempt, f"writing {path}", deadline_s)

    def move(self, source: str, target: str) -> None:
        """Link and unlink: a crash in between leaves both, and the next call ends it."""
        old, new = self._root / source, self._root / target

        def attempt() -> None:
            new.parent.mkdir(parents=True, exist_ok=True)
            # The source is gone where an earlier call ended here.
            with contextlib.suppress(FileExistsError, FileNotFoundError):
                os.link(old, new)
            old.unlink(missing_ok=True)

        patiently(attempt, f"moving {old}")

    def remove(self, name: str) -> None:
        """Unlink."""
        path = self._root / name
        patiently(lambda: path.unlink(missing_ok=True), f"removing {path}")

    def names(self, folder: str) -> dict[str, int]:
        """Walk the folder; what vanishes meanwhile is left out."""
        top = self._root / folder

        def walk() -> dict[str, int]:
            found = {}
            for parent, _, files in os.walk(top):
                for name in files:
                    path = os.path.join(parent, name)
                    try:
                        size = os.stat(path).st_size
                    except FileNotFoundError:
                        continue
                    found[Path(os.path.relpath(path, top)).as_posix()] = size
            return found

        return patiently(walk, f"listing {top}")

    def age_s(self, name: str) -> float | None:
        """Look at the file's time."""
        path = self._root / name

        def attempt() -> float | None:
            try:
                return time.time() - path.stat().st_mtime
            except FileNotFoundError:
                return None

        return patiently(attempt, f"looking at {path}")

    def sweep(self) -> None:
        """Empty the staging folder."""
        for name in self.names(self.STAGING):
            self.remove(f"{self.STAGING}/{name}")

    def check_conditional(self) -> None:
        """Link a file, which not every file system can."""
        name = f"_acsr/probe-{uuid.uuid4().hex}"
        try:
            self.create(name, b"1")
        except OSError as error:
            raise StorageLocationError(f"{self.root} cannot be written: {error}") from error
        self.remove(name)

    def free_bytes(self) -> int | None:
        """Return the free bytes of the disk."""
        there = next(path for path in (self._root, *self._root.parents) if path.exists())
        return shutil.disk_usage(there).free

    def _stage(self, data: bytes) -> Path:
        staged = self._root / self.STAGING / f"{uuid.uuid4().hex}.tmp"
        staged.parent.mkdir(parents=True, exist_ok=True)
        try:
            with staged.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            if hashlib.sha256(staged.read_bytes()).digest() != hashlib.sha256(data).digest():
                raise OSError(errno.EIO, "a file does not hold what was written to it", str(staged))
        except OSError:
            staged.unlink(missing_ok=True)
            raise
        return staged


def _sync(folder: Path) -> None:
    """Make new names last through a loss of power, where the system can."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class ObjectStorage:
    """A prefix of an object store, where one request writes an object as a whole or not at all.

    Endpoint and credentials are those of the process; see `acsr_ray.filesystems`.

    Args:
        root: URI of the prefix.
    """

    def __init__(self, root: str) -> None:
        self.root = root.rstrip("/")
        self._fs, self._prefix = open_filesystem(self.root)

    def read(self, name: str) -> bytes:
        """Get an object."""
        path = self._path(name)
        data: bytes = patiently(lambda: self._fs.cat_file(path), f"reading {self.root}/{name}")
        return data

    def create(self, name: str, data: bytes) -> bool:
        """Put an object on the condition that there is none.

        A try whose answer is lost may have written it: the next one then finds it there, as if another
        writer had been first.
        """
        path = self._path(name)

        def attempt() -> bool:
            try:
                self._fs.pipe_file(path, data, mode="create")
            except FileExistsError:
                return False
            except OSError as error:
                if _is_refused(error):
                    return False
                raise
            return True

        return patiently(attempt, f"writing {self.root}/{name}")

    def check_conditional(self) -> None:
        """Raise `StorageLocationError` unless the store refuses to create an object that is there."""
        name = f"_acsr/probe-{uuid.uuid4().hex}"
        made, again = self.create(name, b"1"), self.create(name, b"2")
        self.remove(name)
        if again or not made:
            raise StorageLocationError(
                f"{self.root}: the store ignores If-None-Match, so it cannot be written"
            )

    def write(self, name: str, data: bytes, deadline_s: float | None = None) -> None:
        """Put an object."""
        path = self._path(name)
        patiently(lambda: self._fs.pipe_file(path, data), f"writing {self.root}/{name}", deadline_s)

    def move(self, source: str, target: str) -> None:
        """Get, create and remove: stores have no conditional rename."""
        try:
            data = self.read(source)
        except FileNotFoundError:
            return
        self.create(target, data)
        self.remove(source)

    def remove(self, name: str) -> None:
        """Delete an object."""
        path = self._path(name)

        def attempt() -> None:
            try:
                self._fs.rm_file(path)
            except FileNotFoundError:
                return

        patiently(attempt, f"removing {self.root}/{name}")

    def names(self, folder: str) -> dict[str, int]:
        """List a prefix."""
        top = self._path(folder).rstrip("/")

        def attempt() -> dict[str, int]:
            try:
                found = self._fs.find(top, detail=True)
            except FileNotFoundError as error:
                raise StorageLocationError(f"{self.root}: there is no such bucket") from error
            return {path[len(top) + 1 :]: info["size"] for path, info in found.items()}

        return patiently(attempt, f"listing {self.root}/{folder}")

    def age_s(self, name: str) -> float | None:
        """Ask for the object's time."""
        path = self._path(name)

        def attempt() -> float | None:
            try:
                written: datetime = self._fs.modified(path)
            except FileNotFoundError:
                return None
            return (datetime.now(tz=written.tzinfo) - written).total_seconds()

        return patiently(attempt, f"looking at {self.root}/{name}")

    def sweep(self) -> None:
        """Do nothing: an object is there as a whole, or not at all."""

    def free_bytes(self) -> int | None:
        """Return None."""
        return None

    def _path(self, name: str) -> str:
        return f"{self._prefix}/{name}"


def _is_refused(error: OSError) -> bool:
    """Return whether a store refused to replace; not every one says it in the words that AWS has for it."""
    response = getattr(error.__cause__, "response", None) or {}
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    return status == 412 or response.get("Error", {}).get("Code") in ("412", "PreconditionFailed")
