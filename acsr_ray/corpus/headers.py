"""Height and width of an encoded image from its first bytes, without a decoder.

For estimates alone: what decides is what the decoder says of the whole file. EXIF orientation is not looked
at, so an image that lies on its side is told with its sides swapped.
"""

import struct
from collections.abc import Callable

JPEG_FRAMES = frozenset({*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC})
"""Markers of the segments that tell a JPEG's size."""
JPEG_ALONE = frozenset({0x01, 0xFF, *range(0xD0, 0xD8)})
"""Markers without a length."""

Size = tuple[int, int]
"""Height and width in pixels."""


def image_size(data: bytes | None) -> Size | None:
    """Return (height, width) by the header; None for what is no JPEG, PNG, WebP, BMP or GIF, or is cut."""
    if not data:
        return None
    readers: tuple[tuple[bytes, Callable[[bytes], Size | None]], ...] = (
        (b"\xff\xd8\xff", _jpeg),
        (b"\x89PNG", lambda data: struct.unpack_from(">II", data, 16)[::-1]),
        (b"RIFF", _webp),
        (b"BM", _bmp),
        (b"GIF8", lambda data: struct.unpack_from("<HH", data, 6)[::-1]),
    )
    try:
        size = next((read(data) for mark, read in readers if data.startswith(mark)), None)
    except (struct.error, IndexError):
        return None
    return size if size is not None and min(size) > 0 else None


def _jpeg(data: bytes) -> Size | None:
    position = 2
    while data[position] == 0xFF:
        marker = data[position + 1]
        if marker in JPEG_ALONE:
            position += 1 if marker == 0xFF else 2
            continue
        if marker in JPEG_FRAMES:
            height, width = struct.unpack_from(">HH", data, position + 5)
            return height, width
        position += 2 + int(struct.unpack_from(">H", data, position + 2)[0])
    return None


def _webp(data: bytes) -> Size | None:
    kind = data[12:16]
    if kind == b"VP8X":
        width, height = (int.from_bytes(data[at : at + 3], "little") + 1 for at in (24, 27))
        return (height, width) if len(data) >= 30 else None
    if kind == b"VP8L":
        (bits,) = struct.unpack_from("<I", data, 21)
        return (bits >> 14 & 0x3FFF) + 1, (bits & 0x3FFF) + 1
    if kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", data, 26)
        return height & 0x3FFF, width & 0x3FFF
    return None


def _bmp(data: bytes) -> Size | None:
    (header,) = struct.unpack_from("<I", data, 14)
    width, height = struct.unpack_from("<HH" if header == 12 else "<ii", data, 18)
    return abs(height), abs(width)
