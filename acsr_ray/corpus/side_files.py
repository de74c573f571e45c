"""Small files that tell of a run, written beside it: never waited for, and trouble with them is only told.

A thread of its own writes the last content that each file was given; what came in between is not missed.
"""

import logging
import threading
import time
from collections.abc import Callable

from acsr_ray.storage import Storage, StorageError

logger = logging.getLogger(__name__)

TRIES = 2
"""Of one write that finds its staging file swept away, by this run itself or by another one."""


class SideWriter:
    """Writes files of a storage in the background; each write replaces its file at once or not at all.

    Args:
        storage: where; asked once for each write, however long that takes.
        is_ours: whether the run still may write there; what it is given after that is dropped.
    """

    def __init__(self, storage: Storage, is_ours: Callable[[], bool] = lambda: True) -> None:
        self._storage, self._is_ours = storage, is_ours
        self._changed = threading.Condition()
        self._waiting: dict[str, bytes] = {}
        self._is_busy = self._has_warned = False
        self._ends: float | None = None
        """When `close` gives up, once it was called."""
        self._thread = threading.Thread(target=self._work, daemon=True, name="side-files")
        self._thread.start()

    def put(self, name: str, data: bytes) -> None:
        """Give a file its content, in place of what it was given and does not have yet."""
        with self._changed:
            self._waiting[name] = data
            self._changed.notify_all()

    def close(self, seconds: float) -> bool:
        """Take nothing more; try so long to write what was given, and return whether it came to an end."""
        ends = time.monotonic() + seconds
        with self._changed:
            self._ends = ends
            self._changed.notify_all()
            while (self._waiting or self._is_busy) and self._thread.is_alive():
                left = ends - time.monotonic()
                if left <= 0:
                    # What is under way may still end well; nothing is begun after the run.
                    self._waiting.clear()
                    logger.warning("%s does not answer: the run's record may not be complete", self._root)
                    return False
                self._changed.wait(min(left, 0.2))
        return True

    @property
    def _root(self) -> str:
        return self._storage.root

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._waiting:
                    if self._ends is not None:
                        return
                    self._changed.wait()
                name = next(iter(self._waiting))
                data = self._waiting.pop(name)
                self._is_busy = True
            try:
                if self._is_ours():
                    self._write(name, data)
            finally:
                with self._changed:
                    self._is_busy = False
                    self._changed.notify_all()

    def _write(self, name: str, data: bytes) -> None:
        for _ in range(TRIES):
            try:
                # One try while the run goes on: the next content comes soon. The last one has none after it.
                left = 0.0 if self._ends is None else max(0.0, self._ends - time.monotonic())
                self._storage.write(name, data, deadline_s=left)
                return
            except FileNotFoundError as gone:
                error: Exception = gone
            except (StorageError, OSError) as refused:
                error = refused
                break
        if not self._has_warned:
            self._has_warned = True
            logger.warning("%s is not up to date, the run goes on: %s", name, error)
