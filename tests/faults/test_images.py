"""Rows 12, 15 and 16 of the fault matrix: images that damage, size or malice made a danger."""

import io
import os
import signal
import struct
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pytest
import simplejpeg
from PIL import Image

from acsr_ray.columns import HEIGHT, PIXELS, REASON, WIDTH
from acsr_ray.corpus.images import DecodeLimits, ImageError
from acsr_ray.corpus.isolated import DecoderSettings, IsolatedDecoder
from acsr_ray.corpus.refusals import REASONS
from acsr_ray.purification.stages import DecodeImages

LIMITS = DecodeLimits(extra_formats=("GIF", "TIFF"))
SHORT_SIDE, LONG_SIDE = 47, 61


def saved(image: Image.Image, fmt: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, fmt, **options)
    return buffer.getvalue()


def seeds(smooth_pixels: Callable[..., np.ndarray]) -> dict[str, bytes]:
    """Return one image of every format and mode, all of one size."""
    pixels = smooth_pixels(2, SHORT_SIDE, LONG_SIDE, 4)
    image, other = map(Image.fromarray, pixels)
    paletted = image.quantize(16)
    with_alpha = image.copy()
    with_alpha.putalpha(other.convert("L"))
    exif = Image.Exif()
    exif[0x0112] = 6
    ink = np.dstack([pixels[0], pixels[1][..., 0]])
    frames = {"save_all": True, "append_images": [other]}
    return {
        "jpeg": saved(image, "JPEG"),
        "progressive-jpeg": saved(image, "JPEG", progressive=True, exif=exif),
        "restart-jpeg": saved(image, "JPEG", restart_marker_rows=1),
        "grey-jpeg": saved(image.convert("L"), "JPEG"),
        "cmyk-jpeg": saved(image.convert("CMYK"), "JPEG"),
        "ycck-jpeg": simplejpeg.encode_jpeg(ink, 85, colorspace="CMYK", colorsubsampling="420"),
        "mpo": saved(image, "MPO", **frames),
        "png": saved(image, "PNG", exif=exif),
        "alpha-png": saved(with_alpha, "PNG"),
        "palette-png": saved(paletted, "PNG", transparency=3),
        "bits-png": saved(image.convert("1"), "PNG"),
        "deep-png": saved(Image.fromarray(pixels[0][..., 0].astype(np.uint16) * 257), "PNG"),
        "animated-png": saved(image, "PNG", **frames),
        "webp": saved(image, "WEBP"),
        "lossless-webp": saved(with_alpha, "WEBP", lossless=True, exif=exif),
        "animated-webp": saved(image, "WEBP", **frames),
        "bmp": saved(image, "BMP"),
        "palette-bmp": saved(paletted, "BMP"),
        "gif": saved(paletted, "GIF", **frames),
        "tiff": saved(image, "TIFF", exif=exif),
        "lzw-tiff": saved(with_alpha, "TIFF", compression="tiff_lzw"),
        "deflate-tiff": saved(image.convert("CMYK"), "TIFF", compression="tiff_adobe_deflate"),
    }


def mutate(data: bytes, others: list[bytes], generator: np.random.Generator) -> bytes:
    """Return an image damaged in one or two of the ways that damage and malice have."""
    changed = bytearray(data)
    for _ in range(generator.integers(1, 3)):
        place = int(generator.integers(len(changed)))
        match generator.integers(8):
            case 0:
                changed[place] ^= 1 << int(generator.integers(8))
            case 1:
                for near in generator.integers(0, len(changed), 8):
                    changed[near] = int(generator.integers(256))
            case 2:
                changed = changed[: max(1, place)]
            case 3:
                changed = changed[: max(1, place)] + b"\xff\xd9"
            case 4:
                other = others[int(generator.integers(len(others)))]
                changed = changed[: max(1, place)] + other[int(generator.integers(len(other))) :]
            case 5:
                # Headers hold what decides on sizes and tables.
                changed[int(generator.integers(min(64, len(changed))))] = int(generator.integers(256))
            case 6:
                length = int(generator.integers(1, 60))
                changed[place : place + length] = generator.bytes(int(generator.integers(60)))
            case _:
                # As an attacker does, who puts the checksums right again.
                changed[place] ^= 1 << int(generator.integers(8))
                changed = with_checksums(changed)
        changed = changed or bytearray(b"\0")
    return bytes(changed)


def with_checksums(data: bytearray) -> bytearray:
    """Put the checksums of a PNG right; other formats have none."""
    position = 8
    while data[:4] == b"\x89PNG" and position + 12 <= len(data):
        end = position + 12 + struct.unpack_from(">I", data, position)[0]
        if end > len(data):
            break
        struct.pack_into(">I", data, end - 4, zlib.crc32(data[position + 4 : end - 4]))
        position = end
    return data


def header_size(data: bytes) -> tuple[int, int]:
    with Image.open(io.BytesIO(data)) as image:
        return image.size


@pytest.fixture(scope="module")
def decoder() -> Iterator[IsolatedDecoder]:
    with IsolatedDecoder(LIMITS, DecoderSettings(timeout_s=20)) as decoder:
        yield decoder


@pytest.mark.parametrize("count", [600, pytest.param(10_000, marks=pytest.mark.slow)])
def test_mutated_images_are_refused_or_have_the_size_of_their_header(decoder, smooth_pixels, count):
    originals = seeds(smooth_pixels)
    for name, outcome in zip(originals, decoder.decode_all(originals.values()), strict=True):
        assert not isinstance(outcome, ImageError), name
        assert set(outcome.shape) == {SHORT_SIDE, LONG_SIDE, 3}, name
    generator = np.random.default_rng(15)
    kinds = list(originals)
    mutants = [
        mutate(originals[kinds[n % len(kinds)]], list(originals.values()), generator) for n in range(count)
    ]
    counts: Counter[str] = Counter()
    for data, outcome in zip(mutants, decoder.decode_all(mutants), strict=True):
        if isinstance(outcome, ImageError):
            assert outcome.reason in REASONS
            counts[outcome.reason] += 1
        else:
            counts["decoded"] += 1
            assert sorted(outcome.shape[:2]) == sorted(header_size(data))
    print(dict(counts))
    assert counts["decode_error"] > 0.4 * count
    assert 0.05 * count < counts["decoded"] < 0.5 * count
    # None of the known decoders crashes or hangs on any of these.
    assert not counts.keys() & {"decoder_crash", "decoder_timeout", "decoder_memory", "empty", "null_image"}


@pytest.mark.parametrize("count", [300, pytest.param(5_000, marks=pytest.mark.slow)])
def test_no_jpeg_with_missing_data_is_decoded(decoder, smooth_pixels, count):
    jpegs = [data for name, data in seeds(smooth_pixels).items() if name.endswith("jpeg")]
    generator = np.random.default_rng(16)
    cut = []
    for number in range(count):
        data = jpegs[number % len(jpegs)]
        # The last bytes may hold only the padding of the last block.
        start, stop = sorted(generator.integers(data.index(b"\xff\xda") + 14, len(data) - 6, 2).tolist())
        match number // len(jpegs) % 3:
            case 0:
                cut.append(data[:start])
            case 1:
                cut.append(data[:start] + b"\xff\xd9")
            case _:
                # Zeros are no restart and no end: the decoder runs into them as into code words.
                cut.append(data[:start] + b"\xff\xd9" + bytes(stop - start) + data[stop:])
    for data, outcome in zip(cut, decoder.decode_all(cut), strict=True):
        assert isinstance(outcome, ImageError), data
        assert outcome.reason == "decode_error"


def png(*chunks: tuple[bytes, bytes], width: int = 64, height: int = 64, depth: int = 8) -> bytes:
    header = b"IHDR", struct.pack(">IIBBBBB", width, height, depth, 0, 0, 0, 0)
    pieces = [b"\x89PNG\r\n\x1a\n"]
    for kind, body in (header, *chunks, (b"IEND", b"")):
        pieces += [struct.pack(">I", len(body)), kind, body, struct.pack(">I", zlib.crc32(kind + body))]
    return b"".join(pieces)


def pixels_of(width: int, height: int) -> tuple[bytes, bytes]:
    packer = zlib.compressobj()
    row = bytes(width + 1)
    return b"IDAT", b"".join(packer.compress(row) for _ in range(height)) + packer.flush()


@cache
def zeros_deflated() -> bytes:
    """Return 400 MiB in 400 kB."""
    packer = zlib.compressobj(9)
    return b"".join(packer.compress(bytes(2**20)) for _ in range(400)) + packer.flush()


def many_frames(fmt: str, count: int) -> bytes:
    frames = [Image.new("L", (2, 2), number % 2 * 255) for number in range(count)]
    options = {"WEBP": {"lossless": True, "method": 0, "minimize_size": False}, "GIF": {"optimize": False}}
    return saved(frames[0], fmt, save_all=True, append_images=frames[1:], duration=20, **options.get(fmt, {}))


def huge_webp(side: int) -> bytes:
    data = bytearray(saved(Image.new("RGB", (16, 16)), "WEBP", lossless=True))
    size = (side - 1) * (1 + 2**14)
    data[21:25] = (int.from_bytes(data[21:25], "little") & ~0xFFFFFFF | size).to_bytes(4, "little")
    return bytes(data)


def huge_jpeg() -> bytes:
    data = saved(Image.new("RGB", (16, 16)), "JPEG")
    return data.replace(struct.pack(">BHH", 8, 16, 16), struct.pack(">BHH", 8, 65500, 65500))


def huge_bmp() -> bytes:
    data = saved(Image.new("RGB", (16, 16)), "BMP")
    return data[:18] + struct.pack("<ii", 2**31 - 1, -(2**31 - 1)) + data[26:]


def huge_gif() -> bytes:
    data = saved(Image.new("L", (16, 16)), "GIF")
    return data.replace(struct.pack("<HH", 16, 16), struct.pack("<HH", 65535, 65535))


def text_chunk(kind: bytes) -> tuple[bytes, bytes]:
    """Return a chunk of text, or a colour profile, that inflates to far more."""
    return kind, b"Comment\0" + (b"\1\0\0\0" if kind == b"iTXt" else b"\0") + zeros_deflated()


BOMBS: dict[str, tuple[Callable[[], bytes], set[str]]] = {
    "png-60000": (lambda: png(pixels_of(60000, 200), width=60000, height=60000), {"too_large"}),
    "png-iccp": (lambda: png(text_chunk(b"iCCP"), pixels_of(64, 64)), {"decode_error", "decoded"}),
    "png-ztxt": (lambda: png(text_chunk(b"zTXt"), pixels_of(64, 64)), {"decode_error"}),
    "png-itxt": (lambda: png(text_chunk(b"iTXt"), pixels_of(64, 64)), {"decode_error"}),
    "png-ztxt-after": (lambda: png(pixels_of(64, 64), text_chunk(b"zTXt")), {"decode_error"}),
    "png-idat": (lambda: png((b"IDAT", zeros_deflated())), {"decoded"}),
    "bmp-sides": (huge_bmp, {"too_large", "decode_error"}),
    "jpeg-65500": (huge_jpeg, {"too_large"}),
    "webp-16383": (lambda: huge_webp(16383), {"too_large"}),
    "webp-13000": (lambda: huge_webp(13000), {"too_large"}),
    "gif-65535": (huge_gif, {"too_large"}),
    "apng-frames": (lambda: many_frames("PNG", 10_000), {"too_large"}),
    "webp-frames": (lambda: many_frames("WEBP", 10_000), {"too_large"}),
    "gif-frames": (lambda: many_frames("GIF", 10_000), {"too_large"}),
    "tiff-pages": (lambda: many_frames("TIFF", 1_100), {"too_large"}),
}


def memory(pid: int, field: str) -> int:
    """Return a process's VmRSS or VmHWM in bytes."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused_before_they_grow(name, encoded):
    make, expected = BOMBS[name]
    data = make()
    with IsolatedDecoder(LIMITS, DecoderSettings(timeout_s=20)) as decoder:
        decoder.decode(encoded(np.zeros((64, 64, 3), np.uint8)))
        child = decoder.pid
        Path("/proc/self/clear_refs").write_text("5")
        before = memory(os.getpid(), "VmHWM"), memory(child, "VmRSS")
        started = time.monotonic()
        try:
            decoder.decode(data)
            outcome = "decoded"
        except ImageError as refused:
            outcome = refused.reason
        seconds = time.monotonic() - started
        assert decoder.pid == child
        grown = memory(os.getpid(), "VmHWM") - before[0] + memory(child, "VmHWM") - before[1]
    print(f"{name}: {len(data)} bytes, {outcome}, grown {grown / 2**20:.1f} MiB, {seconds:.3f} s")
    assert outcome in expected
    assert grown < 200 * 2**20
    assert seconds < 10


@cache
def slow_png() -> bytes:
    """Return an image that takes about a second."""
    rows = np.random.default_rng(0).integers(0, 256, (3000, 3000, 3)).astype(np.uint8)
    return saved(Image.fromarray(rows), "PNG", compress_level=1)


@pytest.mark.parametrize(
    ("stop", "reason"), [(signal.SIGKILL, "decoder_crash"), (signal.SIGSTOP, "decoder_timeout")]
)
def test_the_other_rows_are_done_when_one_kills_or_stops_the_decoder(smooth_pixels, encoded, stop, reason):
    """The stage's own child, stopped or killed whenever it works on the image in the middle."""
    small = smooth_pixels(8, 12, 10, 6)
    poison = slow_png()
    cells = [encoded(pixels) for pixels in small]
    cells.insert(4, poison)
    stage = DecodeImages("image", LIMITS, DecoderSettings(timeout_s=1.5))
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            for child in psutil.Process().children():
                try:
                    # No small image lets the decoder grow so far.
                    if child.pid == stage.decoder.pid and child.memory_info().rss > 75 * 2**20:
                        child.send_signal(stop)
                except psutil.NoSuchProcess:
                    continue

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        table = stage(pa.table({"image": pa.array(cells, pa.binary())}))
    finally:
        done.set()
        watcher.join()
        stage.decoder.close()
    assert table[REASON].to_pylist() == [*[None] * 4, reason, *[None] * 4]
    rows = zip(table[PIXELS].to_pylist(), table[HEIGHT].to_pylist(), table[WIDTH].to_pylist(), strict=True)
    found = [np.frombuffer(data, np.uint8).reshape(height, width, 3) for data, height, width in rows if data]
    assert np.array_equal(found, small)
