"""How many frames a file claims to have, found without decoding one."""

import struct

from PIL import Image


def count_frames(image: Image.Image, data: bytes, most: int) -> int:
    """Return the number of frames or pages; counting stops once there are more than `most`.

    Args:
        image: the opened file, no pixel of which was loaded.
        data: the file.
        most: where counting stops.

    Raises:
        ValueError, IndexError, struct.error: a file that is not of its format, or is cut.
    """
    # Pillow counts the frames of these two by seeking through all of them.
    if image.format == "GIF":
        return _gif_frames(data, most)
    if image.format == "TIFF":
        return _tiff_pages(data, most)
    return int(getattr(image, "n_frames", 1))


def _colours(flags: int) -> int:
    """Return the bytes of a colour table by the flags that announce it."""
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0


def _gif_frames(data: bytes, most: int) -> int:
    position = 13 + _colours(data[10])
    frames = 0
    # A file without the end mark is left to the decoder, which needs only the first frame.
    while position < len(data) and data[position] != 0x3B and frames <= most:
        if data[position] == 0x2C:
            frames += 1
            position += 11 + _colours(data[position + 9])
        elif data[position] == 0x21:
            position += 2
        else:
            raise ValueError(f"GIF block {data[position]}")
        while position < len(data) and data[position]:
            position += 1 + data[position]
        position += 1
    return frames


def _tiff_pages(data: bytes, most: int) -> int:
    order = "<" if data[:2] == b"II" else ">"
    version = struct.unpack_from(f"{order}H", data, 2)[0]
    where, count, entry = ("I", "H", 12) if version == 42 else ("Q", "Q", 20)
    (position,) = struct.unpack_from(order + where, data, 4 if version == 42 else 8)
    pages = 0
    # A chain that bites its tail has more pages than any limit.
    while position and pages <= most:
        pages += 1
        (tags,) = struct.unpack_from(order + count, data, position)
        (position,) = struct.unpack_from(
            order + where, data, position + struct.calcsize(order + count) + tags * entry
        )
    return pages
