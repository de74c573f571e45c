"""A clean stop on SIGTERM: what is begun is published, and the job ends as one that can be resumed."""

import logging
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from acsr_ray.config import ResumableStop

logger = logging.getLogger(__name__)

GRACE_S = 18.0
"""How long units in flight have to be published; with committing and leaving Ray that is under 30 s."""


class StopRequested(ResumableStop):
    """The job was asked to stop from outside: nothing in it tries again."""


class StopRequest:
    """Whether the job was asked to stop, and since when."""

    def __init__(self) -> None:
        self._since: float | None = None

    @property
    def is_made(self) -> bool:
        """Whether it was."""
        return self._since is not None

    @property
    def is_overdue(self) -> bool:
        """Whether the time for units in flight is over."""
        return self._since is not None and time.monotonic() - self._since > GRACE_S

    def check(self) -> None:
        """Raise `ResumableStop` if the job was asked to stop."""
        if self.is_made:
            raise StopRequested("stopped on request; the same command goes on from here")

    def listen(self) -> None:
        """Take SIGTERM, again after something else took it; only the main thread can."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._since is None:
            self._since = time.monotonic()
            logger.warning("asked to stop: finishing and publishing what is begun")


@contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Give a request that SIGTERM makes; the handler before is back afterwards."""
    before = signal.getsignal(signal.SIGTERM)
    request = StopRequest()
    request.listen()
    try:
        yield request
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)
