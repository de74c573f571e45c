"""Decoding in a child process, so that an image that crashes, hangs or eats memory hurts nobody else.

The child is a program of its own, not a fork and not `multiprocessing`'s: it inherits neither the threads of
a Ray worker nor its `__main__`. It is replaced when it fails and now and then, and dies with its parent.
"""

import contextlib
import fcntl
import os
import select
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Self

import numpy as np
from pydantic import Field

import acsr_ray
from acsr_ray.config import AcsrError, Settings
from acsr_ray.corpus.conversion import Pixels
from acsr_ray.corpus.decoder_protocol import ANSWER, MOST_DETAIL, PIXELS, POSTPONED, READY, REFUSED, request
from acsr_ray.corpus.images import DecodeLimits, check_bytes
from acsr_ray.corpus.refusals import REASONS, ImageError, Reason

ATTEMPTS = 2
"""How often an image is tried alone before it is given up; a child may die of something else."""
TOGETHER, TOGETHER_BYTES = 32, 2**18
"""Most images, and most bytes of more than one, that go to the child in one request."""
PIPE_BYTES = 2**20
START_SECONDS = 120.0
STOP_SECONDS = 5.0
LONGEST_REFUSAL = 8 * MOST_DETAIL
REASON_OF: dict[str, Reason] = {reason: reason for reason in REASONS}


class DecoderSettings(Settings):
    """Bounds on the process that decodes; none of them changes a pixel."""

    timeout_s: float = Field(30.0, gt=0)
    """Longest time for one image, in seconds; it is tried two or three times."""
    memory_megabytes: int = Field(2048, gt=0)
    """Most memory the decoder may ask for beyond its own, in MiB."""
    recycle_after: int = Field(10_000, gt=0)
    """Images after which the process is replaced, so that leaks stay small."""


class DecoderStartError(AcsrError, RuntimeError):
    """The decoding process does not start: nothing is known about any image."""


class _ChildError(Exception):
    """The child did not do its work; it must be replaced."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(detail)
        self.reason: Reason = reason
        self.detail = detail


DEFAULT_DECODER = DecoderSettings()
CHILD = (sys.executable, "-P", "-m", "acsr_ray.corpus.decoder_child")


class IsolatedDecoder:
    """Decodes as `decode_image` does, in a child process that is started on first use.

    Args:
        limits: what is refused before it is decoded.
        settings: bounds on the child.
        command: the child's program; the arguments of `decoder_child` are appended.
    """

    def __init__(
        self,
        limits: DecodeLimits,
        settings: DecoderSettings = DEFAULT_DECODER,
        command: Sequence[str] = CHILD,
    ) -> None:
        self.limits = limits
        self.settings = settings
        self.command = command
        self._child: _Child | None = None
        # Answers carry no names: two threads in turn on one child would get each other's pixels.
        self._turn = threading.Lock()

    def decode(self, data: bytes | None) -> Pixels:
        """Decode one image to RGB pixels.

        Returns:
            (H, W, 3) uint8.

        Raises:
            ImageError: as `decode_image`, and `decoder_crash` or `decoder_timeout`.
            DecoderStartError: no child can be started.
        """
        (outcome,) = self.decode_all([data])
        if isinstance(outcome, ImageError):
            raise outcome
        return outcome

    def decode_all(self, images: Iterable[bytes | None]) -> Iterator[Pixels | ImageError]:
        """Decode images in their order; small ones go to the child together, which is faster.

        Yields:
            for each image its pixels, (H, W, 3) uint8, or why it has none.

        Raises:
            DecoderStartError: no child can be started.
        """
        together: list[bytes] = []
        for data in images:
            try:
                checked = check_bytes(data, self.limits)
            except ImageError as refused:
                yield from self._decode_together(together)
                together = []
                yield refused
                continue
            if len(together) == TOGETHER or sum(map(len, together)) + len(checked) > TOGETHER_BYTES:
                yield from self._decode_together(together)
                together = []
            together.append(checked)
        yield from self._decode_together(together)

    def _decode_together(self, images: list[bytes]) -> Iterator[Pixels | ImageError]:
        while len(images) > 1:
            try:
                outcomes = self._exchange(images)
            except _ChildError:
                break
            yield from outcomes
            # What the child postponed comes next, so that no more than one answer is held.
            images = images[len(outcomes) :]
        # Whichever of them the child died of, only that one is refused.
        for data in images:
            yield self._decode_alone(data)

    def _decode_alone(self, data: bytes) -> Pixels | ImageError:
        for _ in range(ATTEMPTS):
            try:
                return self._exchange([data])[0]
            except _ChildError as error:
                failure = error
        return ImageError(failure.reason, failure.detail)

    def _exchange(self, images: list[bytes]) -> list[Pixels | ImageError]:
        with self._turn:
            try:
                return self._ready_child().decode(images, self.settings.timeout_s)
            except BaseException:
                # Also when interrupted: the answer may still come, and would be taken for the next image's.
                self._drop()
                raise

    def close(self) -> None:
        """End the child; the next `decode` starts another."""
        with self._turn:
            self._drop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def pid(self) -> int | None:
        """Process id of the child, None when there is none."""
        return self._child.process.pid if self._child else None

    def _ready_child(self) -> "_Child":
        child = self._child
        # One that died between two images did not die of the next one.
        if child and (child.images >= self.settings.recycle_after or child.process.poll() is not None):
            self._drop()
        if self._child is None:
            self._child = _Child(self.limits, self.settings.memory_megabytes, self.command)
        return self._child

    def _drop(self) -> None:
        if self._child is not None:
            self._child.stop()
            self._child = None


class _Child:
    """One process and its pipes, which never block longer than a deadline."""

    def __init__(self, limits: DecodeLimits, megabytes: int, command: Sequence[str]) -> None:
        self.limits = limits
        self.images = 0
        self._unsent = memoryview(b"")
        with tempfile.TemporaryFile() as complaints:
            self.process = subprocess.Popen(
                [*command, limits.model_dump_json(), str(megabytes), str(os.getpid())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=complaints,
                env=_environment(),
                start_new_session=True,
            )
            self.stop = weakref.finalize(self, _stop, self.process)
            self._requests, self._answers = map(_open_pipe, (self.process.stdin, self.process.stdout))
            self._readable, self._both = select.poll(), select.poll()
            self._readable.register(self._answers, select.POLLIN)
            self._both.register(self._answers, select.POLLIN)
            self._both.register(self._requests, select.POLLOUT)
            try:
                kind = ANSWER.unpack(self._read(ANSWER.size, time.monotonic() + START_SECONDS))[0]
            except _ChildError as error:
                self.stop()
                complaints.seek(0)
                said = complaints.read().decode(errors="replace").strip().splitlines() or [error.detail]
                raise DecoderStartError(f"the decoding process does not start: {said[-1]}") from error
        if kind != READY:
            self.stop()
            raise DecoderStartError("the decoding process does not start: it speaks another language")

    def decode(self, images: list[bytes], seconds: float) -> list[Pixels | ImageError]:
        """Decode images; on `_ChildError` the child is of no more use.

        Args:
            images: encoded.
            seconds: longest time from one answer to the next.

        Returns:
            The outcomes of the first of them, at least one; the others are postponed.
        """
        self.images += len(images)
        self._unsent = memoryview(request(images))
        outcomes = [self._outcome(time.monotonic() + seconds) for _ in images]
        first = next((at for at, outcome in enumerate(outcomes) if outcome is None), len(outcomes))
        done = [outcome for outcome in outcomes[:first] if outcome is not None]
        if not done:
            raise _ChildError("decoder_crash", "an answer without a meaning")
        return done

    def _outcome(self, deadline: float) -> Pixels | ImageError | None:
        kind, height, width, length = ANSWER.unpack(self._read(ANSWER.size, deadline))
        if kind == POSTPONED:
            return None
        # A child that a hostile image has taken over must not make its parent allocate what it likes.
        if kind == PIXELS and length == 3 * height * width and self._allowed(height, width):
            return np.frombuffer(self._read(length, deadline), np.uint8).reshape(height, width, 3)
        if kind == REFUSED and length <= LONGEST_REFUSAL:
            reason, _, detail = self._read(length, deadline).decode(errors="replace").partition("\0")
            # Memory may be short because of earlier images.
            if reason == "decoder_memory":
                raise _ChildError("decoder_memory", detail)
            if reason in REASON_OF:
                return ImageError(REASON_OF[reason], detail)
        raise _ChildError("decoder_crash", "an answer without a meaning")

    def _allowed(self, height: int, width: int) -> bool:
        few = height * width <= self.limits.max_megapixels * 1e6
        return few and min(height, width) > 0 and max(height, width) <= self.limits.max_side

    def _read(self, length: int, deadline: float) -> bytearray:
        """Read an answer, and send meanwhile what of the request the child has room for."""
        data = bytearray(length)
        rest = memoryview(data)
        while rest:
            self._send()
            left = deadline - time.monotonic()
            waiting = self._both if self._unsent else self._readable
            if left <= 0 or not (ready := waiting.poll(left * 1000)):
                raise _ChildError("decoder_timeout", "no answer in time")
            if any(pipe == self._answers for pipe, _ in ready):
                count = os.readv(self._answers, [rest])
                if not count:
                    raise self._dead()
                rest = rest[count:]
        return data

    def _send(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while self._unsent:
                try:
                    self._unsent = self._unsent[os.write(self._requests, self._unsent) :]
                except BrokenPipeError as error:
                    raise self._dead() from error

    def _dead(self) -> _ChildError:
        try:
            code = self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            return _ChildError("decoder_crash", "the decoding process closed its pipes")
        return _ChildError("decoder_crash", f"the decoding process ended with {code}")


def _environment() -> dict[str, str]:
    # Workers find the package in more ways than a fresh interpreter; threads would count as memory.
    root = str(Path(acsr_ray.__file__).parents[1])
    path = os.pathsep.join([root, *filter(None, sys.path)])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def _open_pipe(end: IO[bytes] | None) -> int:
    """Return the descriptor of a pipe, which does not block any more and, where that can be set, is large."""
    if end is None:
        raise ValueError("no pipe")
    os.set_blocking(end.fileno(), False)
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            fcntl.fcntl(end, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    return end.fileno()


def _stop(process: "subprocess.Popen[bytes]") -> None:
    """Kill: a child has nothing to save."""
    process.kill()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(STOP_SECONDS)
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()
