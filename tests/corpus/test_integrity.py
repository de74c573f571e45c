"""Damage never becomes pixels: a cut file is refused, or what was cut off was no part of the image."""

import io
import struct
import zlib

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from acsr_ray.corpus.images import DecodeLimits, ImageError, decode_image
from acsr_ray.corpus.integrity import MAX_SCANS

LIMITS = DecodeLimits(extra_formats=("GIF", "TIFF"))
END = b"\xff\xd9"


def encoded(image: Image.Image, fmt: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, fmt, **options)
    return buffer.getvalue()


def photo(channels: int = 3) -> np.ndarray:
    generator = np.random.default_rng(channels)
    coarse = Image.fromarray(generator.integers(0, 256, (4, 4, channels)).astype(np.uint8).squeeze())
    pixels = np.asarray(coarse.resize((61, 47), Image.Resampling.BICUBIC)).astype(float)
    return np.clip(pixels + generator.normal(0, 8, pixels.shape), 0, 255).astype(np.uint8)


IMAGE = Image.fromarray(photo())
JPEGS = {
    "baseline": encoded(IMAGE, "JPEG"),
    "fine": encoded(IMAGE, "JPEG", quality=95, subsampling=0),
    "restarts": encoded(IMAGE, "JPEG", restart_marker_rows=1),
    "progressive": encoded(IMAGE, "JPEG", progressive=True),
    "grey": encoded(IMAGE.convert("L"), "JPEG"),
    "grey-progressive": encoded(IMAGE.convert("L"), "JPEG", progressive=True),
    "cmyk": encoded(IMAGE.convert("CMYK"), "JPEG"),
    "cmyk-progressive": encoded(IMAGE.convert("CMYK"), "JPEG", progressive=True),
    "ycck": simplejpeg.encode_jpeg(photo(4), 85, colorspace="CMYK", colorsubsampling="420"),
}


def outcome(data: bytes) -> np.ndarray | str:
    try:
        return decode_image(data, LIMITS)
    except ImageError as refused:
        return refused.reason


def reason_of(data: bytes) -> str:
    found = outcome(data)
    assert isinstance(found, str)
    return found


@pytest.mark.parametrize("kind", JPEGS)
def test_a_cut_jpeg_with_an_end_is_refused(kind):
    data = JPEGS[kind]
    assert data.endswith(END)
    assert decode_image(data, LIMITS).shape == (47, 61, 3)
    # The last byte may hold nothing but padding, which libjpeg does without.
    for kept in range(3, len(data) - 4, 5):
        assert reason_of(data[:kept] + END) == "decode_error", kept
        assert reason_of(data[:kept]) == "decode_error", kept


@pytest.mark.parametrize("kind", [kind for kind in JPEGS if "progressive" in kind])
def test_a_jpeg_without_its_last_scans_is_refused(kind):
    data = JPEGS[kind]
    scans = [place for place in range(len(data)) if data[place : place + 2] in (b"\xff\xda", b"\xff\xc4")]
    assert len(scans) > 6
    for place in scans:
        # Pillow takes what libjpeg makes of these: a picture without its details.
        assert reason_of(data[:place] + END) == "decode_error", place


@pytest.mark.parametrize("kind", JPEGS)
def test_a_hole_in_a_jpeg_is_refused(kind):
    data = JPEGS[kind]
    middle = len(data) * 2 // 3
    assert reason_of(data[:middle] + b"\xff\xfe\x00\x02" + data[middle:]) == "decode_error"
    assert reason_of(data[:middle] + bytes([0xFF, 0x10]) + data[middle + 2 :]) == "decode_error"


def test_scans_of_single_components(flat_jpeg):
    sampling = [(2, 2), (1, 1), (1, 1)]
    whole = flat_jpeg(37, 50, sampling, scans=[[0], [1], [2]])
    assert (decode_image(whole, LIMITS) == 128).all()
    assert reason_of(flat_jpeg(37, 50, sampling, scans=[[0], [2]])) == "decode_error"
    assert reason_of(flat_jpeg(37, 50, sampling, scans=[[0]])) == "decode_error"


@pytest.mark.parametrize("sampling", [[(1, 1)], [(1, 1)] * 3, [(4, 1), (1, 1), (1, 1)], [(2, 2)]])
def test_usual_chroma_sampling(flat_jpeg, sampling):
    assert (decode_image(flat_jpeg(37, 50, sampling), LIMITS) == 128).all()


@pytest.mark.parametrize("sampling", [[(3, 1), (1, 1), (1, 1)], [(4, 2), (1, 1), (1, 1)]])
def test_unusual_chroma_sampling_is_refused(flat_jpeg, sampling):
    assert reason_of(flat_jpeg(37, 50, sampling)) == "unsupported_format"


@pytest.mark.parametrize("frame", [0xC3, 0xC9, 0xCA])
def test_lossless_and_arithmetic_jpegs_are_refused(frame):
    data = JPEGS["baseline"].replace(b"\xff\xc0", bytes([0xFF, frame]))
    assert reason_of(data) == "unsupported_format"


def test_two_jpeg_headers_are_refused(flat_jpeg):
    data = flat_jpeg(16, 16, [(1, 1)])
    frame = data.index(b"\xff\xc0")
    second = data[frame : frame + 13].replace(struct.pack(">HH", 16, 16), struct.pack(">HH", 65500, 65500))
    assert reason_of(data[:frame] + second + data[frame:]) in ("decode_error", "too_large")
    assert reason_of(data[: frame + 13] + second + data[frame + 13 :]) in ("decode_error", "too_large")


def test_scans_are_limited():
    data = JPEGS["progressive"]
    last = data.rindex(b"\xff\xda")
    repeated = data[:last] + data[last:-2] * (MAX_SCANS + 1) + END
    assert reason_of(repeated) == "too_large"


PALETTED = IMAGE.quantize(16)
OTHERS = {
    "png": encoded(IMAGE, "PNG"),
    "palette-png": encoded(PALETTED, "PNG"),
    "one-bit-png": encoded(IMAGE.convert("1"), "PNG"),
    "webp": encoded(IMAGE, "WEBP"),
    "lossless-webp": encoded(IMAGE, "WEBP", lossless=True),
    "animated-webp": encoded(IMAGE, "WEBP", save_all=True, append_images=[IMAGE.rotate(90)]),
    "bmp": encoded(IMAGE, "BMP"),
    "gif": encoded(PALETTED, "GIF"),
    "tiff": encoded(IMAGE, "TIFF"),
    "lzw-tiff": encoded(IMAGE, "TIFF", compression="tiff_lzw"),
    "deflate-tiff": encoded(IMAGE, "TIFF", compression="tiff_adobe_deflate"),
    "packbits-tiff": encoded(IMAGE, "TIFF", compression="packbits"),
}


@pytest.fixture
def others(rle_bmp) -> dict[str, bytes]:
    palette = np.array(PALETTED.getpalette(), np.uint8).reshape(-1, 3)
    return {**OTHERS, "rle-bmp": rle_bmp(np.asarray(PALETTED), palette)}


def with_end(kind: str, data: bytes) -> bytes:
    """Return a cut file with its end mark, or with the sizes of its chunks corrected."""
    if "png" in kind:
        return data + b"\0\0\0\0IEND\xaeB`\x82"
    if "webp" in kind and len(data) > 40:
        data = data[: len(data) & ~1]
        chunk = (
            struct.pack("<I", len(data) - 20)
            if data[12:15] == b"VP8" and data[15:16] != b"X"
            else data[16:20]
        )
        return data[:4] + struct.pack("<I", len(data) - 8) + data[8:16] + chunk + data[20:]
    return data


@pytest.mark.parametrize("kind", [*OTHERS, "rle-bmp"])
def test_other_formats_cut_anywhere(kind, others):
    data = others[kind]
    whole = decode_image(data, LIMITS)
    refused = 0
    places = {*range(1, len(data), max(1, len(data) // 200)), *range(len(data) - 40, len(data))}
    for kept in sorted(places):
        for cut in (data[:kept], with_end(kind, data[:kept])):
            found = outcome(cut)
            if isinstance(found, str):
                assert found in ("decode_error", "unsupported_format")
                refused += 1
            else:
                assert np.array_equal(found, whole), kept
    assert refused > 1.5 * (len(places) - 40)


@pytest.mark.parametrize("kind", ["png", "palette-png", "one-bit-png"])
def test_every_changed_bit_of_a_png_is_found(kind):
    data = OTHERS[kind]
    for place in np.random.default_rng(5).integers(8, len(data), 200):
        changed = bytearray(data)
        changed[place] ^= 1 << (place % 8)
        assert isinstance(outcome(bytes(changed)), str), place


def taller(data: bytes, png_chunk) -> bytes:
    """Return an image of 47 rows that claims 57."""
    if data[:4] == b"\x89PNG":
        return data[:8] + png_chunk(b"IHDR", data[16:20] + struct.pack(">I", 57) + data[24:29]) + data[33:]
    if data[:2] == b"\xff\xd8":
        return data.replace(struct.pack(">BHH", 8, 47, 61), struct.pack(">BHH", 8, 57, 61))
    if data[:2] == b"BM":
        return data[:22] + struct.pack("<i", 57) + data[26:]
    if data[12:16] == b"VP8L":
        bits = int.from_bytes(data[21:25], "little") & ~(0x3FFF << 14) | (56 << 14)
        return data[:21] + bits.to_bytes(4, "little") + data[25:]
    if data[:2] == b"II":
        # Height, and rows of the only strip.
        for tag in (257, 278):
            place = next(
                p for p in range(len(data)) if data[p : p + 8] == struct.pack("<HHI", tag, data[p + 2], 1)
            )
            data = data[: place + 8] + struct.pack("<I", 57) + data[place + 12 :]
        return data
    return data.replace(struct.pack("<HH", 61, 47), struct.pack("<HH", 61, 57))


@pytest.mark.parametrize("kind", ["baseline", "progressive", "grey", "cmyk", *OTHERS, "rle-bmp"])
def test_headers_that_claim_more_rows_than_there_are(kind, others, png_chunk):
    data = {**JPEGS, **others}[kind]
    claimed = taller(data, png_chunk)
    assert claimed != data
    assert reason_of(claimed) == "decode_error"


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("interlaced", [False, True])
def test_black_pngs_are_whole_all_the_same(png_chunk, channels, interlaced):
    """A black last row is what is looked at twice."""
    for height, width in ((1, 1), (9, 13), (40, 3)):
        header = struct.pack(">IIBBBBB", width, height, 8, 2 if channels == 3 else 0, 0, 0, interlaced)
        passes = [
            (0, 0, 8, 8),
            (0, 4, 8, 8),
            (4, 0, 8, 4),
            (0, 2, 4, 4),
            (2, 0, 4, 2),
            (0, 1, 2, 2),
            (1, 0, 2, 1),
        ]
        grids = [(len(range(y, height, dy)), len(range(x, width, dx))) for y, x, dy, dx in passes]
        sizes = grids if interlaced else [(height, width)]
        length = sum(rows * (1 + channels * columns) for rows, columns in sizes if columns)
        for missing, right in ((0, True), (1, False)):
            body = png_chunk(b"IDAT", zlib.compress(bytes(length - missing)))
            data = b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + body + png_chunk(b"IEND", b"")
            found = outcome(data)
            if right:
                assert found.shape == (height, width, 3)
            else:
                assert found == "decode_error"


def test_a_chain_of_pages_without_end():
    data = bytearray(encoded(IMAGE, "TIFF", save_all=True, append_images=[IMAGE]))
    (first,) = struct.unpack_from("<I", data, 4)
    entries = struct.unpack_from("<H", data, first)[0]
    assert struct.unpack_from("<I", data, first + 2 + 12 * entries)[0]
    struct.pack_into("<I", data, first + 2 + 12 * entries, first)
    assert reason_of(bytes(data)) == "too_large"
