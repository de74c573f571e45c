"""Public data sets as Parquet shards: CIFAR-10, ten classes of ImageNet, a content-filter folder.

The shards hold lossless PNG. A training set without an official validation split gets one, because
parameters are chosen on validation images and never on test images.
"""

import logging
import shutil
from collections import Counter
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from acsr_ray.artifacts import file_digest, finish_artifact
from acsr_ray.config import JobSettings
from acsr_ray.corpus import cifar10
from acsr_ray.corpus.class_folders import IMAGENETTE, read_class_folder, read_split_folder
from acsr_ray.corpus.fetching import fetch
from acsr_ray.corpus.images import ImageError, Pixels
from acsr_ray.corpus.samples import SampleSet, check_splits, class_counts
from acsr_ray.corpus.sources import CorpusError
from acsr_ray.corpus.writing import ShardWriter

logger = logging.getLogger(__name__)

GRID_SHIFT = 3
"""Pixels; no multiple of 8, the side of JPEG's blocks."""


class PrepareCorpusSettings(JobSettings):
    """Turn a public data set into Parquet shards of lossless PNG: training, validation and test."""

    dataset: Literal["cifar10", "imagenet10", "content_filter"]
    """cifar10: binary archive, or folder of its .bin files, or DIR/{train,test}/<class>/*. imagenet10:
    DIR/{train,val}/<synset>/*. content_filter: DIR/<class>/*, split 14:3:3 within every class."""
    output: Path
    """Folder of the shards `train-*`, `validation-*` and `test-*` and of `manifest.json`; must not exist."""
    source: Path | None = None
    """The data set on this machine; without it CIFAR-10 is downloaded."""
    image_size: int | None = Field(None, ge=8)
    """Side in pixels of the centre square that images of folders are resized to, 64 unless given; CIFAR-10
    stays 32."""
    synsets: tuple[str, ...] = tuple(IMAGENETTE)
    """ImageNet classes in the order of their labels; the default are those of Imagenette."""
    test_labels: Path | None = None
    """CSV of image name and synset, for an ImageNet folder whose val/ has no sub-folders."""
    validation_share: float = Field(0.1, gt=0, lt=1)
    """Share of the training images that becomes the validation split, the same in every class; the
    content filter has its own."""
    grid_shift: bool = False
    """Shift images by 3 pixels with reflection: for copies that were stored as JPEG of the size prepared
    here, which a JPEG defence of the same quality would find unchanged and look perfect on. Official
    CIFAR-10 never was JPEG, and resized images left the grid of 8 x 8 blocks."""
    seed: int = Field(0, ge=0)
    """Fixes the splits and, for folders, the order of the rows."""
    shard_rows: int = Field(5000, ge=1)
    """Most images of a shard."""
    shard_megabytes: float = Field(128.0, gt=0)
    """Most MiB of PNG of a shard; this much is held in memory."""
    url: str = cifar10.URL
    """Where CIFAR-10's binary archive is downloaded, such as a mirror."""
    sha256: str = Field(cifar10.SHA256, pattern="^[0-9a-fA-F]{64}$")
    """Digest that the downloaded archive must have."""


def prepare_corpus(settings: PrepareCorpusSettings) -> dict[str, Any]:
    """Write the shards and return the counts; the output folder appears whole or not at all.

    Raises:
        CorpusError: a source that is missing or not what it should be, or an output that exists.
        FetchError: a download that failed or has the wrong digest.
    """
    source, output = settings.source, settings.output
    if source and not source.exists():
        raise CorpusError(f"source {source} does not exist")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise CorpusError(f"output {output} exists already; remove it or choose another")
    if settings.dataset != "cifar10" and source is None:
        raise CorpusError(
            f"{settings.dataset} cannot be downloaded without an account: --source names a copy"
        )
    if source and output.resolve().is_relative_to(source.resolve()):
        raise CorpusError(f"output {output} lies inside the source {source}")
    staging = output.with_name(f".{output.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    missing = [parent for parent in output.parents if not parent.exists()]
    try:
        (staging / "source").mkdir(parents=True)
        samples = _find_samples(settings, staging / "source")
        summary = _write_splits(settings, samples, staging)
        staging.replace(output)
    finally:
        # Whatever ended it: what is not published leaves nothing behind, the folders above it included.
        if not output.exists() or staging.exists():
            shutil.rmtree(staging, ignore_errors=True)
            for parent in missing:
                if parent.exists() and not any(parent.iterdir()):
                    parent.rmdir()
    return {**summary, "output": str(output)}


def shift_off_grid(pixels: Pixels) -> Pixels:
    """Move an image down and right by `GRID_SHIFT` pixels, filling in by reflection; (H, W, 3) uint8."""
    height, width = pixels.shape[:2]
    padded = np.pad(pixels, ((GRID_SHIFT, 0), (GRID_SHIFT, 0), (0, 0)), mode="reflect")
    return np.ascontiguousarray(padded[:height, :width])


def _find_samples(settings: PrepareCorpusSettings, scratch: Path) -> SampleSet:
    if settings.dataset == "cifar10":
        return _find_cifar10(settings, scratch)
    source, size = settings.source, settings.image_size or 64
    if source is None or not source.is_dir():
        raise CorpusError(f"source {source} of {settings.dataset} must be a folder")
    if settings.dataset == "content_filter":
        return read_class_folder(source, image_size=size, seed=settings.seed)
    if len(set(settings.synsets)) < max(2, len(settings.synsets)):
        raise CorpusError(f"--synsets must name two different classes at least, got {settings.synsets}")
    return read_split_folder(
        source,
        {synset: IMAGENETTE.get(synset, synset) for synset in settings.synsets},
        image_size=size,
        validation_share=settings.validation_share,
        seed=settings.seed,
        test_labels=settings.test_labels,
    )


def _find_cifar10(settings: PrepareCorpusSettings, scratch: Path) -> SampleSet:
    if settings.image_size not in (None, cifar10.SIDE):
        raise CorpusError(f"CIFAR-10 is 32 x 32; --image-size {settings.image_size} is for folders")
    source = settings.source
    if source is None:
        source = scratch / "cifar-10-binary.tar.gz"
        logger.info("downloading %s", settings.url)
        fetch(settings.url, source, settings.sha256)
    share, seed = settings.validation_share, settings.seed
    if source.is_dir() and (source / "train").is_dir():
        names = {name: name for name in cifar10.CLASS_NAMES}
        found = read_split_folder(source, names, image_size=cifar10.SIDE, validation_share=share, seed=seed)
        jpegs = sum(
            s.path.suffix.lower() in (".jpg", ".jpeg") for split in found.splits.values() for s in split
        )
        if jpegs and not settings.grid_shift:
            logger.warning(
                "%d images are JPEG: without --grid-shift a JPEG defence would look perfect", jpegs
            )
        return found
    if source.is_dir():
        return cifar10.read_cifar10(source, share, seed)
    cifar10.extract_batches(source, scratch)
    found = cifar10.read_cifar10(scratch, share, seed)
    digest = file_digest(source)
    notes = {**found.notes, "archive_sha256": digest, "official_archive": digest == cifar10.SHA256}
    return SampleSet(found.class_names, found.splits, found.read, notes)


def _write_splits(settings: PrepareCorpusSettings, samples: SampleSet, folder: Path) -> dict[str, Any]:
    num_classes = len(samples.class_names)
    # Before the hours of decoding, and again for what turned out unreadable.
    listed = {split: class_counts(members, num_classes) for split, members in samples.splits.items()}
    check_splits(listed, samples.class_names)
    counts: dict[str, list[int]] = {}
    shards: list[Path] = []
    unreadable: list[dict[str, str]] = []
    sides: Counter[str] = Counter()
    for split, members in samples.splits.items():
        writer = ShardWriter(
            folder,
            split,
            samples.class_names,
            max_rows=settings.shard_rows,
            max_bytes=int(settings.shard_megabytes * 2**20),
        )
        counts[split] = [0] * num_classes
        for sample in members:
            try:
                pixels = samples.read(sample)
            except ImageError as error:
                logger.warning("%s is left out: %s", sample.path, error)
                unreadable.append({"split": split, "image_id": sample.image_id, "reason": error.reason})
                continue
            pixels = shift_off_grid(pixels) if settings.grid_shift else pixels
            writer.add(pixels, sample.label, sample.image_id)
            counts[split][sample.label] += 1
            sides[f"{pixels.shape[1]}x{pixels.shape[0]}"] += 1
        shards += writer.close()
        logger.info("%s: %d images", split, sum(counts[split]))
    check_splits(counts, samples.class_names)
    shutil.rmtree(folder / "source")
    content = {
        "settings": settings.model_dump(mode="json", exclude={"config", "output"}),
        "source": dict(samples.notes),
        "class_names": list(samples.class_names),
        "image_sizes": dict(sides),
        "images_per_class": counts,
        "unreadable": unreadable,
    }
    finish_artifact(folder, "corpus", [path.name for path in shards], content)
    totals = {split: sum(per_class) for split, per_class in counts.items()}
    return {**totals, "unreadable": len(unreadable), "shards": len(shards)}
