"""A Parquet footer, read in bounds and without pyarrow, to be judged before pyarrow builds anything from it.

A footer is a struct in Thrift's compact protocol. A few bytes of it can ask for gigabytes or for a deep
recursion, and its key-value metadata can name Python types that pyarrow would make at once. The walk counts
what is there, keeps the metadata and builds nothing else. Where Parquet's own reader would follow one of two
readings of the same bytes, the walk refuses: what is checked here is what is read there.

Formats: `parquet.thrift` of apache/parquet-format and "Thrift compact protocol" of apache/thrift.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

BOOLEANS, BYTE, INTEGERS, DOUBLE, BINARY, LISTS, MAP, STRUCT = (1, 2), 3, (4, 5, 6), 7, 8, (9, 10), 11, 12
LIST = 9
LONGEST_VARINT = 10
DEEPEST = 32
"""Structs, lists and maps inside each other; Parquet's own definition needs eight, Thrift stops at 64."""
ITEMS_PER_CHUNK = 32
"""List items that a column chunk may have on average: its path, encodings, histograms."""


class FooterError(ValueError):
    """Bytes that are no footer, or one that a reader could take in two ways."""


class FooterTooLargeError(FooterError):
    """A footer with more in it than asked for."""


@dataclass
class RowGroup:
    """What a footer says of a row group; sizes are in bytes, not compressed."""

    num_rows: int = 0
    num_bytes: int = 0
    column_bytes: list[tuple[bytes, int]] = field(default_factory=list)
    """Name of the outermost field, and size, of each column chunk."""


@dataclass
class Footer:
    """What a footer holds."""

    depth: int = 0
    """Levels of the schema below the root; a list or a map is two."""
    num_leaves: int = 0
    """Fields of the schema that hold values."""
    num_rows: int = 0
    row_groups: list["RowGroup"] = field(default_factory=list)
    metadata: list[tuple[bytes, bytes]] = field(default_factory=list)
    """Keys and values of the file, in the order of the bytes, repeated keys included."""


def read_footer(data: bytes, *, max_fields: int, max_row_groups: int, max_chunks: int) -> Footer:
    """Walk through a footer.

    Args:
        data: the footer's bytes, without the length and the magic bytes that end the file.
        max_fields: most fields of the schema, groups counted.
        max_row_groups: most row groups.
        max_chunks: most column chunks of all row groups, of about 20 microseconds each.

    Raises:
        FooterTooLargeError: more than that.
        FooterError: no footer.
    """
    reader = _Reader(data, max_fields + max_row_groups + ITEMS_PER_CHUNK * max_chunks)
    try:
        return _file(reader, max_fields, max_row_groups, max_chunks)
    except IndexError:
        raise FooterError("its footer ends early") from None


def _file(reader: "_Reader", max_fields: int, max_row_groups: int, max_chunks: int) -> Footer:
    footer = Footer()
    for number, kind in reader.fields():
        if number == 2:
            size = reader.structs(kind)
            _limit("fields in its schema", size, max_fields)
            children = [_children(reader) for _ in range(size)]
            footer.depth, footer.num_leaves = _depth(children), children[1:].count(0)
        elif number == 3:
            footer.num_rows = reader.integer(kind)
        elif number == 4:
            size, left = reader.structs(kind), max_chunks
            _limit("row groups", size, max_row_groups)
            for _ in range(size):
                footer.row_groups.append(_row_group(reader, left))
                left -= len(footer.row_groups[-1].column_bytes)
        elif number == 5:
            for _ in range(reader.structs(kind)):
                footer.metadata.append(_key_value(reader))
        else:
            reader.skip(kind)
    return footer


def _limit(what: str, count: int, most: int) -> None:
    if count > most:
        raise FooterTooLargeError(f"it has {count} {what}, more than {most}")


def _children(reader: "_Reader") -> int:
    """Read a field of the schema and return how many of the following fields are its own."""
    children = 0
    for number, kind in reader.fields():
        if number == 4:
            reader.text(kind)
        elif number == 5:
            children = reader.integer(kind)
        else:
            reader.skip(kind)
    return children


def _depth(children: list[int]) -> int:
    """Return the levels of a tree whose nodes are listed depth first, each with its number of children."""
    depth, groups = 0, [1]
    for count in children:
        while groups and not groups[-1]:
            groups.pop()
        if not groups or not 0 <= count < len(children):
            raise FooterError("the fields of its schema are no tree")
        depth = max(depth, len(groups) - 1)
        groups[-1] -= 1
        groups.append(count)
    if any(groups):
        raise FooterError("the fields of its schema are no tree")
    return depth


def _row_group(reader: "_Reader", max_chunks: int) -> RowGroup:
    group = RowGroup()
    for number, kind in reader.fields():
        if number == 1:
            size = reader.structs(kind)
            if size > max_chunks:
                raise FooterTooLargeError("it has too many column chunks")
            group.column_bytes = [_chunk(reader) for _ in range(size)]
        elif number == 2:
            group.num_bytes = reader.integer(kind)
        elif number == 3:
            group.num_rows = reader.integer(kind)
        else:
            reader.skip(kind)
    return group


def _chunk(reader: "_Reader") -> tuple[bytes, int]:
    """Read a column chunk and return the name of its outermost field, and its size without compression."""
    found = None
    for number, kind in reader.fields():
        if number == 3 and kind == STRUCT:
            found = _chunk_metadata(reader)
        else:
            reader.skip(kind)
    if found is None:
        raise FooterError("a column chunk of its footer has no metadata")
    return found


def _chunk_metadata(reader: "_Reader") -> tuple[bytes, int]:
    name, size = b"", 0
    for number, kind in reader.fields():
        if number == 3:
            name = reader.first_text(kind)
        elif number == 6:
            size = reader.integer(kind)
        else:
            reader.skip(kind)
    return name, size


def _key_value(reader: "_Reader") -> tuple[bytes, bytes]:
    found: dict[int, bytes] = {}
    for number, kind in reader.fields():
        if number in (1, 2):
            found[number] = reader.binary(kind)
        else:
            reader.skip(kind)
    return found.get(1, b""), found.get(2, b"")


class _Reader:
    """Thrift's compact protocol; `IndexError` where the bytes end."""

    def __init__(self, data: bytes, max_items: int) -> None:
        self.data = data
        self.position = 0
        self.items_left = max_items

    def byte(self) -> int:
        value = self.data[self.position]
        self.position += 1
        return value

    def varint(self) -> int:
        value = shift = 0
        for _ in range(LONGEST_VARINT):
            byte = self.byte()
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7
        raise FooterError("a number of its footer is too long")

    def advance(self, count: int) -> int:
        """Step over `count` bytes and return where they begin."""
        start = self.position
        if count > len(self.data) - start:
            raise FooterError("its footer ends early")
        self.position = start + count
        return start

    def fields(self) -> Iterator[tuple[int, int]]:
        """Yield number and type of each field of a struct; the caller reads or skips each value."""
        number, seen = 0, set[int]()
        while head := self.byte():
            kind, step = head & 0x0F, head >> 4
            zigzag = 0 if step else self.varint()
            number = number + step if step else (zigzag >> 1) ^ -(zigzag & 1)
            # Numbers are 16 bits there and would wrap; and of two fields of one number, the last would win.
            if not kind or not 0 < number < 2**15 or number in seen:
                raise FooterError("a field of its footer has no valid number")
            seen.add(number)
            yield number, kind

    def structs(self, kind: int) -> int:
        """Read the head of a list of structs and return its length."""
        if kind != LIST:
            raise FooterError("a list of its footer is none")
        size, inner = self.list_head()
        # Parquet's reader takes the items as structs, whatever the head says.
        if inner != STRUCT and size:
            raise FooterError("a list of its footer holds something else than it should")
        return size

    def list_head(self) -> tuple[int, int]:
        head = self.byte()
        size = head >> 4
        if size == 15:
            size = self.varint()
        self._check_count(size)
        return size, head & 0x0F

    def integer(self, kind: int) -> int:
        if kind not in INTEGERS:
            raise FooterError("a number of its footer is none")
        value = self.varint()
        return (value >> 1) ^ -(value & 1)

    def binary(self, kind: int) -> bytes:
        if kind != BINARY:
            raise FooterError("a text of its footer is none")
        start = self.advance(self.varint())
        return self.data[start : self.position]

    def text(self, kind: int) -> str:
        try:
            return self.binary(kind).decode()
        except UnicodeDecodeError:
            raise FooterError("a name in its schema is not UTF-8") from None

    def first_text(self, kind: int) -> bytes:
        """Read a list of texts and return its first."""
        if kind != LIST:
            raise FooterError("a list of its footer is none")
        size, inner = self.list_head()
        texts = [self.binary(inner) for _ in range(size)]
        return texts[0] if texts else b""

    def skip(self, kind: int, level: int = 0) -> None:
        """Step over a value."""
        if level > DEEPEST:
            raise FooterError("its footer is nested too deeply")
        if kind in INTEGERS:
            self.varint()
        elif kind == BINARY:
            self.advance(self.varint())
        elif kind == STRUCT:
            for _, inner in self.fields():
                self.skip(inner, level + 1)
        elif kind in LISTS:
            size, inner = self.list_head()
            self._skip_items((inner,), size, level)
        elif kind == MAP:
            size = self.varint()
            self._check_count(size)
            kinds = self.byte() if size else 0
            self._skip_items((kinds >> 4, kinds & 0x0F), size, level)
        elif kind == BYTE:
            self.advance(1)
        elif kind == DOUBLE:
            self.advance(8)
        elif kind not in BOOLEANS:
            raise FooterError("a value of its footer has no known type")

    def _skip_items(self, kinds: tuple[int, ...], size: int, level: int) -> None:
        for _ in range(size):
            for kind in kinds:
                # Inside a struct a boolean is its type; among items it is a byte.
                self.skip(BYTE if kind in BOOLEANS else kind, level + 1)

    def _check_count(self, size: int) -> None:
        # An item takes a byte at least, so a longer list is a lie, and 32 bits would wrap.
        if size > len(self.data) - self.position:
            raise FooterError("its footer ends early")
        self.items_left -= size
        # Parquet's reader makes up to a hundred bytes of an item of one byte.
        if self.items_left < 0:
            raise FooterTooLargeError("the lists of its footer have too many items")
