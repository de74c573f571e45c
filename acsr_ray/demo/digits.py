"""scikit-learn's 1,797 real digits as three shards of 32 x 32 RGB images."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits

from acsr_ray.corpus.images import Pixels
from acsr_ray.corpus.writing import write_shard

SIDE = 32
TEST, VALIDATION = 360, 200
CLASS_NAMES = tuple(str(digit) for digit in range(10))


@dataclass(frozen=True)
class Split:
    """One split: pixels (N, 32, 32, 3) uint8, labels (N,), keys."""

    name: str
    pixels: Pixels
    labels: NDArray[np.int64]
    image_ids: tuple[str, ...]

    def write(self, directory: Path) -> Path:
        """Write the split as one Parquet shard and return its path."""
        path = directory / f"{self.name}.parquet"
        write_shard(path, self.pixels, self.labels, self.image_ids, CLASS_NAMES)
        return path


def load_splits(seed: int = 0) -> dict[str, Split]:
    """Return the splits `train` (1,237 images), `validation` (200) and `test` (360)."""
    bunch = load_digits()
    pixels = np.stack([_enlarge(image) for image in bunch.images])
    order = np.random.default_rng(seed).permutation(len(pixels))
    parts = {
        "test": order[:TEST],
        "validation": order[TEST : TEST + VALIDATION],
        "train": order[TEST + VALIDATION :],
    }
    return {
        name: Split(
            name,
            pixels[chosen],
            bunch.target[chosen].astype(np.int64),
            tuple(f"digit-{number:04d}" for number in chosen),
        )
        for name, chosen in parts.items()
    }


def _enlarge(image: NDArray[np.float64]) -> Pixels:
    grey = Image.fromarray((image * (255 / 16)).astype(np.uint8))
    return np.asarray(grey.resize((SIDE, SIDE), Image.Resampling.BICUBIC).convert("RGB"))
