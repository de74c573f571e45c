"""Damage that decoders let pass: parts of a file that are missing or changed while pixels still come out.

Pillow does not look at the checksums of a PNG's image data, and libjpeg fills up a JPEG whose scans are
missing. Only the structure is read here; no pixel is decoded.
"""

import re
import struct
import zlib

from acsr_ray.corpus.refusals import ImageError

MAX_SCANS = 500
"""Each scan of a progressive JPEG costs a pass over all its blocks, whatever its own size."""

HUFFMAN_FRAMES = (0xC0, 0xC1, 0xC2)
OTHER_FRAMES = (0xC3, *range(0xC5, 0xC8), *range(0xC9, 0xCC), *range(0xCD, 0xD0))
PROGRESSIVE, START, END, SCAN = 0xC2, 0xD8, 0xD9, 0xDA
# Within a scan, FF 00 is a value and FF D0 to FF D7 are restarts.
MARKER = re.compile(rb"\xff+([^\x00\xff\xd0-\xd7])", re.DOTALL)


def check_png(data: bytes) -> None:
    """Check that all chunks up to IEND are there and have the right checksum.

    Raises:
        ValueError: a chunk is cut or changed, or the end is missing.
    """
    view, position = memoryview(data), 8
    while True:
        if position + 12 > len(data):
            raise ValueError("PNG ends before IEND")
        length, kind = struct.unpack_from(">I4s", data, position)
        end = position + 12 + length
        if end > len(data):
            raise ValueError(f"PNG chunk {kind!r} is cut")
        if zlib.crc32(view[position + 4 : end - 4]) != int.from_bytes(view[end - 4 : end], "big"):
            raise ValueError(f"PNG chunk {kind!r} has a wrong checksum")
        if kind == b"IEND":
            return
        position = end


def check_jpeg(data: bytes) -> None:
    """Check that the scans give every coefficient of every component to its last bit.

    Whether a scan itself is whole, this does not see; a decoder that takes warnings as errors does.

    Raises:
        ValueError: scans are missing, or the file has not the form of a JPEG.
        ImageError: `unsupported_format` for lossless and arithmetic coding, `too_large` for too many scans.
    """
    # For every component how many low bits of each of its 64 coefficients are missing.
    missing: dict[int, list[int]] = {}
    progressive, scans, position = False, 0, 2
    while (marker := MARKER.search(data, position)) and marker[1][0] != END:
        kind, start = marker[1][0], marker.end()
        (length,) = struct.unpack_from(">H", data, start)
        body = data[start + 2 : start + length]
        if kind in OTHER_FRAMES:
            raise ImageError("unsupported_format", f"JPEG coding {kind - 0xC0}")
        if kind == START or (kind in HUFFMAN_FRAMES and missing):
            raise ValueError("two JPEG images in one")
        if kind in HUFFMAN_FRAMES:
            progressive = kind == PROGRESSIVE
            missing = {body[6 + 3 * number]: [16] * 64 for number in range(body[5])}
        elif kind == SCAN:
            scans += 1
            if scans > MAX_SCANS:
                raise ImageError("too_large", f"more than {MAX_SCANS} scans")
            _count_scan(body, missing)
            if not progressive and scans == 1 and len(missing) == body[0]:
                return
        position = start + length
    if not missing or any(map(any, missing.values())):
        raise ValueError("JPEG scans are missing")


def _count_scan(body: bytes, missing: dict[int, list[int]]) -> None:
    count = body[0]
    first, last, precision = body[1 + 2 * count : 4 + 2 * count]
    for number in range(count):
        missing[body[1 + 2 * number]][first : last + 1] = [precision & 15] * (last + 1 - first)
