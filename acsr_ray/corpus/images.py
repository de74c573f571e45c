"""Encoded bytes to RGB pixels and back, with a reason for every image that is refused.

`acsr_ray.corpus.conversion` says what becomes of each pixel mode; EXIF orientation is applied once; of an
animation the first frame is taken. Metadata, colour profiles too, is dropped. Sizes and frames are checked on
the header, before any pixel is decoded. A decoder's warning is an error: libjpeg would fill what is missing
with grey.
"""

import io
import re
import struct
import warnings
import zlib
from typing import Any, Literal

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from pydantic import Field

from acsr_ray.config import Settings
from acsr_ray.corpus.conversion import Pixels as Pixels
from acsr_ray.corpus.conversion import to_rgb, upright
from acsr_ray.corpus.frames import count_frames
from acsr_ray.corpus.integrity import check_jpeg, check_png, check_png_rows
from acsr_ray.corpus.refusals import ImageError as ImageError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
SIGNATURES = {
    "JPEG": rb"\xff\xd8\xff",
    "PNG": rb"\x89PNG",
    "WEBP": rb"RIFF....WEBP",
    "BMP": rb"BM",
    "GIF": rb"GIF8",
    "TIFF": rb"II[*+]\0|MM\0[*+]",
}

PNG_COMPRESSION = 3
"""zlib level of written PNGs; part of what makes purified bytes reproducible. Measured on photos of 224
pixels, it takes half the time of zlib's default 6 for files 7 % larger."""

ORIENTATION_TAG = 0x0112
PNG_DEPTH = 24
"""Where a PNG says how many bits a sample has."""

JPEG_SPACES = {"L": "GRAY", "RGB": "RGB", "CMYK": "CMYK"}
# Of the others, libtiff garbles the rest of a damaged strip and only warns.
TIFF_COMPRESSIONS = ("raw", "packbits", "tiff_lzw", "tiff_deflate", "tiff_adobe_deflate")
BITS_TAG, PHOTOMETRIC_TAG, BLACK_IS_ZERO = 0x0102, 0x0106, 1

# What decoders raise on damaged files: the image is at fault, and its row is quarantined.
DECODER_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    struct.error,
    TypeError,
    KeyError,
    AttributeError,
    AssertionError,
    ArithmeticError,
    RuntimeError,
    zlib.error,
)


class DecodeLimits(Settings):
    """Limits checked before pixels are decoded; an image beyond one is quarantined as `too_large`."""

    max_megabytes: float = Field(64.0, gt=0)
    """Largest encoded image, in MiB."""
    max_megapixels: float = Field(50.0, gt=0, le=89)
    """Largest decoded image, in millions of pixels; Pillow itself refuses more than 89."""
    max_side: int = Field(16384, gt=0)
    """Longest side, in pixels."""
    max_frames: int = Field(1000, gt=0)
    """Most frames or pages of one file, of which only the first is used."""
    extra_formats: tuple[Literal["GIF", "TIFF"], ...] = ()
    """Formats accepted besides JPEG, PNG, WebP and BMP."""

    @property
    def formats(self) -> tuple[str, ...]:
        """All accepted formats."""
        return FORMATS + self.extra_formats


def check_bytes(data: bytes | None, limits: DecodeLimits) -> bytes:
    """Return the bytes of an image that is there and is not too long.

    Raises:
        ImageError: with reason `null_image`, `empty` or `too_large`.
    """
    if data is None:
        raise ImageError("null_image")
    if not data:
        raise ImageError("empty")
    if len(data) > limits.max_megabytes * 2**20:
        raise ImageError("too_large", f"{len(data)} bytes")
    return data


def decode_image(data: bytes | None, limits: DecodeLimits) -> Pixels:
    """Decode one image to RGB pixels, in this process.

    Returns:
        (H, W, 3) uint8.

    Raises:
        ImageError: with reason `null_image`, `empty`, `too_large`, `unsupported_format`, `decode_error` or
            `decoder_memory`.
    """
    data = check_bytes(data, limits)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            return _decode(data, limits)
    except UnidentifiedImageError as error:
        known = any(re.match(SIGNATURES[name], data, re.DOTALL) for name in limits.formats)
        raise ImageError("decode_error" if known else "unsupported_format") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError("too_large", str(error)) from error
    except MemoryError as error:
        raise ImageError("decoder_memory") from error
    except ImageError:
        raise
    except (*DECODER_ERRORS, Warning) as error:
        raise ImageError("decode_error", str(error)) from error


def _decode(data: bytes, limits: DecodeLimits) -> Pixels:
    with Image.open(io.BytesIO(data), formats=limits.formats) as image:
        width, height = image.size
        if max(width, height) > limits.max_side or width * height > limits.max_megapixels * 1e6:
            raise ImageError("too_large", f"{width}x{height}")
        if count_frames(image, data, limits.max_frames) > limits.max_frames:
            raise ImageError("too_large", f"more than {limits.max_frames} frames")
        # MPO is a JPEG followed by others.
        if image.format in ("JPEG", "MPO"):
            pixels = _decode_jpeg(image, data)
        else:
            if image.format == "PNG":
                check_png(data)
            if image.format == "TIFF":
                _check_tiff(image)
            image.load()
            if image.format == "PNG":
                check_png_rows(image, data)
            pixels = to_rgb(image, data[PNG_DEPTH] if image.format == "PNG" else 8)
        # Read after loading: a PNG may have the tag after its pixels, and from a TIFF, which Pillow turns
        # itself, it is gone by then. Only this tag is read: writing the whole EXIF block back, as Pillow's
        # own helper does, fails where other tags are odd.
        return upright(pixels, image.getexif().get(ORIENTATION_TAG))


def _decode_jpeg(image: Image.Image, data: bytes) -> Pixels:
    """Decode with every warning of libjpeg an error, which Pillow cannot; the pixels are Pillow's."""
    check_jpeg(data)
    try:
        height, width = simplejpeg.decode_jpeg_header(data, strict=True)[:2]
    except ValueError as error:
        if "subsampling" in str(error):
            raise ImageError("unsupported_format", "JPEG chroma sampling") from error
        raise
    if (width, height) != image.size:
        raise ValueError("JPEG with two sizes")
    try:
        samples = simplejpeg.decode_jpeg(data, colorspace=JPEG_SPACES[image.mode], strict=True)
    except ValueError as error:
        if "Insufficient memory" in str(error):
            raise MemoryError(str(error)) from error
        raise
    if image.mode == "RGB":
        return samples
    if image.mode == "L":
        return np.repeat(samples, 3, axis=2)
    # Adobe, and after it everyone, stores ink inverted.
    return to_rgb(Image.frombuffer("CMYK", image.size, samples, "raw", "CMYK;I", 0, 1))


def _check_tiff(image: Image.Image) -> None:
    compression = image.info.get("compression")
    if compression not in TIFF_COMPRESSIONS:
        raise ImageError("unsupported_format", f"TIFF compression {compression}")
    # Pillow leaves 12 bits unscaled, and white at zero, where a sample is wider than a byte.
    tags = image.getexif()
    if image.mode.startswith("I;16") and (tags.get(BITS_TAG), tags.get(PHOTOMETRIC_TAG)) != (
        16,
        BLACK_IS_ZERO,
    ):
        raise ImageError("unsupported_format", "grey TIFF of this kind")


def encode_png(pixels: NDArray[Any]) -> bytes:
    """Encode (H, W, 3) uint8 pixels as PNG without metadata."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=PNG_COMPRESSION)
    return buffer.getvalue()


def to_unit_range(pixels: Pixels) -> NDArray[np.float32]:
    """Return (..., H, W, 3) uint8 pixels as (..., 3, H, W) float32 in [0, 1]."""
    return np.moveaxis(pixels, -1, -3).astype(np.float32) / np.float32(255)


def to_pixels(images: NDArray[np.float32]) -> Pixels:
    """Return (..., 3, H, W) floats in [0, 1] as (..., H, W, 3) uint8, rounded to the nearest level."""
    return np.ascontiguousarray(np.moveaxis(np.rint(images * 255).astype(np.uint8), -3, -1))
