"""What becomes of each pixel mode on the way to 8-bit RGB.

Transparency of every kind is composited over white and rounded to the nearest level. Of 16 bits the high byte
is kept. Colour profiles are not applied: values are taken as they are.
"""

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from acsr_ray.corpus.refusals import ImageError

Pixels = NDArray[np.uint8]

OPAQUE = ("1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr")
STRAIGHT = {"LA": "LA", "PA": "RGBA", "RGBA": "RGBA"}
PREMULTIPLIED = ("La", "RGBa")
# By EXIF orientation: the flips of rows and of columns; from 5 on, rows and columns are then swapped.
FLIPS = {2: (1, -1), 3: (-1, -1), 4: (-1, 1), 5: (1, 1), 6: (-1, 1), 7: (-1, -1), 8: (1, -1)}


def to_rgb(image: Image.Image, depth: int = 8) -> Pixels:
    """Convert a loaded image to RGB.

    Args:
        image: of any mode.
        depth: bits per sample in the file, which the colour key of a PNG is counted in.

    Returns:
        (H, W, 3) uint8.

    Raises:
        ImageError: `unsupported_format` for 32-bit, LAB and other modes that have no documented conversion.
    """
    mode, key = image.mode, image.info.get("transparency")
    if mode.startswith("I;16"):
        return _sixteen_bits(np.asarray(image), key)
    if mode in PREMULTIPLIED:
        samples = np.asarray(image)
        colour = samples[..., :-1] + (255 - samples[..., -1:]).astype(np.uint16)
        return _three_channels(np.minimum(colour, 255).astype(np.uint8))
    if mode == "P" and key is not None:
        image, mode = image.convert("RGBA"), "RGBA"
    if mode in STRAIGHT:
        return _over_white(np.asarray(image.convert(STRAIGHT[mode])))
    if mode not in OPAQUE:
        raise ImageError("unsupported_format", f"pixel mode {mode}")
    pixels = np.asarray(image.convert("RGB"))
    if key is None:
        return pixels
    if mode == "RGB" and depth == 16:
        # Pillow has dropped the low bytes, so whether a pixel is the key is lost.
        raise ImageError("unsupported_format", "a colour key of 16 bits")
    if mode == "L":
        key = key * (255 // (2**depth - 1))
    return np.where((pixels == key).all(-1, keepdims=True), np.uint8(255), pixels)


def _over_white(samples: Pixels) -> Pixels:
    """Composite (H, W, C + 1) with alpha last; the sum fits 16 bits, whole and rounded."""
    alpha = samples[..., -1:].astype(np.uint16)
    colour = samples[..., :-1] * alpha + 255 * (255 - alpha)
    return _three_channels(((colour + 127) // 255).astype(np.uint8))


def _sixteen_bits(grey: NDArray[np.uint16], key: int | None) -> Pixels:
    high = (grey >> 8).astype(np.uint8)
    return _three_channels((high if key is None else np.where(grey == key, np.uint8(255), high))[..., None])


def _three_channels(colour: Pixels) -> Pixels:
    return np.repeat(colour, 3, axis=2) if colour.shape[2] == 1 else colour


def upright(pixels: Pixels, orientation: object) -> Pixels:
    """Turn (H, W, 3) stored pixels the way EXIF says; 1 and values without a meaning change nothing."""
    if orientation not in FLIPS:
        return pixels
    rows, columns = FLIPS[orientation]
    turned = pixels[::rows, ::columns]
    return np.ascontiguousarray(turned.swapaxes(0, 1) if orientation >= 5 else turned)
