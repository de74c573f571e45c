"""Makers of images that Pillow does not write: PNGs of any depth, JPEGs of any layout, run-length BMPs."""

import struct
import zlib
from collections.abc import Callable, Sequence

import numpy as np
import pytest

SIGNATURE = b"\x89PNG\r\n\x1a\n"


def make_png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def make_raw_png(
    samples: np.ndarray, colour_type: int, depth: int, before: bytes = b"", after: bytes = b""
) -> bytes:
    """Return a PNG of (H, W, C) samples as they are, with whole chunks before and after its pixels."""
    height, width, channels = samples.shape
    rows = samples.reshape(height, width * channels).astype(">u2")
    bits = np.unpackbits(rows.view(np.uint8).reshape(height, -1, 2), axis=2)[..., 16 - depth :]
    lines = np.packbits(bits.reshape(height, -1), axis=1)
    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    filtered = b"".join(b"\0" + line.tobytes() for line in lines)
    chunks = make_png_chunk(b"IHDR", header), before, make_png_chunk(b"IDAT", zlib.compress(filtered)), after
    return SIGNATURE + b"".join(chunks) + make_png_chunk(b"IEND", b"")


def jpeg_segment(marker: int, body: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body


def make_flat_jpeg(
    height: int, width: int, sampling: Sequence[tuple[int, int]], scans: Sequence[Sequence[int]] | None = None
) -> bytes:
    """Return a sequential JPEG all of whose coefficients are zero, which is mid-grey.

    Args:
        height: in pixels.
        width: in pixels.
        sampling: horizontal and vertical factor of each component.
        scans: which components each scan has; all in one when omitted.
    """
    count = len(sampling)
    frame = b"".join(bytes([number + 1, h << 4 | v, 0]) for number, (h, v) in enumerate(sampling))
    # One code, of one bit, for "no difference" and for "end of block".
    codes = b"\1" + bytes(15) + b"\0"
    data = b"\xff\xd8" + jpeg_segment(0xDB, b"\0" + b"\1" * 64)
    data += jpeg_segment(0xC0, struct.pack(">BHHB", 8, height, width, count) + frame)
    data += jpeg_segment(0xC4, b"\0" + codes) + jpeg_segment(0xC4, b"\x10" + codes)
    most_h, most_v = (max(factors) for factors in zip(*sampling, strict=True))
    for members in scans or [range(count)]:
        selected = b"".join(bytes([number + 1, 0]) for number in members)
        data += jpeg_segment(0xDA, bytes([len(members)]) + selected + b"\0\x3f\0")
        if len(members) == 1:
            ((h, v),) = (sampling[number] for number in members)
            blocks = -(-height * v // (8 * most_v)) * -(-width * h // (8 * most_h))
        else:
            units = -(-height // (8 * most_v)) * -(-width // (8 * most_h))
            blocks = units * sum(sampling[number][0] * sampling[number][1] for number in members)
        bits = 2 * blocks
        data += bytes(bits // 8) + (bytes([0xFF >> bits % 8]) if bits % 8 else b"")
    return data + b"\xff\xd9"


def make_rle_bmp(indices: np.ndarray, palette: np.ndarray) -> bytes:
    """Return an 8-bit run-length BMP of (H, W) indices into (N, 3) colours."""
    height, width = indices.shape
    body = b""
    for row in indices[::-1].tolist():
        start = 0
        while start < width:
            end = start + 1
            while end < width and end - start < 255 and row[end] == row[start]:
                end += 1
            body += bytes([end - start, row[start]])
            start = end
        body += b"\0\0"
    body += b"\0\1"
    colours = b"".join(bytes([blue, green, red, 0]) for red, green, blue in palette.tolist())
    offset = 14 + 40 + len(colours)
    header = struct.pack("<2sIHHI", b"BM", offset + len(body), 0, 0, offset)
    sizes = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(body), 0, 0, len(palette), 0)
    return header + sizes + colours + body


@pytest.fixture(scope="session")
def png_chunk() -> Callable[..., bytes]:
    return make_png_chunk


@pytest.fixture(scope="session")
def raw_png() -> Callable[..., bytes]:
    return make_raw_png


@pytest.fixture(scope="session")
def flat_jpeg() -> Callable[..., bytes]:
    return make_flat_jpeg


@pytest.fixture(scope="session")
def rle_bmp() -> Callable[..., bytes]:
    return make_rle_bmp
