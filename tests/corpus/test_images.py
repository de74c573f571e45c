"""Decoding: every reason for refusal, every conversion to RGB, and nothing but `ImageError` on damage."""

import io
import struct
import time
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from acsr_ray.config import JobSettings, parse_job
from acsr_ray.corpus.images import (
    DecodeLimits,
    ImageError,
    decode_image,
    encode_png,
    to_pixels,
    to_unit_range,
)

LIMITS = DecodeLimits()
GENERATOR = np.random.default_rng(0)
PIXELS = GENERATOR.integers(0, 256, (9, 14, 3)).astype(np.uint8)
IMAGE = Image.fromarray(PIXELS)
ORIENTATION = 0x0112


def encoded(image: Image.Image, fmt: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, fmt, **options)
    return buffer.getvalue()


def reason_of(data: bytes | None, limits: DecodeLimits = LIMITS) -> str:
    with pytest.raises(ImageError) as error_info:
        decode_image(data, limits)
    return error_info.value.reason


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def forged_png(width: int, height: int) -> bytes:
    """Return a tiny PNG whose header claims a size."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes(100_000))
    parts = [png_chunk(b"IHDR", header), png_chunk(b"IDAT", rows), png_chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def exif_entries(*entries: tuple[int, int, int, bytes]) -> bytes:
    """Return raw EXIF of (tag, type, count, value) entries, which Pillow would not write itself."""
    body = b"".join(struct.pack("<HHI4s", *entry) for entry in sorted(entries))
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries)) + body + bytes(4)


@pytest.mark.parametrize(("data", "reason"), [(None, "null_image"), (b"", "empty")])
def test_nothing_to_decode(data, reason):
    assert reason_of(data) == reason


@pytest.mark.parametrize(
    "limits",
    [
        DecodeLimits(max_megabytes=100 / 2**20),
        DecodeLimits(max_side=13),
        DecodeLimits(max_megapixels=125e-6),
    ],
    ids=["bytes", "side", "pixels"],
)
def test_too_large(limits):
    assert reason_of(encode_png(PIXELS), limits) == "too_large"


def test_limits_are_inclusive():
    data = encode_png(PIXELS)
    limits = DecodeLimits(max_megabytes=len(data) / 2**20, max_side=14, max_megapixels=126e-6)
    assert np.array_equal(decode_image(data, limits), PIXELS)


@pytest.mark.parametrize("size", [(20_000, 20_000), (16_385, 1), (8_000, 8_000), (2**31 - 1, 2**31 - 1)])
def test_forged_sizes_are_refused_on_the_header(size):
    data = forged_png(*size)
    started = time.perf_counter()
    assert reason_of(data) == "too_large"
    # Nothing is allocated for the pixels: it takes a millisecond, with room for a busy machine.
    assert time.perf_counter() - started < 1


@pytest.mark.parametrize(
    "data",
    [
        b"This is a text file, not an image.",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        encoded(IMAGE.quantize(16), "GIF"),
        encoded(IMAGE, "TIFF"),
        encoded(IMAGE, "PPM"),
        encoded(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"),
        bytes(64),
    ],
    ids=["text", "svg", "gif", "tiff", "ppm", "float-tiff", "zeros"],
)
def test_unsupported_format(data):
    assert reason_of(data) == "unsupported_format"


@pytest.mark.parametrize("fmt", ["PNG", "JPEG", "WEBP", "BMP"])
@pytest.mark.parametrize("kept", [0.1, 0.5, 0.9])
def test_truncated_images(fmt, kept):
    noise = GENERATOR.integers(0, 256, (40, 40, 3)).astype(np.uint8)
    data = encoded(Image.fromarray(noise), fmt)
    assert reason_of(data[: int(kept * len(data))]) == "decode_error"


@pytest.mark.parametrize("magic", [b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF\x04\0\0\0WEBP", b"BM"])
def test_a_signature_alone_is_a_damaged_image(magic):
    assert reason_of(magic) == "decode_error"


@pytest.mark.parametrize("size", [(0, 5), (5, 0)])
def test_images_without_pixels(size):
    assert reason_of(forged_png(*size)) == "decode_error"


def test_rgb_formats_keep_their_pixels():
    for fmt, options in (("PNG", {}), ("BMP", {}), ("WEBP", {"lossless": True})):
        assert np.array_equal(decode_image(encoded(IMAGE, fmt, **options), LIMITS), PIXELS), fmt


# How stored pixels look when shown, by EXIF 2.32 section 4.6.4 A.
UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: a[::-1].swapaxes(0, 1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: a[:, ::-1].swapaxes(0, 1),
}


ALL = DecodeLimits(extra_formats=("GIF", "TIFF"))
KINDS = {
    "png": ("PNG", {}),
    "webp": ("WEBP", {"lossless": True}),
    "jpeg": ("JPEG", {"quality": 95, "subsampling": 0}),
    "tiff": ("TIFF", {}),
    "lzw-tiff": ("TIFF", {"compression": "tiff_lzw"}),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_orientation_is_applied_once(orientation, kind):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    fmt, options = KINDS[kind]
    stored = np.asarray(IMAGE.resize((32, 16)))
    image = Image.fromarray(stored)
    plain = np.asarray(Image.open(io.BytesIO(encoded(image, fmt, **options))))
    decoded = decode_image(encoded(image, fmt, exif=exif, **options), ALL)
    assert np.array_equal(decoded, UPRIGHT[orientation](plain))


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_orientation_after_the_pixels_of_a_png(raw_png, png_chunk, orientation):
    exif = exif_entries((ORIENTATION, 3, 1, struct.pack("<I", orientation)))[6:]
    for place in ("before", "after"):
        data = raw_png(PIXELS, 2, 8, **{place: png_chunk(b"eXIf", exif)})
        assert np.array_equal(decode_image(data, LIMITS), UPRIGHT[orientation](PIXELS)), place


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_orientations_without_a_meaning(orientation):
    exif = exif_entries((ORIENTATION, 3, 1, struct.pack("<I", orientation)))
    assert np.array_equal(decode_image(encoded(IMAGE, exif=exif), LIMITS), PIXELS)


@pytest.mark.parametrize(
    "entry",
    [
        (0x011A, 2, 3, b"72\0\0"),
        (0x011A, 7, 4, b"abcd"),
        (0x010E, 5, 1, struct.pack("<I", 8)),
        (0x010E, 2, 4000, struct.pack("<I", 2**31)),
    ],
    ids=["ascii-resolution", "undefined-resolution", "rational-description", "dangling-offset"],
)
@pytest.mark.parametrize("fmt", ["PNG", "JPEG"])
def test_damaged_exif_is_an_image_error_at_most(entry, fmt):
    exif = exif_entries((ORIENTATION, 3, 1, struct.pack("<I", 6)), entry)
    try:
        outcome = decode_image(encoded(IMAGE, fmt, exif=exif), LIMITS).shape
    except ImageError as refused:
        outcome = refused.reason
    assert outcome in ((14, 9, 3), "decode_error")


SECOND = Image.fromarray(255 - PIXELS)
FRAMES = {"save_all": True, "append_images": [SECOND, IMAGE]}
ANIMATED = {
    "png": encoded(IMAGE, **FRAMES, duration=50),
    "webp": encoded(IMAGE, "WEBP", **FRAMES, duration=50, lossless=True),
    "tiff": encoded(IMAGE, "TIFF", **FRAMES),
    "big-tiff": encoded(IMAGE, "TIFF", **FRAMES, big_tiff=True),
}


@pytest.mark.parametrize("kind", ANIMATED)
def test_first_frame_of_several(kind):
    data = ANIMATED[kind]
    assert np.array_equal(decode_image(data, ALL.model_copy(update={"max_frames": 3})), PIXELS)
    assert reason_of(data, ALL.model_copy(update={"max_frames": 2})) == "too_large"


@pytest.mark.parametrize("fmt", ["GIF", "MPO"])
def test_first_frame_of_several_lossy_ones(fmt):
    first = IMAGE.quantize(8) if fmt == "GIF" else IMAGE
    data = encoded(first, fmt, **FRAMES)
    shown = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert np.array_equal(decode_image(data, ALL.model_copy(update={"max_frames": 3})), shown)
    assert reason_of(data, ALL.model_copy(update={"max_frames": 2})) == "too_large"


def test_written_pngs_have_no_metadata():
    exif = Image.Exif()
    exif[0x010E] = "secret place"
    given = encoded(IMAGE, exif=exif, dpi=(72, 72), icc_profile=b"secret profile")
    data = encode_png(decode_image(given, LIMITS))
    kinds, position = set(), 8
    while position < len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        kinds.add(kind)
        position += 12 + length
    assert kinds == {b"IHDR", b"IDAT", b"IEND"}


def test_formats_are_opened_only_when_asked_for():
    gif, tiff = encoded(IMAGE.quantize(16), "GIF"), encoded(IMAGE, "TIFF")
    only_gif = DecodeLimits(extra_formats=("GIF",))
    assert decode_image(gif, only_gif).shape == PIXELS.shape
    assert reason_of(tiff, only_gif) == "unsupported_format"
    assert reason_of(tiff[:100], ALL) == "decode_error"
    assert reason_of(b"RIFF\x04\0\0\0WAVEfmt ") == "unsupported_format"


def test_extra_formats_are_a_flag():
    class Job(JobSettings):
        """A job that decodes."""

        decode: DecodeLimits = DecodeLimits()

    job = parse_job(
        Job, "purify_corpus", ["--decode.extra-formats", "GIF", "TIFF", "--decode.max-frames", "9"]
    )
    assert job.decode == DecodeLimits(extra_formats=("GIF", "TIFF"), max_frames=9)
    with pytest.raises(SystemExit):
        parse_job(Job, "purify_corpus", ["--decode.extra-formats", "EPS"])


@settings(deadline=None, max_examples=60)
@given(
    kind=st.sampled_from(sorted(KINDS)),
    size=st.one_of(
        st.tuples(st.integers(1, 40), st.integers(1, 40)),
        st.sampled_from([(1, 1), (1, 4001), (4001, 1), (2, 1999), (101, 7), (127, 131)]),
    ),
    grey=st.booleans(),
)
def test_sizes_are_kept_exactly(kind, size, grey):
    fmt, options = KINDS[kind]
    shape = size if grey else (*size, 3)
    pixels = np.random.default_rng(size).integers(0, 256, shape).astype(np.uint8)
    decoded = decode_image(encoded(Image.fromarray(pixels), fmt, **options), ALL)
    assert decoded.shape == (*size, 3)
    if fmt != "JPEG":
        assert (decoded == (pixels[..., None] if grey else pixels)).all()


@settings(deadline=None, max_examples=25)
@given(height=st.integers(1, 20), width=st.integers(1, 20), seed=st.integers(0, 2**32 - 1))
def test_encode_decode_is_lossless_and_reproducible(height, width, seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)
    data = encode_png(pixels)
    assert np.array_equal(decode_image(data, LIMITS), pixels)
    assert encode_png(pixels[:, ::-1][:, ::-1]) == data


def test_unit_range_and_back_is_exact():
    levels = np.repeat(np.arange(256, dtype=np.uint8), 3).reshape(16, 16, 3)
    unit = to_unit_range(levels)
    assert unit.dtype == np.float32
    assert unit.shape == (3, 16, 16)
    assert (unit.min(), unit.max()) == (0, 1)
    assert np.array_equal(to_pixels(unit), levels)


def test_unit_range_takes_batches_and_rounds_to_nearest():
    batch = np.stack([PIXELS, PIXELS[::-1]])
    unit = to_unit_range(batch)
    assert unit.shape == (2, 3, 9, 14)
    assert unit[0, 1, 2, 3] == np.float32(PIXELS[2, 3, 1] / 255)
    for error in (-0.49, 0.49):
        near = (unit + np.float32(error / 255)).clip(0, 1)
        assert np.array_equal(to_pixels(near), batch)


FUZZED = (
    encoded(IMAGE),
    encoded(IMAGE.quantize(8), transparency=0),
    encoded(IMAGE, "JPEG"),
    encoded(IMAGE, "JPEG", progressive=True, dpi=(72, 72)),
)


@settings(deadline=None, max_examples=25)
@given(
    data=st.sampled_from(FUZZED),
    edits=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=6),
    kept=st.one_of(st.just(1.0), st.floats(0.01, 1)),
)
def test_damaged_images_decode_or_raise_image_error(data, edits, kept):
    changed = bytearray(data)
    for where, value in edits:
        changed[int(where * len(changed))] = value
    try:
        pixels = decode_image(bytes(changed[: max(1, int(kept * len(changed)))]), LIMITS)
    except ImageError as refused:
        outcome = refused.reason
    else:
        outcome = (pixels.dtype, pixels.ndim, pixels.shape[2])
        assert pixels.size
    assert outcome in ((np.uint8, 3, 3), "decode_error", "unsupported_format", "too_large")
