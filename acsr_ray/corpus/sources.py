"""What a corpus is made of: Parquet shards, WebDataset tars or an image folder, found behind one URI.

Anything fsspec can list and open is a source. A corpus of shards is one file or a folder of them, all of one
kind; an image folder's first-level sub-folders, where it has any, are the class names.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec

from acsr_ray.config import AcsrError
from acsr_ray.corpus.names import safe_name
from acsr_ray.storage import open_filesystem

SHARD_SUFFIX, TAR_SUFFIX = ".parquet", ".tar"
SHARD_SUFFIXES = (SHARD_SUFFIX, TAR_SUFFIX)
PACKED_SUFFIXES = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst")
"""Compressed tars have no places to read from, so that a unit would have to unpack all that is before it."""

IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".jp2", ".avif"}
)
"""Files of a folder that are rows. A listed format that the decoder refuses is quarantined, not skipped."""

STAMPS = (
    *("ETag", "etag", "blob_id", "xet_hash"),
    *("mtime", "LastModified", "last_modified", "updated", "created"),
)
"""What file systems call the mark of a version, most telling first."""

DIGESTS = ("md5Hash", "xet_hash", "blob_id")
"""What stores call a digest of the content that follows from nothing else."""


class CorpusError(AcsrError, ValueError):
    """A corpus that cannot be read as asked; the message names the path and what is wrong."""


CHAIN = "::"
"""What joins the addresses of a chain for fsspec. A file with it in its name would be taken for one, and
another file would be read."""


@dataclass(frozen=True)
class Shard:
    """One Parquet file or tar of a corpus."""

    uri: str
    """Absolute, opened by fsspec on any node."""
    relative: str
    """Path below the corpus root without suffix, made safe by `safe_name`; names the output."""
    version: str
    """Size and modification time (or etag): the fast key that tells whether the content may have changed."""
    digest: str = ""
    """What an object store says of the content; spares reading it to tell whether it changed."""

    @property
    def is_tar(self) -> bool:
        """Whether it is a WebDataset tar."""
        return self.uri.endswith(TAR_SUFFIX)


@dataclass(frozen=True)
class ImageFile:
    """One file of an image folder."""

    uri: str
    path: str
    """Relative to the folder, with forward slashes."""
    version: str
    num_bytes: int


@dataclass(frozen=True)
class ImageFolder:
    """A folder of images, sorted by path; `class_names` is empty when there are no sub-folders."""

    name: str
    files: tuple[ImageFile, ...]
    class_names: tuple[str, ...]
    num_skipped: int
    """Files without an image suffix, which are not rows."""

    def label(self, file: ImageFile) -> int | None:
        """Return the index of the file's class sub-folder, None for a file beside the sub-folders."""
        parts = PurePosixPath(file.path).parts
        return self.class_names.index(parts[0]) if len(parts) > 1 else None


def absolute_uri(location: str) -> str:
    """Return a URI that means the same on every node: local paths become absolute."""
    return location if "://" in location else str(Path(location).expanduser().resolve())


def find_source(location: str) -> list[Shard] | ImageFolder:
    """List a corpus.

    Args:
        location: path or URI of a Parquet file or a tar, a folder of either, or a folder of images.

    Raises:
        CorpusError: nothing there, nothing that is known, or several kinds in one folder.
    """
    root_uri = absolute_uri(location)
    fs, root = open_filesystem(root_uri)
    if not fs.exists(root):
        raise CorpusError(f"input {root_uri} does not exist")
    if fs.isfile(root):
        if not root.endswith(SHARD_SUFFIXES):
            raise CorpusError(
                f"input {root_uri} is neither a .parquet or .tar file nor a folder{_hint([root])}"
            )
        return [_shard(fs, safe_name(_stem(root.rsplit("/", 1)[-1])), fs.info(root))]
    # Keys are kept as they are: as paths, `a//b` and `a/b` would be one.
    base = f"{root.rstrip('/')}/"
    visible = {path.removeprefix(base): info for path, info in fs.find(root, detail=True).items()}
    files = {key: info for key, info in sorted(visible.items()) if not _is_marked(key, ".")}
    keys = [key for key in files if key.endswith(SHARD_SUFFIXES) and not _is_marked(key, "_")]
    _check_one_kind(keys, files, root_uri)
    if keys:
        shards = [_shard(fs, safe_name(_stem(key)), files[key]) for key in keys]
        # In the order of the output's names, whatever characters the shards' own names have.
        return sorted(shards, key=lambda shard: f"{shard.relative}.rows-")
    return _image_folder(fs, safe_name(PurePosixPath(root).name), root_uri, files)


def _stem(key: str) -> str:
    return key.removesuffix(TAR_SUFFIX if key.endswith(TAR_SUFFIX) else SHARD_SUFFIX)


def _check_one_kind(shards: Sequence[str], files: Iterable[str], uri: str) -> None:
    """Refuse tars beside other things that could be meant: what is left out would be missed by nobody."""
    tars = [key for key in shards if key.endswith(TAR_SUFFIX)]
    packed = [key for key in files if key.endswith(PACKED_SUFFIXES) and not _is_marked(key, "_")]
    others = {
        "Parquet shards": len(shards) - len(tars),
        "images": sum(_is_image(key) for key in files),
        "compressed tars": len(packed),
    }
    found = [f"{count} {kind}" for kind, count in others.items() if count]
    if tars and found:
        raise CorpusError(
            f"input {uri} holds {len(tars)} tars and {' and '.join(found)}: give each kind its own folder"
            f"{_hint(packed)}"
        )


def _hint(keys: Sequence[str]) -> str:
    packed = any(key.endswith(PACKED_SUFFIXES) for key in keys)
    return "; compressed tars cannot be read from a position: unpack them to .tar" if packed else ""


def _is_image(key: str) -> bool:
    return PurePosixPath(key).suffix.lower() in IMAGE_SUFFIXES


def _followed(fs: fsspec.AbstractFileSystem, info: dict[str, Any]) -> dict[str, Any]:
    """Return what a listed file really is: a listing tells the time of a link, not of the file behind it."""
    return dict(fs.info(info["name"])) if info.get("islink") else info


def _shard(fs: fsspec.AbstractFileSystem, relative: str, info: dict[str, Any]) -> Shard:
    info = _followed(fs, info)
    tag = str(info.get("ETag") or info.get("etag") or "")
    # A weak tag promises the same meaning, not the same bytes.
    digest = f"etag {tag}" if tag and not tag.startswith("W/") else ""
    # Google's tags change with permissions too; the Hub has none, but names files after their content.
    digest = next((f"{name} {info[name]}" for name in DIGESTS if info.get(name)), digest)
    return Shard(fs.unstrip_protocol(info["name"]), relative, _version(info), digest)


def version_of(uri: str) -> str:
    """Return the version of a file as it is now, as `Shard.version` has it.

    Raises:
        FileNotFoundError: it is no longer there.
    """
    fs, path = open_filesystem(uri)
    return _version(fs.info(path))


def _is_marked(key: str, mark: str) -> bool:
    """Return whether a file is not part of the corpus, by the first character of a part of its path."""
    # On object stores, `.` and `..` are names like others.
    return any(part.startswith(mark) and part not in (".", "..") for part in key.split("/"))


def _image_folder(
    fs: fsspec.AbstractFileSystem, name: str, uri: str, files: dict[str, dict[str, Any]]
) -> ImageFolder:
    images = tuple(
        ImageFile(fs.unstrip_protocol(info["name"]), key, _version(_followed(fs, info)), info["size"])
        for key, info in files.items()
        if _is_image(key)
    )
    if not images:
        raise CorpusError(f"input {uri} holds neither Parquet shards nor tars nor images{_hint([*files])}")
    parents = (PurePosixPath(image.path).parts for image in images)
    class_names = tuple(sorted({parts[0] for parts in parents if len(parts) > 1}))
    return ImageFolder(name, images, class_names, len(files) - len(images))


def _version(info: dict[str, Any]) -> str:
    """Return size and stamp, "" where the store gives no stamp, so that nothing is taken as unchanged."""
    stamps = (info.get(key) for key in STAMPS)
    stamp = next((value for value in stamps if value), None)
    if isinstance(stamp, datetime):
        # Some stores tell it as a time in one call and as a number in another.
        stamp = stamp.timestamp()
    return "" if stamp is None else f"{info['size']}-{stamp}"
