"""The members of a tar file that may be hostile, read from its headers in bounds.

Nothing is extracted and no body is read here. Only plain files count; whatever one reader of tars takes in
another way than the next (links, sparse files, extended headers that change sizes, data behind the end) is
refused with a code, so that no member can hide from us and show itself to somebody else.
"""

import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from pydantic import Field

from acsr_ray.config import Settings
from acsr_ray.corpus.container_errors import ContainerCode, ContainerError

BLOCK = 512
ZEROS = bytes(BLOCK)
MOST_TAIL = 2**20
"""Most bytes of zeros at the end; tar fills its last record up, which has 10 KiB by default."""

FILES, FOLDER, LONG_NAME, EXTENDED, GLOBAL = (b"0", b"\0"), b"5", b"L", b"x", b"g"
USTAR, GNU, OLD = b"ustar\x0000", b"ustar  \0", bytes(8)
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"(\xb5/\xfd": "zstd"}

OCTAL = re.compile(rb" *([0-7]+)[ \0]*\Z")
RECORD = re.compile(rb"([1-9]\d{0,7}) ([^=\n]+)=")
DECIDING = (b"size", b"linkpath", b"hdrcharset", b"GNU.sparse.", b"SCHILY.realsize", b"SCHILY.filetype")
"""Beginnings of keys of extended headers that change what a member is; times, owners and the like do not."""


class TarLimits(Settings):
    """What a tar may have; one beyond a limit is refused before its images are read."""

    max_members: int = Field(2_000_000, gt=0)
    """Most members, folders and those that are left out counted."""
    max_sample_members: int = Field(1000, gt=0)
    """Most members of one sample."""
    max_member_megabytes: float = Field(512.0, gt=0)
    """Largest member that is read, in MiB; what is left out may be larger."""
    max_text_megabytes: float = Field(16.0, gt=0)
    """Largest `json`, `txt` or `cls` member, in MiB."""
    max_name_bytes: int = Field(1024, gt=0)
    """Longest name in UTF-8."""
    max_extended_bytes: int = Field(2**16, gt=0)
    """Longest extended header."""


TAR_LIMITS = TarLimits()


class Stored(Protocol):
    """The part of an open fsspec file that is used here."""

    def seek(self, position: int, whence: int = 0) -> int:
        """Move to a byte."""

    def read(self, size: int) -> bytes:
        """Read at most so many bytes."""


@dataclass(frozen=True, slots=True)
class Member:
    """A plain file in a tar, or a folder."""

    name: str
    start: int
    """First byte of its headers."""
    body: int
    """First byte of its content."""
    size: int
    is_folder: bool = False

    @property
    def end(self) -> int:
        """First byte behind it."""
        return self.body + _padded(self.size)


def read_body(stored: Stored, member: Member) -> bytes:
    """Return a member's content.

    Raises:
        OSError: the store delivers less than it says that it has.
    """
    return _read_at(stored, member.body, member.size)


def tar_members(
    stored: Stored, uri: str, limits: TarLimits = TAR_LIMITS, start: int = 0, end: int | None = None
) -> Iterator[Member]:
    """Yield the plain files of a tar in their order, and check that it ends as it should.

    Args:
        stored: the open file. Only headers are read; a store that reads ahead may fetch small bodies too.
        uri: its name, for messages.
        limits: what it may have.
        start: where a member begins.
        end: stop at this member instead of the end of the tar.

    Raises:
        ContainerError: the tar is refused.
        OSError: the store does not deliver it.
    """
    headers = _Headers(stored, uri, limits, start)
    while end is None or headers.position < end:
        member = headers.next_member()
        if member is None:
            return
        if not member.is_folder:
            yield member


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _read_at(stored: Stored, position: int, count: int) -> bytes:
    stored.seek(position)
    data = stored.read(count)
    if len(data) != count:
        raise OSError(f"{len(data)} bytes came instead of {count}: the file is being changed")
    return data


class _Headers:
    """Reads one header after the other."""

    def __init__(self, stored: Stored, uri: str, limits: TarLimits, start: int) -> None:
        self._stored, self._uri, self._limits = stored, uri, limits
        self._size = stored.seek(0, io.SEEK_END)
        self._first = self.position = start
        self._members = 0

    def next_member(self) -> Member | None:
        """Return the next member, None at the end."""
        start, name, extended = self.position, "", False
        while True:
            block = self._block()
            if block == ZEROS:
                if extended:
                    raise self._refused("unreadable", "an extended header stands before the end")
                self._check_end(self.position - BLOCK)
                return None
            kind, size = block[156:157], self._checked_size(block)
            if kind in (EXTENDED, LONG_NAME):
                if extended:
                    raise self._refused("unsafe_member", "it has two extended headers")
                extended, body = True, self._extended(size)
                name = self._long_name(body) if kind == LONG_NAME else self._pax_name(body)
            elif kind == GLOBAL:
                if extended or self._pax_name(self._extended(size)):
                    raise self._refused("unsafe_member", "a global header names it")
            else:
                return self._member(block, start, name, size)

    def _member(self, block: bytes, start: int, name: str, size: int) -> Member:
        self._members += 1
        if self._members > self._limits.max_members:
            raise self._refused("too_large", f"it has more than {self._limits.max_members} members")
        kind, name = block[156:157], name or self._own_name(block)
        if kind not in (*FILES, FOLDER) or (kind == FOLDER and size):
            raise self._refused("unsafe_member", f"it is no plain file but of type {kind!r}")
        if name.endswith("/") and kind != FOLDER:
            raise self._refused("unsafe_name", "a file's name ends with a slash")
        member = Member(name, start, self.position, size, kind == FOLDER)
        if member.end > self._size:
            raise self._refused("truncated", f"it has {size} bytes, but the file ends before")
        self.position = member.end
        return member

    def _block(self) -> bytes:
        if self.position + BLOCK > self._size:
            if self.position == 0 and self._size:
                raise self._refused("not_tar", f"the file has only {self._size} bytes")
            raise self._refused("truncated", f"the file ends after {self._size} bytes, without an end mark")
        block = _read_at(self._stored, self.position, BLOCK)
        self.position += BLOCK
        return block

    def _checked_size(self, block: bytes) -> int:
        """Return a header's size after its mark and checksum were found right."""
        told, found = OCTAL.match(block[148:156]), sum(block) - sum(block[148:156]) + 8 * ord(" ")
        if told is None or int(told[1], 8) != found or block[257:265] not in (USTAR, GNU, OLD):
            if self.position == BLOCK:
                packed = next((name for mark, name in COMPRESSED.items() if block.startswith(mark)), None)
                raise self._refused("not_tar", f"it is compressed ({packed})" if packed else "another format")
            raise self._refused("unreadable", "its header is damaged")
        size = OCTAL.match(block[124:136])
        if size is None:
            raise self._refused("unsafe_member", "its size is no octal number")
        return int(size[1], 8)

    def _extended(self, size: int) -> bytes:
        if size > self._limits.max_extended_bytes:
            raise self._refused("too_large", f"it has an extended header of {size} bytes")
        if self.position + _padded(size) > self._size:
            raise self._refused("truncated", "the file ends in an extended header")
        body = _read_at(self._stored, self.position, size)
        self.position += _padded(size)
        return body

    def _pax_name(self, body: bytes) -> str:
        """Return the name that an extended header gives, "" for none."""
        position, name = 0, ""
        while position < len(body):
            match = RECORD.match(body, position)
            end = position + int(match[1]) if match else 0
            if match is None or end > len(body) or end <= match.end() or body[end - 1 : end] != b"\n":
                raise self._refused("unreadable", "its extended header is damaged")
            if match[2].startswith(DECIDING):
                key = match[2].decode("ascii", "replace")
                raise self._refused("unsafe_member", f"its extended header has {key!r}")
            if match[2] == b"path":
                if name:
                    raise self._refused("unsafe_member", "its extended header names it twice")
                name = self._checked_name(body[match.end() : end - 1])
            position = end
        return name

    def _long_name(self, body: bytes) -> str:
        return self._checked_name(body.rstrip(b"\0"))

    def _own_name(self, block: bytes) -> str:
        name, prefix = _field(block[:100]), _field(block[345:500])
        if block[257:265] != USTAR and any(block[345:500]):
            raise self._refused("unsafe_member", "its header has bytes that readers take in different ways")
        if name is None or prefix is None:
            raise self._refused("unsafe_name", "its name goes on behind its end")
        return self._checked_name(prefix + b"/" + name if prefix else name)

    def _checked_name(self, data: bytes) -> str:
        if len(data) > self._limits.max_name_bytes:
            raise self._refused("unsafe_name", f"its name has {len(data)} bytes")
        try:
            name = data.decode()
        except UnicodeDecodeError:
            raise self._refused("unsafe_name", "its name is no UTF-8") from None
        if not name or "\0" in name or name.startswith("/") or ".." in name.split("/"):
            raise self._refused("unsafe_name", f"{name[:80]!a} is no name within a folder")
        return name

    def _check_end(self, start: int) -> None:
        """Refuse a tar that has no end mark of two blocks, or anything behind it."""
        rest = self._size - start
        if rest < 2 * BLOCK:
            raise self._refused("truncated", "half of its end mark is missing")
        if rest > MOST_TAIL or any(_read_at(self._stored, start, rest)):
            raise self._refused("trailing_data", "it goes on behind its end mark")

    def _refused(self, code: ContainerCode, detail: str) -> ContainerError:
        place = f"member {self._members + 1} before byte {self.position}"
        return ContainerError(code, f"{self._uri} is not a tar that can be read: {detail} ({place})")


def _field(data: bytes) -> bytes | None:
    """Return the text of a header's field up to its NULs, None where more follows them."""
    text = data.rstrip(b"\0")
    return None if b"\0" in text else text
