"""Compression as a defence: JPEG, and SHIELD's stochastic local quantisation.

Sources: Dziugaite et al. 2016 (JPEG); Das et al. 2018, SHIELD, whose retrained ensemble of classifiers is
left out, as every defence here is judged on the same classifier.
"""

import io
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from acsr_ray.defenses.base import Floats, PerImage, to_bytes

Subsampling = Literal["4:4:4", "4:2:2", "4:2:0"]

SHIELD_QUALITIES = (20, 40, 60, 80)
BLOCK = 8


def jpeg_round_trip(
    pixels: NDArray[np.uint8], quality: int, subsampling: Subsampling = "4:2:0"
) -> NDArray[np.uint8]:
    """Return (H, W, 3) 8-bit pixels after JPEG compression."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality, subsampling=subsampling)
    with Image.open(buffer) as image:
        return np.asarray(image)


class Jpeg(PerImage):
    """JPEG of one quality.

    Args:
        quality: 1 to 100, as libjpeg counts.
        subsampling: of the chroma channels.

    Raises:
        ValueError: quality out of range.
    """

    def __init__(self, quality: int = 75, subsampling: Subsampling = "4:2:0") -> None:
        super().__init__()
        if not 1 <= quality <= 100:
            raise ValueError(f"quality must be in 1..100, got {quality}")
        self.quality = quality
        self.subsampling: Subsampling = subsampling

    def defend(self, image: Floats, generator: np.random.Generator) -> Floats:
        """Return the image compressed; see `PerImage.defend`."""
        return jpeg_round_trip(to_bytes(image), self.quality, self.subsampling) / np.float32(255)


class Shield(PerImage):
    """Every 8 x 8 block from a JPEG of a quality drawn from 20, 40, 60, 80."""

    randomized = True

    def defend(self, image: Floats, generator: np.random.Generator) -> Floats:
        """Return the mosaic; see `PerImage.defend`."""
        pixels = to_bytes(image)
        versions = np.stack([jpeg_round_trip(pixels, quality) for quality in SHIELD_QUALITIES])
        height, width = pixels.shape[:2]
        chosen = generator.integers(len(versions), size=(-(-height // BLOCK), -(-width // BLOCK)))
        which = chosen.repeat(BLOCK, 0).repeat(BLOCK, 1)[:height, :width]
        rows, columns = np.indices((height, width))
        return versions[which, rows, columns] / np.float32(255)
