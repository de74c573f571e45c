"""Folders of image files with one sub-folder per class: ImageNet's layout, and unsplit sets.

Files are listed, not read; `image_id` is the path below the folder without suffix.
"""

import csv
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from acsr_ray.corpus.images import DecodeLimits, ImageError, Pixels, decode_image
from acsr_ray.corpus.samples import SPLITS, Sample, SampleSet, hold_out, shuffled, stratified_split
from acsr_ray.corpus.sources import IMAGE_SUFFIXES, CorpusError

logger = logging.getLogger(__name__)

IMAGENETTE: Mapping[str, str] = {
    "n01440764": "tench",
    "n02102040": "English springer",
    "n02979186": "cassette player",
    "n03000684": "chain saw",
    "n03028079": "church",
    "n03394916": "French horn",
    "n03417042": "garbage truck",
    "n03425413": "gas pump",
    "n03445777": "golf ball",
    "n03888257": "parachute",
}
"""The ten classes taken where the paper names none, and their names."""

CONTENT_FILTER_SHARES = (14, 3, 3)
"""Train, validation and test of the paper's content-filter set."""

LIMITS = DecodeLimits()


def read_split_folder(
    folder: Path,
    classes: Mapping[str, str],
    *,
    image_size: int,
    validation_share: float,
    seed: int,
    test_labels: Path | None = None,
) -> SampleSet:
    """List `folder/train/<class>/*` and the test images `folder/{val,test}/<class>/*`.

    A folder that has no split of its own for choosing parameters gets one: a stratified share of train. With
    both `val` and `test` present, `val` still is the test split where ImageNet has labels, so `test` is
    taken only when `val` is missing.

    Args:
        folder: holds `train`, and `val` or `test`.
        classes: name of each class sub-folder, in the order of the labels; other sub-folders are left out.
        image_size: side of the centre square, see `centre_square`.
        validation_share: share of the training images held out for validation.
        seed: fixes the choice and the order of the rows.
        test_labels: CSV of image name and class for test images that lie in one flat folder.

    Raises:
        CorpusError: a folder or class that is missing or empty, or two files of one name.
    """
    train_root = folder / "train"
    test_root = next((folder / name for name in ("val", "test") if (folder / name).is_dir()), None)
    if not train_root.is_dir() or test_root is None:
        raise CorpusError(f"{folder} must have the folders train and val (or test)")
    train = [
        s for label, name in enumerate(classes) for s in _class_samples(folder, train_root / name, label)
    ]
    if test_labels:
        test = _flat_samples(folder, test_root, classes, test_labels)
    elif any((test_root / name).is_dir() for name in classes):
        test = [
            s for label, name in enumerate(classes) for s in _class_samples(folder, test_root / name, label)
        ]
    else:
        raise CorpusError(f"{test_root} has no class sub-folders; --test-labels names the CSV of its labels")
    _check_unique([*train, *test])
    kept, held = hold_out(train, validation_share, seed)
    splits = {"train": shuffled(kept, seed), "validation": shuffled(held, seed), "test": shuffled(test, seed)}
    return SampleSet(tuple(classes.values()), splits, square_reader(image_size), {"format": "split folder"})


def read_class_folder(folder: Path, *, image_size: int, seed: int) -> SampleSet:
    """List `folder/<class>/*` and split it 14:3:3, class by class; class names are those of the sub-folders.

    Args:
        folder: its visible sub-folders are the classes, in alphabetical order.
        image_size: side of the centre square, see `centre_square`.
        seed: fixes the split and the order of the rows.

    Raises:
        CorpusError: fewer than two classes, an empty one, or two files of one name.
    """
    names = [
        path.name for path in sorted(folder.iterdir()) if path.is_dir() and not path.name.startswith(".")
    ]
    if len(names) < 2:
        raise CorpusError(f"{folder} must have a sub-folder per class, two at least; it has {len(names)}")
    if {"train", "val", "test"} & set(names):
        raise CorpusError(f"{folder} is split already (it has {', '.join(names)}); this set is split here")
    samples = [s for label, name in enumerate(names) for s in _class_samples(folder, folder / name, label)]
    _check_unique(samples)
    parts = stratified_split([sample.label for sample in samples], CONTENT_FILTER_SHARES, seed)
    splits = {
        split: shuffled([samples[i] for i in part], seed) for split, part in zip(SPLITS, parts, strict=True)
    }
    return SampleSet(tuple(names), splits, square_reader(image_size), {"format": "class folder"})


def square_reader(image_size: int) -> Callable[[Sample], Pixels]:
    """Return a reader of image files as squares; it raises `ImageError` for what cannot be used."""

    def read(sample: Sample) -> Pixels:
        try:
            data = sample.path.read_bytes()
        except OSError as error:
            raise ImageError("decode_error", str(error)) from error
        return centre_square(decode_image(data, LIMITS), image_size)

    return read


def centre_square(pixels: Pixels, size: int) -> Pixels:
    """Resize the shorter side to `size` (Lanczos) and cut out the centre.

    Args:
        pixels: (H, W, 3) uint8.
        size: side in pixels.

    Returns:
        (size, size, 3) uint8; the very pixels when they already are such a square.

    Raises:
        ImageError: sides so unequal that the resized image would be too large.
    """
    height, width = pixels.shape[:2]
    if (height, width) == (size, size):
        return pixels
    scale = size / min(height, width)
    new_width, new_height = max(size, round(width * scale)), max(size, round(height * scale))
    if max(new_width, new_height) > LIMITS.max_side:
        raise ImageError("too_large", f"{width}x{height} would become {new_width}x{new_height}")
    resized = Image.fromarray(pixels).resize((new_width, new_height), Image.Resampling.LANCZOS)
    left, top = (new_width - size) // 2, (new_height - size) // 2
    return np.asarray(resized.crop((left, top, left + size, top + size)))


def _image_files(folder: Path) -> Iterator[Path]:
    skipped = 0
    for path in sorted(folder.rglob("*")):
        if path.name.startswith(".") or not path.is_file():
            continue
        if path.suffix.lower() in IMAGE_SUFFIXES:
            yield path
        else:
            skipped += 1
    if skipped:
        logger.info("%d files of %s are not images by their names", skipped, folder)


def _sample(root: Path, path: Path, label: int) -> Sample:
    return Sample(path.relative_to(root).with_suffix("").as_posix(), label, path)


def _class_samples(root: Path, folder: Path, label: int) -> list[Sample]:
    if not folder.is_dir():
        raise CorpusError(f"class folder {folder} does not exist")
    samples = [_sample(root, path, label) for path in _image_files(folder)]
    if not samples:
        raise CorpusError(f"class folder {folder} has no image")
    return samples


def _flat_samples(root: Path, folder: Path, classes: Mapping[str, str], labels: Path) -> list[Sample]:
    label_of = {name: label for label, name in enumerate(classes)}
    class_of = _read_labels(labels)
    files = list(_image_files(folder))
    unnamed = [path.name for path in files if path.stem not in class_of]
    if unnamed:
        raise CorpusError(f"{labels} has no label of {len(unnamed)} files of {folder}, such as {unnamed[0]}")
    wanted = ((path, label_of.get(class_of[path.stem])) for path in files)
    return [_sample(root, path, label) for path, label in wanted if label is not None]


def _read_labels(path: Path) -> dict[str, str]:
    """Return the class of each file stem; boxes after the class, as Kaggle's file has, are left out."""
    try:
        with path.open(newline="") as file:
            rows = [row for row in csv.reader(file) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise CorpusError(f"{path} is not a readable CSV: {error}") from error
    if not rows or any(len(row) < 2 or not row[1].split() for row in rows):
        raise CorpusError(f"{path} must have two columns, image name and class")
    return {Path(row[0]).stem: row[1].split()[0] for row in rows}


def _check_unique(samples: Sequence[Sample]) -> None:
    """Refuse two files that differ in their suffix alone: their rows would have one key."""
    first: dict[str, Path] = {}
    for sample in samples:
        other = first.setdefault(sample.image_id, sample.path)
        if other is not sample.path:
            raise CorpusError(f"{other} and {sample.path.name} have the same name; rename or remove one")
