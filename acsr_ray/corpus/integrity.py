"""Damage that decoders let pass: parts of a file that are missing or changed while pixels still come out.

Pillow does not look at the checksums of a PNG's image data and leaves missing rows black, and libjpeg fills
up a JPEG whose scans are missing.
"""

import re
import struct
import zlib
from collections.abc import Iterator

from PIL import Image

from acsr_ray.corpus.refusals import ImageError

MAX_SCANS = 500
"""Each scan of a progressive JPEG costs a pass over all its blocks, whatever its own size."""

PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
"""First column and row of each pass, and the steps to the next ones."""
INFLATED_AT_ONCE = 2**20

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
    for kind, body, checksum in _png_chunks(data):
        if zlib.crc32(body, zlib.crc32(kind)) != checksum:
            raise ValueError(f"PNG chunk {kind!r} has a wrong checksum")


def check_png_rows(image: Image.Image, data: bytes) -> None:
    """Check that a loaded PNG has all its rows.

    Raises:
        ValueError: its compressed data end early.
    """
    width, height = image.size
    interlaced = bool(data[28])
    # Missing rows are zero, so most images need no second look.
    if interlaced or not any(image.crop((0, height - 1, width, height)).tobytes()):
        pixel = data[24] * PNG_CHANNELS[data[25]]
        grids = _adam7(width, height) if interlaced else [(width, height)]
        wanted = sum(rows * (1 + (columns * pixel + 7) // 8) for columns, rows in grids if columns)
        if _inflates_to_less(data, wanted):
            raise ValueError("PNG rows are missing")


def _adam7(width: int, height: int) -> list[tuple[int, int]]:
    """Return the columns and rows of the seven passes of an interlaced PNG."""
    return [(-(-(width - x) // dx), -(-(height - y) // dy)) for x, y, dx, dy in ADAM7]


def _inflates_to_less(data: bytes, wanted: int) -> bool:
    inflater = zlib.decompressobj()
    for kind, body, _ in _png_chunks(data):
        rest: bytes | memoryview = body if kind == b"IDAT" else b""
        while rest and wanted > 0:
            wanted -= len(inflater.decompress(rest, min(wanted, INFLATED_AT_ONCE)))
            rest = inflater.unconsumed_tail
    return wanted > 0


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, memoryview, int]]:
    """Yield kind, body and checksum of the chunks up to IEND."""
    view, position, kind = memoryview(data), 8, b""
    while kind != b"IEND":
        if position + 12 > len(data):
            raise ValueError("PNG ends before IEND")
        length, kind = struct.unpack_from(">I4s", data, position)
        end = position + 12 + length
        if end > len(data):
            raise ValueError(f"PNG chunk {kind!r} is cut")
        yield kind, view[position + 8 : end - 4], int.from_bytes(view[end - 4 : end], "big")
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
