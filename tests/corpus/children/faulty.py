"""The decoding child with a weakness: images that begin with a word make it crash, hang or lie.

Every such image adds a line to the file that FAULTS names, which counts how often it was tried.
"""

import ctypes
import os
import sys
import time
from pathlib import Path

import numpy as np

from acsr_ray.corpus import decoder_child

decode_image = decoder_child.decode_image


def decode(data: bytes, limits: object) -> np.ndarray:
    word = data[:5].decode("latin-1")
    if word in ("CRASH", "SLEEP", "SPINS", "LARGE", "SHAPE", "PRINT"):
        with Path(os.environ["FAULTS"]).open("a") as faults:
            faults.write(f"{word}\n")
    if word == "CRASH":
        ctypes.string_at(0)
    if word == "SLEEP":
        time.sleep(1000)
    while word == "SPINS":
        pass
    if word == "LARGE":
        decoder_child.ANSWER = Lie(2**31, 2**31)
    if word == "SHAPE":
        decoder_child.ANSWER = Lie(3, 3)
    if word == "PRINT":
        os.write(1, b"a library's chatter" * 100)
        print("more of it", flush=True)
    return decode_image(data[5:] if word == "PRINT" else data, limits)


class Lie:
    """Answers that say another size than their pixels have."""

    size = decoder_child.ANSWER.size

    def __init__(self, height: int, width: int) -> None:
        self.sizes = height, width
        self.true = decoder_child.ANSWER

    def pack(self, kind: bytes, height: int, width: int, length: int) -> bytes:
        return self.true.pack(decoder_child.PIXELS, *self.sizes, length)


decoder_child.decode_image = decode
if __name__ == "__main__":
    sys.exit(decoder_child.main())
