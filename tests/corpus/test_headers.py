"""Sizes read from headers are those that a decoder finds, and bytes of any kind raise nothing."""

import io
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from acsr_ray.corpus.headers import image_size

KINDS = [
    ("PNG", {}),
    ("JPEG", {}),
    ("JPEG", {"progressive": True, "comment": b"x" * 300}),
    ("WEBP", {}),
    ("WEBP", {"lossless": True}),
    ("WEBP", {"exif": b"Exif\0\0" + b"\0" * 20}),
    ("BMP", {}),
    ("GIF", {}),
]


@pytest.mark.parametrize(("kind", "options"), KINDS)
@pytest.mark.parametrize("size", [(1, 1), (17, 300), (300, 17)])
def test_the_size_of_every_format(kind, options, size, encoded):
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    assert image_size(encoded(pixels, kind, **options)) == size


def test_a_bitmap_upside_down_and_one_of_an_old_header(encoded):
    data = bytearray(encoded(np.zeros((7, 5, 3), np.uint8), "BMP"))
    data[22:26] = (-7).to_bytes(4, "little", signed=True)
    assert image_size(bytes(data)) == (7, 5)
    old = b"BM" + bytes(12) + (12).to_bytes(4, "little") + (5).to_bytes(2, "little") + b"\x07\0"
    assert image_size(old) == (7, 5)


@pytest.mark.parametrize("data", [None, b"", b"II*\0", b"\xff\xd8\xff", b"\x89PNG", b"RIFFxxxxWEBPVP8?"])
def test_what_has_no_size_here(data):
    assert image_size(data) is None


@settings(deadline=None)
@given(st.sampled_from(range(len(KINDS))), st.randoms(use_true_random=False))
def test_damage_raises_nothing(kind, draws: random.Random):
    data = bytearray(_encoded(kind))
    for _ in range(draws.randrange(4)):
        data[draws.randrange(min(64, len(data)))] = draws.randrange(256)
    size = image_size(bytes(data[: draws.randrange(len(data) + 1)]))
    assert size is None or min(size) > 0


def _encoded(kind: int) -> bytes:
    name, options = KINDS[kind]
    buffer = io.BytesIO()
    Image.new("RGB", (9, 12)).save(buffer, name, **options)
    return buffer.getvalue()
