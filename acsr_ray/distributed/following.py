"""A submitted job, followed to its end: its log as it grows, a stop that is passed on, and its exit code."""

import asyncio
import logging
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TextIO, TypeVar

# Of ray[default], which brings the dashboard.
from aiohttp import ClientError
from ray.dashboard.modules.job.pydantic_models import JobDetails
from ray.job_submission import JobStatus

from acsr_ray.config import AcsrError, FailedError, ResumableStop
from acsr_ray.distributed.dashboard import JobsClient, SubmitError

logger = logging.getLogger(__name__)

POLL_S = 1.0
PATIENCE_S = 120.0
"""How long the dashboard may be away before the job is given up as lost."""
STOP_MARGIN_S = 30.0
"""How much longer than its own time a stop may take until the cluster says that it is done."""
OVER = "a stopped job goes on when it is submitted again"
# What urllib3, asyncio and the dashboard itself raise while a connection comes and goes.
AWAY = (OSError, ClientError, RuntimeError, TimeoutError)


AnswerT = TypeVar("AnswerT")


class JobInterruptedError(ResumableStop):
    """The job ended before its end, and nobody asked for it: worth another attempt."""


class LogTail:
    """A job's log, written as it grows, each character once; a broken connection is made again.

    Args:
        client: of the dashboard.
        submission: the job's id.
        stream: where to.
    """

    def __init__(self, client: JobsClient, submission: str, stream: TextIO | None = None) -> None:
        self._client, self._submission = client, submission
        self._stream = stream or sys.stderr
        self._shown = 0
        self._ended, self._closed = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="log")
        self._thread.start()

    def finish(self) -> None:
        """Wait for the rest of an ended job's log; what the live connection did not bring is asked for."""
        self._ended.set()
        self._thread.join(5)
        self._closed.set()
        with suppress(*AWAY):
            self._write(self._client.get_job_logs(self._submission)[self._shown :])

    def _run(self) -> None:
        while not self._ended.is_set():
            with suppress(*AWAY):
                asyncio.run(self._tail())
            self._ended.wait(POLL_S)

    async def _tail(self) -> None:
        # The dashboard begins at the beginning each time.
        known = self._shown
        async for text in self._client.tail_job_logs(self._submission):
            if self._closed.is_set():
                return
            fresh = text[known:]
            known = max(0, known - len(text))
            self._write(fresh)

    def _write(self, text: str) -> None:
        if text:
            self._stream.write(text)
            self._stream.flush()
            self._shown += len(text)


class Asked:
    """Whether somebody asked to stop; no `Event`, which a handler must not set while it is waited for."""

    def __init__(self) -> None:
        self.is_made = False

    def wait(self, seconds: float) -> None:
        """Wait, or until somebody asks."""
        ends = time.monotonic() + seconds
        while not self.is_made and (left := ends - time.monotonic()) > 0:
            time.sleep(min(0.1, left))


@contextmanager
def asked_to_stop() -> Iterator[Asked]:
    """Give what SIGTERM and Ctrl-C say; a second signal leaves at once.

    Raises:
        ResumableStop: at the second signal, wherever it arrives.
    """
    asked = Asked()

    def on_signal(number: int, frame: FrameType | None) -> None:
        if asked.is_made:
            raise ResumableStop(f"left while the job was being stopped; {OVER}")
        asked.is_made = True

    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = {number: signal.signal(number, on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def follow(client: JobsClient, submission: str, stop_wait_s: int, asked: Asked) -> JobDetails:
    """Show a job's log and return how it ended.

    Args:
        client: of the dashboard.
        submission: the job's id.
        stop_wait_s: seconds that a stop gives the job.
        asked: once it is made, the job is stopped.

    Raises:
        JobInterruptedError: the cluster is gone, or does not know the job any more.
        FailedError: the job does not end although it was stopped.
    """
    tail = LogTail(client, submission)
    try:
        return _until_its_end(client, submission, stop_wait_s, asked)
    finally:
        tail.finish()


def _until_its_end(client: JobsClient, submission: str, stop_wait_s: int, asked: Asked) -> JobDetails:
    answered = time.monotonic()
    stopping: float | None = None
    while True:
        details = _ask(lambda: client.get_job_info(submission))
        now = time.monotonic()
        if details is not None:
            answered = now
            if details.status.is_terminal():
                return details
        elif now - answered > PATIENCE_S:
            raise JobInterruptedError(
                f"the dashboard has not answered for {PATIENCE_S:.0f} s; the job is lost with its head, or "
                f"goes on without being seen: {OVER}"
            )
        if asked.is_made and stopping is None:
            logger.warning("asked to stop: stopping the job, which has %d s", stop_wait_s)
            if _ask(lambda: client.stop_job(submission)) is not None:
                stopping = now
        if stopping is not None and now - stopping > stop_wait_s + STOP_MARGIN_S:
            raise FailedError(f"{submission} does not end although it was stopped {now - stopping:.0f} s ago")
        if stopping is None:
            asked.wait(POLL_S)
        else:
            time.sleep(POLL_S)


def _ask(question: Callable[[], AnswerT]) -> AnswerT | None:
    """Return the dashboard's answer; None while it is away."""
    try:
        return question()
    except SubmitError:
        raise
    except AWAY as error:
        if "status code 404" in str(error):
            raise JobInterruptedError(
                f"the cluster does not know the job; it was started anew: {OVER}"
            ) from None
        return None


def conclusion(details: JobDetails) -> AcsrError | None:
    """Return the error that has the exit code of a job that ended; None for one that is done.

    A driver that a signal killed, and a supervisor that died, are interruptions: what was published is kept,
    and the next attempt goes on.
    """
    code, name = details.driver_exit_code, details.submission_id
    if details.status == JobStatus.SUCCEEDED:
        return None
    if details.status == JobStatus.STOPPED:
        return ResumableStop(f"{name} was stopped; {OVER}")
    if code == ResumableStop.exit_code:
        return JobInterruptedError(f"{name} stopped before its end (exit code 75, see its log); {OVER}")
    if code == SubmitError.exit_code:
        return SubmitError(f"{name} was given settings or input that cannot work (exit code 2, see its log)")
    if code is not None and (code < 0 or code > 128):
        killer = -code if code < 0 else code - 128
        return JobInterruptedError(f"the driver of {name} was killed by signal {killer}; {OVER}")
    if code is not None:
        return FailedError(f"{name} failed with exit code {code}, see its log")
    kind = details.error_type or "no reason given"
    if kind == "RUNTIME_ENV_SETUP_FAILURE":
        return SubmitError(f"the runtime environment of {name} cannot be set up: {details.message}")
    return JobInterruptedError(f"{name} was lost ({kind}): {details.message}; {OVER}")
