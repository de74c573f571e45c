"""WebDataset tars as rows: members that share a key are one sample, and a run of samples is one unit.

A member's key is its path up to the first dot of its last part, its extension what follows that dot, in
lower case. A row has `__key__`, `image` {bytes, path}, `json` and `txt` as text and `cls` as int64, null
where the sample has no such member; members with other extensions are left out and counted. The image is the
member with an image's extension; compound ones (`seg.png`) only count where there is no plain one. Which of
several images is the row's cannot be told, so such a shard is refused, as is one where a key comes again.

A tar is indexed by its headers alone, with a few bytes of memory for each sample. A unit then knows its bytes
in the tar and reads no others.
"""

import logging
import re
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np
import pyarrow as pa

from acsr_ray.columns import IMAGE
from acsr_ray.corpus.container_errors import ContainerCode, ContainerError
from acsr_ray.corpus.schema import IMAGE_TYPE, image_features
from acsr_ray.corpus.sources import CHAIN, IMAGE_SUFFIXES
from acsr_ray.corpus.tar_members import TAR_LIMITS, Member, Stored, TarLimits, read_body, tar_members
from acsr_ray.storage import open_filesystem

logger = logging.getLogger(__name__)

KEY, JSON, TEXT, CLASS_ID = "__key__", "json", "txt", "cls"
TEXTS = (JSON, TEXT, CLASS_ID)
CLASS_NUMBER = re.compile(rb"\s*([+-]?\d{1,19})\s*\Z")

READ_AHEAD = 4 * 2**20
"""Bytes that an object store is asked for at once. A request takes about as long as so many bytes, so smaller
bodies between two headers are read over, and larger ones are skipped."""
MOST_EXTENSIONS, OTHERS = 100, "..."
"""So many are counted by name; the rest together."""
SHOWN = 8


@dataclass(frozen=True)
class Sample:
    """Members that share a key."""

    key: str
    start: int
    """First byte of its first member's headers."""
    end: int
    image: Member | None
    texts: Mapping[str, Member]
    """Of `TEXTS`, those that it has."""
    left_out: Sequence[str]
    """Extensions of its other members."""

    @property
    def num_bytes(self) -> int:
        """Bytes that its row holds."""
        return sum(text.size for text in self.texts.values()) + (self.image.size if self.image else 0)


@dataclass(frozen=True)
class Run:
    """Samples `first`..`last` of a tar, and the bytes from `start` to `end` that hold them."""

    first: int
    last: int
    start: int
    end: int


@dataclass(frozen=True)
class TarIndex:
    """What the headers of a tar say."""

    runs: tuple[Run, ...]
    num_bytes: int
    """Of images and texts, which are all that is read."""
    left_out: Mapping[str, int]
    """Members that are in no column by extension; "" for files that belong to no sample."""


def index_tar(
    uri: str, run_rows: int, run_bytes: float = float("inf"), limits: TarLimits = TAR_LIMITS
) -> TarIndex:
    """Read the headers of a tar and cut its samples into runs.

    Args:
        uri: of any store that fsspec opens.
        run_rows: most samples of a run.
        run_bytes: most bytes of images and texts of a run, unless one sample alone has more.
        limits: what it may have.

    Raises:
        ContainerError: the tar is refused.
        OSError: the store does not deliver it.
    """
    runs: list[Run] = []
    row = rows = size = total = start = end = 0
    keys, left_out = array("Q"), Counter[str]()
    with _open_tar(uri) as stored:
        for sample in _samples(tar_members(stored, uri, limits), uri, limits, left_out):
            if rows and (rows == run_rows or size + sample.num_bytes > run_bytes):
                runs.append(Run(row - rows, row - 1, start, end))
                rows = size = 0
            if not rows:
                start = sample.start
            keys.append(int.from_bytes(blake2b(sample.key.encode(), digest_size=8).digest()))
            for name in sample.left_out:
                left_out[name if name in left_out or len(left_out) < MOST_EXTENSIONS else OTHERS] += 1
            row, rows, size, end = row + 1, rows + 1, size + sample.num_bytes, sample.end
            total += sample.num_bytes
    if rows:
        runs.append(Run(row - rows, row - 1, start, end))
    _check_keys(keys, uri)
    return TarIndex(tuple(runs), total, left_out)


def tell_left_out(index: TarIndex, uri: str) -> None:
    """Log which members of a tar are in no column, in one line."""
    if index.left_out:
        most = Counter(index.left_out).most_common(SHOWN)
        named = ", ".join(f"{count} {extension!a}" for extension, count in most)
        logger.info("%d members of %s are left out: %s", sum(index.left_out.values()), uri, named)


def read_samples(
    uri: str, span: tuple[int, int, int], first: int, last: int, limits: TarLimits = TAR_LIMITS
) -> pa.Table:
    """Read samples `first`..`last` of a tar.

    Args:
        uri: of the tar.
        span: the bytes of a run's start and end, and the row of its first sample.
        first: row of the first sample; not before the run's.
        last: row of the last one; what the run has behind it is not read.
        limits: as it was indexed with.

    Returns:
        As many rows of them as there are.

    Raises:
        ContainerError: it is damaged, or a text is none.
        OSError: the store does not deliver it.
    """
    start, end, row = span
    columns: dict[str, list[Any]] = {name: [] for name in (KEY, IMAGE, *TEXTS)}
    with _open_tar(uri) as stored:
        members = tar_members(stored, uri, limits, start, end)
        for number, sample in enumerate(_samples(members, uri, limits, Counter()), row):
            if number > last:
                break
            if number >= first:
                columns[KEY].append(sample.key)
                columns[IMAGE].append(_image_cell(stored, sample.image))
                for name in TEXTS:
                    columns[name].append(_text_cell(stored, uri, name, sample.texts.get(name)))
    kinds = {KEY: pa.string(), IMAGE: IMAGE_TYPE, JSON: pa.string(), TEXT: pa.string(), CLASS_ID: pa.int64()}
    table = pa.table({name: pa.array(columns[name], kind) for name, kind in kinds.items()})
    others = {JSON: "string", TEXT: "string", CLASS_ID: "int64"}
    return table.replace_schema_metadata(image_features((KEY,), (), others))


@contextmanager
def _open_tar(uri: str) -> Iterator[Stored]:
    if CHAIN in uri:
        raise ContainerError("unreadable", f"{uri} cannot be read: its name has {CHAIN!r}")
    fs, path = open_filesystem(uri)
    with fs.open(path, "rb", block_size=READ_AHEAD) as stored:
        yield stored


def _samples(
    members: Iterable[Member], uri: str, limits: TarLimits, others: Counter[str]
) -> Iterator[Sample]:
    """Group neighbouring members by key; files without one are counted in `others` as ""."""
    key, parts = "", dict[str, Member]()
    for member in members:
        folder, slash, base = member.name.rpartition("/")
        stem, dot, extension = base.partition(".")
        if not stem or not dot:
            others[""] += 1
            continue
        own, extension = f"{folder}{slash}{stem}", extension.lower()
        if parts and own != key:
            yield _sample(key, parts, uri, limits)
            parts = {}
        if extension in parts:
            raise _refused("duplicate_member", uri, member, f"its sample has two members {extension!a}")
        if len(parts) == limits.max_sample_members:
            raise _refused("too_large", uri, member, f"its sample has more than {len(parts)} members")
        key, parts[extension] = own, member
    if parts:
        yield _sample(key, parts, uri, limits)


def _sample(key: str, parts: Mapping[str, Member], uri: str, limits: TarLimits) -> Sample:
    ordered = list(parts.values())
    images = [name for name in parts if f".{name}" in IMAGE_SUFFIXES] or [
        name for name in parts if f".{name.rpartition('.')[2]}" in IMAGE_SUFFIXES
    ]
    if len(images) > 1:
        found = ", ".join(ascii(name) for name in images[:SHOWN])
        raise _refused("several_images", uri, ordered[0], f"its sample has several images: {found}")
    texts = {name: parts[name] for name in TEXTS if name in parts}
    for most, read in ((limits.max_text_megabytes, texts), (limits.max_member_megabytes, images)):
        for name in read:
            if parts[name].size > most * 2**20:
                raise _refused("too_large", uri, parts[name], f"it has {parts[name].size} bytes")
    image = parts[images[0]] if images else None
    left_out = [name for name in parts if name not in texts and name not in images]
    return Sample(key, ordered[0].start, ordered[-1].end, image, texts, left_out)


def _check_keys(keys: "array[int]", uri: str) -> None:
    """Refuse a tar where a key comes again after other samples; as digests, to keep memory bounded."""
    digests = np.frombuffer(keys, np.uint64) if keys else np.zeros(0, np.uint64)
    order = np.argsort(digests, kind="stable")
    again = np.flatnonzero(digests[order][1:] == digests[order][:-1])
    if len(again):
        row, twin = order[again[0]], order[again[0] + 1]
        raise ContainerError(
            "scattered_sample",
            f"{uri} is not a tar that can be read: samples {row + 1} and {twin + 1} have the same key; "
            "whether they are two, or one in two places, cannot be told",
        )


def _image_cell(stored: Stored, member: Member | None) -> dict[str, Any] | None:
    return None if member is None else {"bytes": read_body(stored, member), "path": member.name}


def _text_cell(stored: Stored, uri: str, name: str, member: Member | None) -> str | int | None:
    if member is None:
        return None
    data = read_body(stored, member)
    if name == CLASS_ID:
        match = CLASS_NUMBER.match(data)
        if match is None or not -(2**63) <= int(match[1]) < 2**63:
            raise _refused("bad_text", uri, member, "its class is no whole number of 64 bits")
        return int(match[1])
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise _refused("bad_text", uri, member, "its text is no UTF-8") from None


def _refused(code: ContainerCode, uri: str, member: Member, detail: str) -> ContainerError:
    return ContainerError(code, f"{uri} is not a tar that can be read: {detail} ({member.name[:80]!a})")
