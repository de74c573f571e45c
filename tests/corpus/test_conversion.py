"""What becomes of each pixel mode: images of every kind against arithmetic written down here."""

import io
import struct
from fractions import Fraction

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from acsr_ray.corpus.conversion import to_rgb
from acsr_ray.corpus.images import DecodeLimits, ImageError, decode_image

LIMITS = DecodeLimits(extra_formats=("GIF", "TIFF"))
GENERATOR = np.random.default_rng(3)
SHAPE = (7, 11)
RGB = GENERATOR.integers(0, 256, (*SHAPE, 3)).astype(np.uint8)
ALPHA = GENERATOR.integers(0, 256, SHAPE).astype(np.uint8)
ALPHA[0], ALPHA[1] = 0, 255
GREY, COLOUR, PALETTE, GREY_ALPHA, COLOUR_ALPHA = 0, 2, 3, 4, 6
CHANNELS = {GREY: 1, COLOUR: 3, PALETTE: 1, GREY_ALPHA: 2, COLOUR_ALPHA: 4}


def encoded(image: Image.Image, fmt: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, fmt, **options)
    return buffer.getvalue()


def decoded(data: bytes) -> np.ndarray:
    return decode_image(data, LIMITS)


def reason_of(data: bytes) -> str:
    with pytest.raises(ImageError) as error_info:
        decoded(data)
    return error_info.value.reason


def grey_rgb(grey: np.ndarray) -> np.ndarray:
    return np.stack([grey] * 3, axis=-1).astype(np.uint8)


def over_white(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Composite in exact fractions and round to the nearest level."""
    value = np.array([[Fraction(a, 255) for a in row] for row in alpha.tolist()])[..., None]
    exact = colour.astype(object) * value + 255 * (1 - value)
    return np.array([round(level) for level in exact.reshape(-1)]).reshape(exact.shape)


def samples(colour_type: int, depth: int) -> np.ndarray:
    return GENERATOR.integers(0, 2**depth, (*SHAPE, CHANNELS[colour_type]))


def to_eight(values: np.ndarray, depth: int) -> np.ndarray:
    return values >> 8 if depth == 16 else values * 255 // (2**depth - 1)


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_grey_of_every_depth(raw_png, depth):
    grey = samples(GREY, depth)
    assert np.array_equal(decoded(raw_png(grey, GREY, depth)), grey_rgb(to_eight(grey, depth)[..., 0]))


@pytest.mark.parametrize("depth", [8, 16])
def test_colour_of_every_depth(raw_png, depth):
    colour = samples(COLOUR, depth)
    assert np.array_equal(decoded(raw_png(colour, COLOUR, depth)), to_eight(colour, depth))


@pytest.mark.parametrize("depth", [8, 16])
@pytest.mark.parametrize("colour_type", [GREY_ALPHA, COLOUR_ALPHA])
def test_alpha_of_every_depth(raw_png, colour_type, depth):
    values = samples(colour_type, depth)
    eight = to_eight(values, depth)
    expected = over_white(eight[..., :-1], eight[..., -1])
    assert np.array_equal(decoded(raw_png(values, colour_type, depth)), np.broadcast_to(expected, RGB.shape))


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_grey_colour_key(raw_png, png_chunk, depth):
    grey = samples(GREY, depth)
    key = int(grey[2, 3, 0])
    if depth == 16:
        # Equal in the high byte only: not the key.
        grey[2, 4] = key ^ 1
    data = raw_png(grey, GREY, depth, before=png_chunk(b"tRNS", struct.pack(">H", key)))
    expected = np.where(grey == key, 255, to_eight(grey, depth))[..., 0]
    assert np.array_equal(decoded(data), grey_rgb(expected))


def test_rgb_colour_key(raw_png, png_chunk):
    colour = samples(COLOUR, 8)
    colour[1, 1] = colour[4, 4] = (9, 8, 7)
    colour[2, 2] = (9, 8, 6)
    data = raw_png(colour, COLOUR, 8, before=png_chunk(b"tRNS", struct.pack(">3H", 9, 8, 7)))
    expected = colour.copy()
    expected[1, 1] = expected[4, 4] = 255
    assert np.array_equal(decoded(data), expected)


def test_rgb_colour_key_of_sixteen_bits_is_refused(raw_png, png_chunk):
    key = png_chunk(b"tRNS", struct.pack(">3H", 999, 888, 777))
    assert reason_of(raw_png(samples(COLOUR, 16), COLOUR, 16, before=key)) == "unsupported_format"


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
@pytest.mark.parametrize("transparent", ["opaque", "one", "table"])
def test_palettes(raw_png, png_chunk, depth, transparent):
    colours = GENERATOR.integers(0, 256, (2**depth, 3)).astype(np.uint8)
    alpha = {
        "opaque": np.full(2**depth, 255),
        "one": np.array([0] + [255] * (2**depth - 1)),
        "table": GENERATOR.integers(0, 256, 2**depth),
    }[transparent].astype(np.uint8)
    before = png_chunk(b"PLTE", colours.tobytes())
    if transparent != "opaque":
        before += png_chunk(b"tRNS", alpha.tobytes())
    indices = samples(PALETTE, depth)
    shown = indices[..., 0]
    expected = over_white(colours[shown], alpha[shown])
    assert np.array_equal(decoded(raw_png(indices, PALETTE, depth, before)), expected)


@pytest.mark.parametrize("options", [{}, {"compression": "tiff_lzw"}], ids=["raw", "lzw"])
@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr"])
def test_tiff_modes(mode, options):
    image = Image.fromarray(RGB)
    if mode == "PA":
        image = image.quantize(8).convert("PA")
    elif mode in ("LA", "RGBA"):
        image = image.convert(mode)
        image.putalpha(Image.fromarray(ALPHA))
    else:
        image = image.convert(mode)
    expected = np.asarray(image.convert("RGB"))
    if mode in ("LA", "RGBA"):
        expected = over_white(expected, ALPHA)
    got = decoded(encoded(image, "TIFF", **options))
    # libtiff and Pillow round this one differently.
    assert np.abs(got - expected.astype(int)).max() <= (mode == "YCbCr" and bool(options))


def test_cmyk_arithmetic():
    ink = GENERATOR.integers(0, 256, (*SHAPE, 4)).astype(np.uint8)
    data = encoded(Image.frombytes("CMYK", SHAPE[::-1], ink.tobytes()), "TIFF")
    light = 255 - ink.astype(float)
    assert np.abs(decoded(data) - light[..., :3] * light[..., 3:] / 255).max() <= 1


@pytest.mark.parametrize("mode", ["La", "RGBa"])
def test_premultiplied_alpha(mode):
    image = Image.fromarray(RGB).convert("L" if mode == "La" else "RGB")
    image.putalpha(Image.fromarray(ALPHA))
    stored = np.asarray(image.convert(mode)).astype(int)
    expected = np.broadcast_to(stored[..., :-1] + 255 - stored[..., -1:], RGB.shape)
    assert np.array_equal(to_rgb(image.convert(mode)), expected)
    # More colour than alpha, which only damage makes, stays in range.
    assert to_rgb(Image.new("La", (1, 1), (255, 7))).tolist() == [[[255, 255, 255]]]


def test_premultiplied_alpha_of_a_tiff():
    image = Image.fromarray(RGB).convert("LA")
    image.putalpha(Image.fromarray(ALPHA))
    stored = np.asarray(image.convert("La")).astype(int)
    plain = Image.merge("LA", [Image.fromarray(stored[..., channel].astype(np.uint8)) for channel in (0, 1)])
    straight, premultiplied = (struct.pack("<HHIH", 338, 3, 1, kind) for kind in (2, 1))
    data = encoded(plain, "TIFF")
    assert data.count(straight) == 1
    data = data.replace(straight, premultiplied)
    assert Image.open(io.BytesIO(data)).mode == "La"
    assert np.array_equal(decoded(data), grey_rgb(stored[..., 0] + 255 - stored[..., 1]))


@pytest.mark.parametrize("order", ["<u2", ">u2"])
def test_tiff_of_sixteen_bits(order):
    grey = GENERATOR.integers(0, 65536, SHAPE).astype(order)
    image = Image.frombytes("I;16" if order == "<u2" else "I;16B", SHAPE[::-1], grey.tobytes())
    assert np.array_equal(decoded(encoded(image, "TIFF")), grey_rgb(grey >> 8))


def test_modes_without_a_conversion_are_refused():
    for mode in ("I", "F", "LAB"):
        assert reason_of(encoded(Image.new(mode, (3, 4)), "TIFF")) == "unsupported_format", mode
    inverted = Image.fromarray(np.zeros(SHAPE, np.uint16))
    assert reason_of(encoded(inverted, "TIFF", tiffinfo={262: 0})) == "unsupported_format"


@pytest.mark.parametrize("compression", ["jpeg", "group4"])
def test_tiff_compressions_that_hide_damage_are_refused(compression):
    image = Image.fromarray(RGB).convert("1" if compression == "group4" else "RGB")
    assert reason_of(encoded(image, "TIFF", compression=compression)) == "unsupported_format"


@pytest.mark.parametrize("interlace", [0, 1])
@pytest.mark.parametrize("options", [{}, {"transparency": 5}], ids=["opaque", "transparent"])
def test_gif(options, interlace):
    image = Image.fromarray(RGB).quantize(16)
    shown = np.asarray(image)
    expected = np.asarray(image.convert("RGB")).copy()
    if options:
        expected[shown == 5] = 255
    assert np.array_equal(decoded(encoded(image, "GIF", interlace=interlace, **options)), expected)


def test_bmp_kinds(rle_bmp):
    palette = GENERATOR.integers(0, 256, (6, 3)).astype(np.uint8)
    indices = np.repeat(GENERATOR.integers(0, 6, SHAPE), 3, axis=1)
    assert np.array_equal(decoded(rle_bmp(indices, palette)), palette[indices])
    assert np.array_equal(decoded(encoded(Image.fromarray(RGB), "BMP")), RGB)
    quantized = Image.fromarray(RGB).quantize(9)
    assert np.array_equal(decoded(encoded(quantized, "BMP")), np.asarray(quantized.convert("RGB")))
    with_alpha = Image.fromarray(np.dstack([RGB, ALPHA]))
    data = encoded(with_alpha, "BMP")
    assert np.array_equal(decoded(data), over_white(RGB, ALPHA) if b"BGRs" in data[:150] else RGB)


def test_webp_with_alpha():
    data = encoded(Image.fromarray(np.dstack([RGB, ALPHA])), "WEBP", lossless=True, exact=True)
    assert np.array_equal(decoded(data), over_white(RGB, ALPHA))


def smooth(shape: tuple[int, ...]) -> np.ndarray:
    coarse = Image.fromarray(GENERATOR.integers(0, 256, (3, 3, *shape[2:])).astype(np.uint8))
    return np.asarray(coarse.resize(shape[1::-1], Image.Resampling.BICUBIC))


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"progressive": True},
        {"quality": 20},
        {"quality": 100, "subsampling": 0},
        {"subsampling": 1},
        {"restart_marker_rows": 1},
        {"optimize": True, "dpi": (72, 72)},
    ],
    ids=str,
)
def test_jpeg_has_the_pixels_of_pillow(mode, options):
    if mode == "CMYK" and "subsampling" in options:
        options = {**options, "subsampling": 0}
    for shape in ((1, 1), (16, 16), (37, 53)):
        data = encoded(Image.fromarray(smooth((*shape, 3))).convert(mode), "JPEG", **options)
        assert np.array_equal(decoded(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


def test_jpeg_of_rgb_components():
    pixels = smooth((24, 40, 3))
    data = encoded(Image.fromarray(pixels), "JPEG", quality=100, keep_rgb=True)
    assert np.array_equal(decoded(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
    assert np.abs(decoded(data).astype(int) - pixels).max() <= 3


def test_ycck_jpeg_is_inverted_ink():
    stored = smooth((24, 40, 4))
    data = simplejpeg.encode_jpeg(stored, 100, colorspace="CMYK", colorsubsampling="444")
    assert simplejpeg.decode_jpeg_header(data)[2] == "YCCK"
    light = stored.astype(float)
    assert np.abs(decoded(data) - light[..., :3] * light[..., 3:] / 255).max() <= 6
    assert np.array_equal(decoded(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


def test_colour_profiles_are_not_applied():
    from PIL import ImageCms

    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ")).tobytes()
    for fmt in ("PNG", "TIFF", "WEBP"):
        options = {"lossless": True} if fmt == "WEBP" else {}
        data = encoded(Image.fromarray(RGB), fmt, icc_profile=lab, **options)
        assert Image.open(io.BytesIO(data)).info["icc_profile"] == lab
        assert np.array_equal(decoded(data), RGB), fmt
