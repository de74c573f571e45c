"""Labelled images that are yet to be read, in splits: what the readers of public data sets return."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from acsr_ray.corpus.images import Pixels
from acsr_ray.corpus.sources import CorpusError

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Sample:
    """One image, by where it lies; a hundred bytes, however large the image."""

    image_id: str
    label: int
    path: Path
    row: int = 0
    """Record of a file that holds several."""


@dataclass(frozen=True)
class SampleSet:
    """The splits of a data set and how one of its images is read."""

    class_names: tuple[str, ...]
    splits: Mapping[str, Sequence[Sample]]
    """By the names of `SPLITS`."""
    read: Callable[[Sample], Pixels]
    """Returns (H, W, 3) uint8 or raises `ImageError`."""
    notes: Mapping[str, object]
    """What the manifest says about the source."""


def stratified_split(
    labels: Sequence[int] | NDArray[np.int64], shares: Sequence[float], seed: int
) -> list[NDArray[np.int64]]:
    """Split positions at random so that every class has the same shares, to within one image.

    Each class has its own random stream, so that images added to one class move no image of another.

    Args:
        labels: (N,) class of each image.
        shares: relative sizes of the parts, such as (14, 3, 3).
        seed: fixes the choice.

    Returns:
        One ascending array of positions per share; together they are 0..N-1.

    Raises:
        ValueError: shares that are negative or add up to nothing.
    """
    weights = np.asarray(shares, np.float64)
    if weights.ndim != 1 or not weights.size or (weights < 0).any() or weights.sum() <= 0:
        raise ValueError(f"shares must be >= 0 with a sum > 0, got {list(shares)}")
    classes = np.asarray(labels, np.int64)
    parts: list[list[NDArray[np.int64]]] = [[] for _ in weights]
    for label in np.unique(classes):
        members = np.flatnonzero(classes == label)
        members = members[np.random.default_rng([seed, int(label)]).permutation(len(members))]
        # Cumulated shares are rounded, not the shares: the parts then always add up.
        ends = np.rint(np.cumsum(weights)[:-1] / weights.sum() * len(members)).astype(int)
        for part, chosen in zip(parts, np.split(members, ends), strict=True):
            part.append(chosen)
    return [np.sort(np.concatenate(part)) if part else np.empty(0, np.int64) for part in parts]


def hold_out(samples: Sequence[Sample], share: float, seed: int) -> tuple[list[Sample], list[Sample]]:
    """Take a stratified, seeded share away from training images; return (train, validation) in order."""
    kept, held = stratified_split([sample.label for sample in samples], (1 - share, share), seed)
    return [samples[i] for i in kept], [samples[i] for i in held]


def check_splits(counts: Mapping[str, Sequence[int]], class_names: Sequence[str]) -> None:
    """Raise `CorpusError` unless every split has an image of every class.

    Args:
        counts: images per class of each split.
        class_names: name of each class.
    """
    for split, per_class in counts.items():
        empty = [name for name, count in zip(class_names, per_class, strict=True) if not count]
        if empty:
            raise CorpusError(f"split {split} has no image of {', '.join(empty)}")


def class_counts(samples: Sequence[Sample], num_classes: int) -> list[int]:
    """Return the number of samples of each class."""
    return np.bincount([sample.label for sample in samples], minlength=num_classes).tolist()


def shuffled(samples: Sequence[Sample], seed: int) -> list[Sample]:
    """Return the samples in a seeded random order, so that any run of them holds all classes."""
    return [samples[i] for i in np.random.default_rng(seed).permutation(len(samples))]
