"""Opening Parquet files that may be damaged or hostile.

Before pyarrow sees a file, its footer is read in bounds: sizes, schema and the metadata from which pyarrow
would make Python types. pyarrow then reads the very bytes that were checked, even if the file changes
meanwhile. What is refused is refused with a code; what the store fails to deliver is the store's own error
and says nothing about the file.
"""

import base64
import binascii
import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, Protocol

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from acsr_ray.columns import PREFIX
from acsr_ray.config import Settings
from acsr_ray.corpus.footer import Footer, FooterError, FooterTooLargeError, read_footer
from acsr_ray.corpus.sources import CHAIN, CorpusError
from acsr_ray.storage import open_filesystem

ContainerCode = Literal[
    "truncated",
    "not_parquet",
    "encrypted",
    "footer_too_large",
    "too_large",
    "unsupported_schema",
    "extension_type",
    "unreadable",
    "no_image_column",
    "wrong_type",
    "purified_before",
]
"""Why a shard is refused: it ends early; is another format; is encrypted; has a footer longer than the limit;
more rows, row groups or bytes than the limits; columns of kinds that no corpus here needs, too many or too
deeply nested; columns of Arrow extension types; is damaged; has no image column; one that holds no bytes;
was purified before."""

MAGIC, ENCRYPTED = b"PAR1", b"PARE"
TAIL_BYTES = 2**16
"""Read first; most footers fit."""
END_BYTES = 8
"""Length of the footer and magic bytes, which end the file."""
ARROW_SCHEMA = b"ARROW:schema"
EXTENSION_KEY = b"ARROW:extension"


class ContainerError(CorpusError):
    """A Parquet file that is refused; the message names it.

    Args:
        code: why, one of `ContainerCode`.
        message: for people.
    """

    def __init__(self, code: ContainerCode, message: str) -> None:
        # Both are arguments, so that it can travel between processes.
        super().__init__(code, message)
        self.code = code

    def __str__(self) -> str:
        return str(self.args[1])


class ContainerLimits(Settings):
    """What a Parquet file may have; a file beyond one of these is refused before its rows are read."""

    max_footer_megabytes: float = Field(64.0, gt=0, le=2048)
    """Longest footer, in MiB."""
    max_columns: int = Field(10_000, gt=0)
    """Most fields of the schema, those inside of others counted."""
    max_depth: int = Field(24, gt=0, le=100)
    """Most levels of the schema; a list or a map inside another field is two."""
    max_row_groups: int = Field(50_000, gt=0)
    """Most row groups."""
    max_chunks: int = Field(200_000, gt=0)
    """Most column chunks, which are row groups times columns."""
    max_rows: int = Field(100_000_000, gt=0)
    """Most rows of a file."""
    max_row_group_megabytes: float = Field(8192.0, gt=0)
    """Largest row group, in MiB, without compression as its footer says; a row group is read as a whole."""


LIMITS = ContainerLimits()


class CheckedParquet(pq.ParquetFile):  # type: ignore[misc]
    """A Parquet file whose footer was checked.

    Do not ask its `metadata` for a column of a row group: where the column's statistics are damaged, pyarrow
    ends the process (seen with 26.0). `column_bytes` is there instead.

    Args:
        footer: of the file.
        source: as `pq.ParquetFile` takes it, like the options.
    """

    def __init__(self, footer: Footer, source: object, **options: object) -> None:
        super().__init__(source, **options)
        self._footer = footer

    def column_bytes(self, name: str) -> int:
        """Return the size in bytes, not compressed, that the footer says a column has, its parts included."""
        return sum(self.group_bytes(group, name) for group in range(len(self._footer.row_groups)))

    def group_bytes(self, group: int, name: str) -> int:
        """Return the same of one row group."""
        chunks = self._footer.row_groups[group].column_bytes
        return sum(size for outermost, size in chunks if outermost == name.encode())


@contextmanager
def open_parquet(uri: str, limits: ContainerLimits = LIMITS) -> Iterator["CheckedParquet"]:
    """Open a Parquet file that may be hostile; rows that turn out damaged while it is open are refused too.

    Args:
        uri: of any store that fsspec opens. At first only the file's end is read, and the four bytes at its
            start.
        limits: what it may have.

    Raises:
        ContainerError: the file is refused.
        OSError: the store does not deliver it (`FileNotFoundError`, no permission, no connection).
    """
    if CHAIN in uri:
        raise _unreadable(uri, f"its name has {CHAIN!r}")
    fs, path = open_filesystem(uri)
    with fs.open(path, "rb") as stored:
        tail = _read_tail(stored)
        # A range of its own: reading the start through the file would fetch megabytes ahead.
        head = fs.cat_file(path, start=0, end=len(MAGIC)) if tail.start else tail.data[: len(MAGIC)]
        _check_magic(head, tail, uri)
        tail = _with_footer(tail, stored, uri, limits)
        footer = _checked_footer(_footer_bytes(tail), uri, limits)
        checked = _CheckedFile(stored, tail)
        try:
            file = CheckedParquet(
                footer,
                checked,
                thrift_string_size_limit=int(limits.max_footer_megabytes * 2**20),
                thrift_container_size_limit=max(limits.max_columns, limits.max_chunks, len(footer.metadata)),
                page_checksum_verification=True,
                arrow_extensions_enabled=False,
            )
            _check_types(file.schema_arrow, uri)
            yield file
        except pa.ArrowMemoryError:
            raise
        except (pa.ArrowException, OSError) as error:
            if checked.failure is not None:
                raise checked.failure from None
            if isinstance(error, pa.ArrowException) or (type(error) is OSError and error.errno is None):
                raise _unreadable(uri, str(error)) from error
            raise


def check_schema(schema: pa.Schema, image_column: str, uri: str, purified: bool = False) -> None:
    """Raise `ContainerError` unless a shard can be purified, or was and can be read where `purified`."""
    taken = [name for name in schema.names if name.startswith(PREFIX)]
    if taken and not purified:
        raise ContainerError(
            "purified_before", f"{uri} already has {', '.join(taken)}: it was purified before"
        )
    if image_column not in schema.names:
        raise ContainerError(
            "no_image_column",
            f"{uri} has no column {image_column!r} (--image-column names it); "
            f"it has {', '.join(schema.names)}",
        )
    if schema.names.count(image_column) > 1:
        raise ContainerError("unsupported_schema", f"{uri} has several columns {image_column!r}")
    kind = schema.field(image_column).type
    if pa.types.is_struct(kind):
        position = kind.get_field_index("bytes")
        kind = kind.field(position).type if position >= 0 else kind
    if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
        raise ContainerError(
            "wrong_type",
            f"{uri}: column {image_column!r} must be binary or a struct with binary `bytes`, got {kind}",
        )


def _unreadable(uri: str, detail: str, code: ContainerCode = "unreadable") -> ContainerError:
    return ContainerError(code, f"{uri} is not a readable Parquet file: {detail}")


class _Stored(Protocol):
    """The part of an open fsspec file that is used here."""

    @property
    def closed(self) -> bool: ...
    def seek(self, position: int, whence: int = 0) -> int: ...
    def read(self, size: int) -> bytes: ...


class _Tail:
    """The end of a file, from byte `start` to its size."""

    def __init__(self, data: bytes, size: int) -> None:
        self.data, self.size, self.start = data, size, size - len(data)


def _read_tail(stored: _Stored) -> _Tail:
    size = stored.seek(0, io.SEEK_END)
    return _Tail(_read_at(stored, max(0, size - TAIL_BYTES), size), size)


def _with_footer(tail: _Tail, stored: _Stored, uri: str, limits: ContainerLimits) -> _Tail:
    """Return the end of a file with the whole footer in it, where it is within the limit."""
    length = _footer_length(tail)
    if length + END_BYTES + len(MAGIC) > tail.size:
        raise _unreadable(uri, f"its footer would have {length} bytes, but the file has {tail.size}")
    if length > limits.max_footer_megabytes * 2**20:
        raise ContainerError(
            "footer_too_large",
            f"{uri} has a footer of {length / 2**20:.1f} MiB, more than {limits.max_footer_megabytes:g}",
        )
    start = min(tail.start, tail.size - END_BYTES - length)
    return _Tail(_read_at(stored, start, tail.start) + tail.data, tail.size)


def _read_at(stored: _Stored, start: int, end: int) -> bytes:
    if start == end:
        return b""
    stored.seek(start)
    data = stored.read(end - start)
    if len(data) != end - start:
        raise OSError(f"{len(data)} bytes came instead of {end - start}: the file is being changed")
    return data


def _check_magic(head: bytes, tail: _Tail, uri: str) -> None:
    end = tail.data[-len(MAGIC) :]
    if ENCRYPTED in (head, end):
        raise _unreadable(uri, "it is encrypted", "encrypted")
    if head != MAGIC and not (tail.size < len(MAGIC) and MAGIC.startswith(head)):
        raise _unreadable(uri, "it does not begin as one", "not_parquet")
    if end != MAGIC or tail.size < END_BYTES + len(MAGIC):
        raise _unreadable(uri, f"it ends early, after {tail.size} bytes", "truncated")


def _footer_length(tail: _Tail) -> int:
    return int.from_bytes(tail.data[-END_BYTES : -len(MAGIC)], "little")


def _footer_bytes(tail: _Tail) -> bytes:
    return tail.data[-END_BYTES - _footer_length(tail) : -END_BYTES]


def _checked_footer(data: bytes, uri: str, limits: ContainerLimits) -> Footer:
    try:
        footer = read_footer(
            data,
            max_fields=limits.max_columns,
            max_row_groups=limits.max_row_groups,
            max_chunks=limits.max_chunks,
        )
        _check_no_extension(footer, uri)
        _check_sizes(footer, uri, limits)
    except FooterTooLargeError as error:
        raise ContainerError("too_large", f"{uri}: {error}") from None
    except FooterError as error:
        raise _unreadable(uri, str(error)) from None
    if footer.depth > limits.max_depth:
        raise ContainerError(
            "unsupported_schema",
            f"{uri} has columns nested {footer.depth} levels deep, more than {limits.max_depth}",
        )
    return footer


def _check_no_extension(footer: Footer, uri: str) -> None:
    """Refuse a schema that names extension types, from whose bytes pyarrow would make registered types."""
    for key, value in footer.metadata:
        if key != ARROW_SCHEMA:
            continue
        try:
            message = base64.b64decode(value, validate=True)
        except binascii.Error:
            raise FooterError("its Arrow schema is not base64") from None
        if EXTENSION_KEY in message:
            raise _extension_type(uri)


def _extension_type(uri: str) -> ContainerError:
    return ContainerError(
        "extension_type", f"{uri} has columns of Arrow extension types, which can run code when they are read"
    )


PLAIN_TYPES = (
    pa.types.is_null,
    pa.types.is_boolean,
    pa.types.is_integer,
    pa.types.is_floating,
    pa.types.is_decimal,
    pa.types.is_temporal,
    pa.types.is_string,
    pa.types.is_large_string,
    pa.types.is_string_view,
    pa.types.is_binary,
    pa.types.is_large_binary,
    pa.types.is_binary_view,
    pa.types.is_fixed_size_binary,
)
LIST_TYPES = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)


def _check_types(schema: pa.Schema, uri: str) -> None:
    for column in schema:
        for kind in _kinds(column.type):
            if isinstance(kind, pa.BaseExtensionType):
                raise _extension_type(uri)
            if not any(is_plain(kind) for is_plain in PLAIN_TYPES):
                raise ContainerError("unsupported_schema", f"{uri}: column {column.name!r} has type {kind}")


def _kinds(kind: pa.DataType) -> Iterator[pa.DataType]:
    """Yield the types that a column is made of."""
    if pa.types.is_struct(kind):
        for position in range(kind.num_fields):
            yield from _kinds(kind.field(position).type)
    elif pa.types.is_map(kind):
        yield from _kinds(kind.key_type)
        yield from _kinds(kind.item_type)
    elif pa.types.is_dictionary(kind) or any(is_list(kind) for is_list in LIST_TYPES):
        yield from _kinds(kind.value_type)
    else:
        yield kind


def _check_sizes(footer: Footer, uri: str, limits: ContainerLimits) -> None:
    if any(len(group.column_bytes) != footer.num_leaves for group in footer.row_groups):
        raise FooterError("its row groups do not have the columns of its schema")
    rows = [group.num_rows for group in footer.row_groups]
    if any(count < 0 for count in rows) or sum(rows) != footer.num_rows:
        raise FooterError(f"its row groups do not have the {footer.num_rows} rows of the file")
    if footer.num_rows > limits.max_rows:
        raise ContainerError("too_large", f"{uri} has {footer.num_rows} rows, more than {limits.max_rows}")
    for group in footer.row_groups:
        sizes = [size for _, size in group.column_bytes]
        if any(size < 0 for size in sizes):
            raise FooterError("a column chunk of its footer has a negative size")
        largest = max(group.num_bytes, sum(sizes))
        if largest > limits.max_row_group_megabytes * 2**20:
            raise ContainerError(
                "too_large",
                f"{uri} has a row group of {largest / 2**20:.0f} MiB, more than "
                f"{limits.max_row_group_megabytes:g}",
            )


class _CheckedFile:
    """A file whose end is the bytes that were checked, and which remembers what the store failed with."""

    def __init__(self, stored: _Stored, tail: _Tail) -> None:
        self._stored, self._tail = stored, tail
        self._position = 0
        self.failure: OSError | None = None

    @property
    def closed(self) -> bool:
        return self._stored.closed

    def tell(self) -> int:
        return self._position

    def seek(self, position: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._tail.size}[whence]
        self._position = base + position
        return self._position

    def read(self, size: int) -> bytes:
        first, last = self._position, min(self._position + size, self._tail.size)
        data = self._read_stored(first, min(last, self._tail.start))
        if last > self._tail.start:
            data += self._tail.data[max(0, first - self._tail.start) : last - self._tail.start]
        self._position += len(data)
        return data

    def _read_stored(self, first: int, last: int) -> bytes:
        if last <= first:
            return b""
        try:
            self._stored.seek(first)
            return self._stored.read(last - first)
        except OSError as error:
            self.failure = error
            raise
