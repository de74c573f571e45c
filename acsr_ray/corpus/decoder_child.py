"""The child process of `acsr_ray.corpus.isolated`: decodes one image after another until its input ends.

Run as `python -m acsr_ray.corpus.decoder_child LIMITS MEGABYTES PARENT`. It must start fast and stay small:
no torch, Ray or Arrow here.
"""

import contextlib
import ctypes
import os
import resource
import signal
import sys
from pathlib import Path
from typing import BinaryIO

import numpy as np

from acsr_ray.corpus.decoder_protocol import (
    ANSWER,
    COUNT,
    LENGTH,
    MOST_PIXEL_BYTES,
    PIXELS,
    POSTPONED,
    READY,
    REFUSED,
    refusal,
)
from acsr_ray.corpus.images import DecodeLimits, decode_image
from acsr_ray.corpus.refusals import ImageError

BUFFER = 2**16
PR_SET_PDEATHSIG = 1
FIRST_VICTIM = "1000"
"""The highest `oom_score_adj`: out of memory, the kernel takes this process before its parent."""


def main() -> None:
    """Serve until standard input ends."""
    limits = DecodeLimits.model_validate_json(sys.argv[1])
    megabytes, parent = int(sys.argv[2]), int(sys.argv[3])
    answers = _private_output()
    _restrain(megabytes, parent)
    answers.write(ANSWER.pack(READY, 0, 0, 0))
    answers.flush()
    requests = os.fdopen(0, "rb", buffering=BUFFER)
    while len(header := requests.read(COUNT.size)) == COUNT.size:
        spent = 0
        for _ in range(*COUNT.unpack(header)):
            (length,) = LENGTH.unpack(requests.read(LENGTH.size))
            data = requests.read(length)
            if spent > MOST_PIXEL_BYTES:
                answers.write(ANSWER.pack(POSTPONED, 0, 0, 0))
                continue
            for part in _answer(data, limits):
                answers.write(part)
                spent += len(part)
        # Not after every image: waking the parent takes longer than a small image.
        answers.flush()


def _answer(data: bytes, limits: DecodeLimits) -> tuple[bytes | memoryview, ...]:
    try:
        pixels = np.ascontiguousarray(decode_image(data, limits))
        height, width = pixels.shape[:2]
        return ANSWER.pack(PIXELS, height, width, pixels.nbytes), pixels.data.cast("B")
    except ImageError as error:
        body = refusal(error.reason, error.detail)
    except MemoryError:
        body = refusal("decoder_memory", "")
    return ANSWER.pack(REFUSED, 0, 0, len(body)), body


def _private_output() -> BinaryIO:
    """Move the answers to a descriptor of their own: what a library prints must not become an answer."""
    answers = os.fdopen(os.dup(1), "wb", buffering=BUFFER)
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    # From here on nobody reads what decoders complain; until here, it says why the child did not start.
    os.dup2(silence, 2)
    return answers


def _restrain(megabytes: int, parent: int) -> None:
    """Limit what this process can do to others, as far as the system lets it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            raise SystemExit("the parent is gone")
        with contextlib.suppress(OSError):
            Path("/proc/self/oom_score_adj").write_text(FIRST_VICTIM)
    # A system that has no such limit, or a lower one already, keeps what it has.
    with contextlib.suppress(OSError, ValueError):
        most = _mapped_bytes() + megabytes * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


def _mapped_bytes() -> int:
    """Return the address space that the interpreter and its libraries already take, 0 where unknown."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGESIZE")
    except OSError:
        return 0


if __name__ == "__main__":
    main()
