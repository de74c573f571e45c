"""CIFAR-10 in its binary version: an archive or a folder of `.bin` files, read record by record.

A record is one label byte and 3,072 colour bytes (red, green and blue planes of 32 x 32, row by row), so the
format needs no library and cannot carry code, unlike the pickles of the archive's Python version.
Source: Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009.
"""

import lzma
import shutil
import tarfile
import zlib
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from acsr_ray.corpus.images import Pixels
from acsr_ray.corpus.samples import Sample, SampleSet, hold_out
from acsr_ray.corpus.sources import CorpusError

URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
SHA256 = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"
CLASS_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SIDE = 32
RECORD_BYTES = 1 + 3 * SIDE**2
TRAIN_FILES = tuple(f"data_batch_{number}.bin" for number in range(1, 6))
TEST_FILE = "test_batch.bin"
MAX_MEMBERS = 1000
MAX_UNPACKED_BYTES = 2**30
"""Six times what CIFAR-10 has."""
PYTHON_FILES = frozenset({"batches.meta", "test_batch", *(name.removesuffix(".bin") for name in TRAIN_FILES)})


def extract_batches(archive: Path, folder: Path) -> None:
    """Copy the six batches of a tar archive into a folder; nothing else of the archive is written.

    Raises:
        CorpusError: not a tar archive, cut off, too large, the Python version, or one with a batch that is
            there twice or is no plain file.
    """
    seen: set[str] = set()
    size = 0
    try:
        with tarfile.open(archive) as tar:
            for number, member in enumerate(tar, 1):
                size += member.size
                # Before the next member is looked for, which unpacks this one.
                if number > MAX_MEMBERS or size > MAX_UNPACKED_BYTES:
                    raise CorpusError(
                        f"{archive} holds more than {MAX_MEMBERS} files or {MAX_UNPACKED_BYTES >> 20} MiB"
                    )
                # The name's last part alone, so no member can point out of the folder.
                name = PurePosixPath(member.name).name
                if name in (*TRAIN_FILES, TEST_FILE):
                    if name in seen or not member.isreg():
                        raise CorpusError(f"{archive} has {name} twice, or as a link, a device or a folder")
                    _copy_member(tar, member, folder / name)
                seen.add(name)
    except CorpusError:
        raise
    except (tarfile.TarError, EOFError, OSError, ValueError, zlib.error, lzma.LZMAError) as error:
        raise CorpusError(f"{archive} is not a readable tar archive: {error}") from error
    _check_names(archive, seen)


def _copy_member(tar: tarfile.TarFile, member: tarfile.TarInfo, target: Path) -> None:
    content = tar.extractfile(member)
    if content is None:
        raise tarfile.ExtractError(f"{member.name} has no content")
    with content, target.open("xb") as file:
        shutil.copyfileobj(content, file)


def read_cifar10(folder: Path, validation_share: float, seed: int) -> SampleSet:
    """List the records of a folder of batches in the official order.

    Args:
        folder: holds the six `.bin` files, directly or in a sub-folder.
        validation_share: share of the 50,000 training images, which have no official validation split.
        seed: fixes which ones, ten classes alike.

    Raises:
        CorpusError: a batch that is missing, or not of whole records with labels 0..9.
    """
    batches = {path.name: path for path in sorted(folder.rglob("*")) if path.is_file()}
    _check_names(folder, batches)
    records = {name: _records(batches[name]) for name in (*TRAIN_FILES, TEST_FILE)}
    by_path = {batches[name]: array for name, array in records.items()}

    def read(sample: Sample) -> Pixels:
        planes = by_path[sample.path][sample.row, 1:].reshape(3, SIDE, SIDE)
        return np.ascontiguousarray(planes.transpose(1, 2, 0))

    def samples(name: str) -> list[Sample]:
        stem = name.removesuffix(".bin")
        labels = records[name][:, 0].tolist()
        return [Sample(f"{stem}/{row:05d}", label, batches[name], row) for row, label in enumerate(labels)]

    everything = [sample for name in TRAIN_FILES for sample in samples(name)]
    train, validation = hold_out(everything, validation_share, seed)
    splits = {"train": train, "validation": validation, "test": samples(TEST_FILE)}
    return SampleSet(CLASS_NAMES, splits, read, {"format": "CIFAR-10 binary"})


def _check_names(where: Path, names: Iterable[str]) -> None:
    found = set(names)
    missing = [name for name in (*TRAIN_FILES, TEST_FILE) if name not in found]
    if missing and found & PYTHON_FILES:
        raise CorpusError(
            f"{where} is CIFAR-10's Python version, whose batches are pickles and could run code; "
            f"give the binary version, {URL}"
        )
    if missing:
        raise CorpusError(f"{where} is not CIFAR-10's binary version: it has no {', '.join(missing)}")


def _records(path: Path) -> NDArray[np.uint8]:
    """Map a batch as (N, 3073) bytes; pages are read when touched."""
    size = path.stat().st_size
    if not size or size % RECORD_BYTES:
        raise CorpusError(f"{path} has {size} bytes, not a multiple of a record's {RECORD_BYTES}")
    records = np.memmap(path, np.uint8, "r").reshape(-1, RECORD_BYTES)
    if (largest := int(records[:, 0].max())) >= len(CLASS_NAMES):
        raise CorpusError(f"{path} has label {largest}; CIFAR-10's are 0 to {len(CLASS_NAMES) - 1}")
    return records
