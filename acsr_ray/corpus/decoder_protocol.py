"""What a decoding child and its parent say to each other, on the child's standard input and output.

A request is a number of images, and then of each its length and its bytes. There is one answer for each, in
order: a kind, height, width and length, and then RGB pixels or a refusal, which is a reason and a detail
parted by a zero byte. An image that is postponed has to be asked for again.
"""

import struct
from collections.abc import Sequence

COUNT = struct.Struct("<I")
LENGTH = struct.Struct("<Q")
ANSWER = struct.Struct("<cIIQ")
READY, PIXELS, REFUSED, POSTPONED = b"Y", b"P", b"R", b"L"
MOST_PIXEL_BYTES = 2**26
"""Bytes of pixels after which a child postpones the other images of a request: the parent holds one answer
at a time, and a request of small images may be one of very large pictures."""
MOST_DETAIL = 200
"""Characters of a refusal's detail; a decoder's message may quote the file."""


def refusal(reason: str, detail: str) -> bytes:
    """Return the body of an answer that refuses an image."""
    return f"{reason}\0{detail[:MOST_DETAIL]}".encode("utf-8", "replace")


def request(images: Sequence[bytes]) -> bytes:
    """Return the request for some images."""
    parts = [part for data in images for part in (LENGTH.pack(len(data)), data)]
    return b"".join([COUNT.pack(len(images)), *parts])
