"""Lines that workers far away want the user of a job to see, carried to the log of the driver."""

import contextlib
import logging
import threading
from collections.abc import Iterator
from typing import Any

import ray
from ray.actor import ActorHandle

logger = logging.getLogger(__name__)

POLL_S = 1.0
WAIT_S = 10.0
"""A cluster that went away must not hold up the end of the job."""


class _Journal:
    def __init__(self) -> None:
        self._lines: list[str] = []

    def add(self, line: str) -> None:
        self._lines.append(line)

    def take(self) -> list[str]:
        lines, self._lines = self._lines, []
        return lines


@contextlib.contextmanager
def journal() -> Iterator["ActorHandle[Any]"]:
    """Give an actor whose `add.remote(line)` logs a line here; a Ray session must be open.

    Workers' own logs stay in Ray's files: forwarding them all would bury these lines.
    """
    actor: Any = ray.remote(_Journal).options(num_cpus=0, max_restarts=-1).remote()
    closing = threading.Event()

    def follow() -> None:
        while not closing.wait(POLL_S):
            _log(actor)

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield actor
    finally:
        closing.set()
        thread.join()
        _log(actor)
        ray.kill(actor)


def _log(actor: "ActorHandle[Any]") -> None:
    try:
        lines: list[str] = ray.get(actor.take.remote(), timeout=WAIT_S)
    except ray.exceptions.RayError as error:
        # Lost lines cost nothing but their news.
        logger.debug("the journal is away: %s", error)
        return
    for line in lines:
        logger.info("%s", line)
