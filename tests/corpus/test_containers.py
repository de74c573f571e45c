"""Hostile and damaged Parquet files: refused with a code, never read further, never run."""

import base64
import io
import os
import pickle
import tempfile
from contextlib import nullcontext
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from acsr_ray.corpus.containers import ContainerError, ContainerLimits, check_schema, open_parquet
from acsr_ray.corpus.sources import CorpusError

MAGIC = b"PAR1"


def code_of(path, limits=None):
    """Open a file and read all of it; return why it was refused, None where it was not."""
    try:
        with open_parquet(str(path), *([limits] if limits else [])) as file:
            file.read()
    except ContainerError as error:
        return error.code if str(path) in str(error) else "does not name the file"
    return None


def put(path, data):
    path.write_bytes(data)
    return path


def split(data):
    """Return what comes before a file's footer, and the footer."""
    length = int.from_bytes(data[-8:-4], "little")
    return data[: -8 - length], data[-8 - length : -8]


def joined(body, footer, length=None):
    return body + footer + (len(footer) if length is None else length).to_bytes(4, "little") + MAGIC


def varint(value):
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def list_of(count, items, kind=12):
    return bytes([0xF0 | kind]) + varint(count) + items


def footer_of(schema, row_groups=b"\x0c"):
    """A footer in Thrift's compact protocol: version 2, a schema, no rows, row groups."""
    return b"\x15\x04\x19" + schema + b"\x16\x00\x19" + row_groups + b"\x00"


LEAF = b"\x15\x02\x25\x00\x18\x01a\x00"
"""Field of the schema: int32, required, named `a`."""


def group(children):
    return b"\x48\x01a\x15" + varint(2 * children) + b"\x00"


@pytest.fixture
def shard(tmp_path, write_shard):
    return write_shard(tmp_path / "a.parquet", 3, side=4)


def test_normal_shards_open(shard):
    with open_parquet(str(shard)) as file:
        assert file.read().equals(pq.read_table(shard))
        assert file.schema_arrow.equals(pq.read_schema(shard), check_metadata=True)


def test_every_kind_of_column_that_a_corpus_needs(tmp_path):
    kinds = [
        pa.null(), pa.bool_(), pa.uint8(), pa.int64(), pa.float16(), pa.float64(), pa.decimal128(9, 2),
        pa.date32(), pa.time64("us"), pa.timestamp("us", "UTC"), pa.duration("s"), pa.string(),
        pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary(), pa.binary_view(), pa.binary(16),
        pa.list_(pa.int8()), pa.large_list(pa.string()), pa.list_(pa.float32(), 3),
        pa.struct([("a", pa.list_(pa.struct([("b", pa.binary())])))]), pa.map_(pa.string(), pa.int32()),
        pa.dictionary(pa.int32(), pa.string()),
    ]  # fmt: skip
    table = pa.table({str(n): pa.array([None] * 2, kind) for n, kind in enumerate(kinds)})
    pq.write_table(table, tmp_path / "a.parquet")
    with open_parquet(str(tmp_path / "a.parquet")) as file:
        assert file.schema_arrow.types == kinds
        assert file.read().equals(table)


@pytest.mark.parametrize("rows_per_group", [1, 100])
def test_a_long_footer_of_a_real_file(tmp_path, rows_per_group):
    table = pa.table({f"column {n}": range(600) for n in range(20)})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=rows_per_group)
    assert code_of(tmp_path / "a.parquet") is None


def test_a_file_cut_off_anywhere_is_truncated(shard):
    data = shard.read_bytes()
    for size in [*range(0, len(data), 13), len(data) - 1]:
        assert code_of(put(shard, data[:size])) == "truncated", size


@pytest.mark.parametrize(
    "data", [b"x", b"PK\x03\x04" + b"x" * 100, b"\0" * 20, b"x" * 100 + MAGIC, b"PAR2" * 9]
)
def test_other_formats(tmp_path, data):
    assert code_of(put(tmp_path / "a.parquet", data)) == "not_parquet"


def test_another_beginning_or_encryption(shard):
    data = shard.read_bytes()
    assert code_of(put(shard, b"PK\x03\x04" + data[4:])) == "not_parquet"
    assert code_of(put(shard, b"PARE" + data[4:-4] + b"PARE")) == "encrypted"
    assert code_of(put(shard, data[:-4] + b"PARE")) == "encrypted"


@pytest.mark.parametrize("length", [0, 1, -1, 1000, 2**31 - 1, 2**31, 2**32 - 1])
def test_lies_about_the_footer(shard, length):
    body, footer = split(shard.read_bytes())
    lie = len(footer) + length if length in (-1, 1000) else length
    assert code_of(put(shard, joined(body, footer, lie))) == "unreadable"


def bytes_read():
    return int(Path("/proc/self/io").read_text().split()[1])


def test_a_huge_footer_is_not_read(tmp_path):
    path = tmp_path / "a.parquet"
    with path.open("wb") as file:
        file.write(MAGIC)
        file.truncate(2**31)
        file.seek(0, io.SEEK_END)
        file.write((2**30).to_bytes(4, "little") + MAGIC)
    before = bytes_read()
    assert code_of(path) == "footer_too_large"
    assert bytes_read() - before < 2**20
    assert code_of(path, ContainerLimits(max_footer_megabytes=0.01)) == "footer_too_large"


def test_only_the_end_is_read(tmp_path, shard):
    body, footer = split(shard.read_bytes())
    path = tmp_path / "sparse.parquet"
    with path.open("wb") as file:
        file.write(body)
        file.truncate(2**31)
        file.seek(0, io.SEEK_END)
        file.write(joined(b"", footer))
    before = bytes_read()
    with open_parquet(str(path)) as file:
        assert file.metadata.num_rows == 3
        assert bytes_read() - before < 2**20
        assert file.read().num_rows == 3


@pytest.mark.parametrize(
    ("footer", "code"),
    [
        (footer_of(list_of(100_001, group(100_000) + LEAF * 100_000)), "too_large"),
        (footer_of(list_of(100_001, group(1) * 100_000 + LEAF)), "too_large"),
        (footer_of(list_of(41, group(1) * 40 + LEAF)), "unsupported_schema"),
        (footer_of(list_of(2, group(1) + LEAF), list_of(10**6, b"\0" * 10**6)), "too_large"),
        (
            footer_of(list_of(2, group(1) + LEAF), list_of(1, b"\x19" + list_of(10**6, b"\0" * 10**6))),
            "too_large",
        ),
        # A list of empty paths in a column chunk's metadata: 32 bytes of memory for one of the file.
        (
            footer_of(
                list_of(2, group(1) + LEAF),
                list_of(1, b"\x19" + list_of(1, b"\x3c\x39" + list_of(10**7, b"\0" * 10**7, 8) + b"\0\0")),
            ),
            "too_large",
        ),
        (footer_of(list_of(2**31, b"")), "unreadable"),
        (footer_of(list_of(2**32 + 2, group(1) + LEAF)), "unreadable"),
        (footer_of(list_of(2, group(2) + LEAF)), "unreadable"),
        (footer_of(list_of(2, group(0) + LEAF)), "unreadable"),
        (footer_of(list_of(2, group(2**40) + LEAF)), "unreadable"),
        (footer_of(list_of(2, group(1) + LEAF.replace(b"a", b"\xff"))), "unreadable"),
        (footer_of(list_of(2, group(1) + LEAF, kind=5)), "unreadable"),
        (b"\x15" + b"\xff" * 11, "unreadable"),
        (b"\x1c" * 10**5, "unreadable"),
        (b"\x19\x19" * 10**5, "unreadable"),
        (b"", "unreadable"),
    ],
)
def test_hostile_footers(tmp_path, footer, code):
    assert code_of(put(tmp_path / "a.parquet", joined(MAGIC, footer))) == code


def test_the_hand_made_footer_is_one_but_for_the_attack(tmp_path):
    path = put(tmp_path / "a.parquet", joined(MAGIC, footer_of(list_of(2, group(1) + LEAF))))
    assert code_of(path) is None
    assert pq.read_schema(path).names == ["a"]


@pytest.mark.parametrize(
    ("limits", "code"),
    [
        ({"max_columns": 3}, "too_large"),
        ({"max_depth": 1}, "unsupported_schema"),
        ({"max_row_groups": 2}, "too_large"),
        ({"max_chunks": 14}, "too_large"),
        ({"max_rows": 2}, "too_large"),
        ({"max_row_group_megabytes": 1e-4}, "too_large"),
        ({"max_columns": 7, "max_depth": 2, "max_row_groups": 3, "max_chunks": 15, "max_rows": 3}, None),
    ],
)
def test_limits(tmp_path, write_shard, limits, code):
    path = write_shard(tmp_path / "a.parquet", 3, side=4, row_group_size=1)
    assert code_of(path, ContainerLimits(**limits)) == code


@pytest.fixture
def canary(tmp_path):
    """An extension type that makes a file when pyarrow makes it; the file's path."""
    path = tmp_path / "canary"

    class Canary(pa.ExtensionType):
        def __init__(self):
            super().__init__(pa.binary(), "tests.canary")

        def __arrow_ext_serialize__(self):
            return b"anything, such as a pickle"

        @classmethod
        def __arrow_ext_deserialize__(cls, storage_type, serialized):
            path.touch()
            return cls()

    kind = Canary()
    pa.register_extension_type(kind)
    yield kind, path
    pa.unregister_extension_type("tests.canary")


def wrapped(kind, how):
    storage = pa.array([b"x"], pa.binary())
    array = pa.ExtensionArray.from_storage(kind, storage)
    if how == "struct":
        return pa.StructArray.from_arrays([array], ["a"])
    if how == "list":
        return pa.ListArray.from_arrays([0, 1], array)
    return array


@pytest.mark.parametrize("how", ["column", "struct", "list"])
def test_extension_types_are_never_made(tmp_path, canary, how):
    kind, trap = canary
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"image": pa.array([b""]), "x": wrapped(kind, how)}), path)
    trap.unlink(missing_ok=True)
    assert code_of(path) == "extension_type"
    assert not trap.exists()
    # What is refused is dangerous: pyarrow itself walks into it.
    pq.ParquetFile(path)
    assert trap.exists()


ARROW_KEY = b"\x19\x1c\x18\x0cARROW:schema\x18"
HARMLESS = b"\x18\x0cARROW:schema\x18\x04AAAA\x00"


@pytest.mark.parametrize(
    ("replacement", "code"),
    [
        # The metadata's field number written in full; and as a number that is the same in 16 bits.
        (b"\x09\x0a" + ARROW_KEY[1:], "extension_type"),
        (b"\x09" + varint(2 * (5 + 2**16)) + ARROW_KEY[1:], "unreadable"),
        # A harmless schema first; a key that is given twice; a list that says it holds numbers.
        (b"\x19\x2c" + HARMLESS + ARROW_KEY[2:], "extension_type"),
        (b"\x19\x1c\x18\x01x\x08\x02\x0cARROW:schema\x18", "unreadable"),
        (b"\x19\x15" + ARROW_KEY[2:], "unreadable"),
        # The metadata twice, the last of which counts.
        (b"\x19\x1c" + HARMLESS + b"\x09\x0a" + ARROW_KEY[1:], "unreadable"),
    ],
)
def test_no_disguise_helps(tmp_path, canary, replacement, code):
    kind, trap = canary
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"x": wrapped(kind, "column")}), path)
    body, footer = split(path.read_bytes())
    assert footer.count(ARROW_KEY) == 1
    put(path, joined(body, footer.replace(ARROW_KEY, replacement)))
    trap.unlink(missing_ok=True)
    assert code_of(path) == code
    assert not trap.exists()


@pytest.mark.parametrize("change", [lambda b: b[:40] + b"\n" + b[40:], lambda b: b + b"!", lambda b: b[:-1]])
def test_a_schema_that_is_not_plain_base64(tmp_path, shard, change):
    body, footer = split(shard.read_bytes())
    value = pq.ParquetFile(shard).metadata.metadata[b"ARROW:schema"]
    changed = change(value)
    disguised = footer.replace(varint(len(value)) + value, varint(len(changed)) + changed)
    assert disguised != footer
    assert code_of(put(shard, joined(body, disguised))) == "unreadable"


def test_parquet_types_that_pyarrow_would_make_extensions_of_are_their_storage(tmp_path):
    table = pa.table({"id": pa.array([b"0" * 16], pa.uuid())})
    pq.write_table(table, tmp_path / "stored.parquet")
    assert code_of(tmp_path / "stored.parquet") == "extension_type"
    pq.write_table(table, tmp_path / "a.parquet", store_schema=False)
    with open_parquet(str(tmp_path / "a.parquet")) as file:
        assert file.schema_arrow.types == [pa.binary(16)]


def test_what_is_no_schema_at_all(shard):
    body, footer = split(shard.read_bytes())
    value = pq.ParquetFile(shard).metadata.metadata[b"ARROW:schema"]
    garbage = base64.b64encode(b"\xff" * 300)[: len(value)]
    footer = footer.replace(varint(len(value)) + value, varint(len(garbage)) + garbage)
    assert code_of(put(shard, joined(body, footer))) == "unreadable"


def test_a_column_whose_statistics_would_end_the_process(shard):
    body, footer = split(shard.read_bytes())
    # Histograms of levels one entry longer than the levels of the schema: pyarrow aborts when asked.
    histogram = b"\x19\x36"
    assert histogram in footer
    put(shard, joined(body, footer.replace(histogram + b"\x00", b"\x19\x46\x00\x00", 1)))
    with open_parquet(str(shard)) as file:
        assert file.column_bytes("image") > 0


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_flipped_bytes_are_refused_or_read(shard, data):
    original = bytearray(shard.read_bytes())
    start = data.draw(st.sampled_from([0, len(split(bytes(original))[0]), len(original) - 8]))
    changed = bytearray(original)
    for _ in range(data.draw(st.integers(1, 4))):
        changed[data.draw(st.integers(start, len(original) - 1))] = data.draw(st.integers(0, 255))
    with tempfile.TemporaryDirectory() as folder:
        code_of(put(Path(folder) / "a.parquet", changed))


def test_a_damaged_page_is_found_while_reading(tmp_path):
    path = tmp_path / "a.parquet"
    table = pa.table({"image": pa.array([b"some bytes of an image"])})
    pq.write_table(table, path, write_page_checksum=True, compression="none", use_dictionary=False)
    body, footer = split(path.read_bytes())
    put(path, joined(body.replace(b"some bytes", b"SOME bytes"), footer))
    with open_parquet(str(path)) as file:
        assert file.metadata.num_rows == 1
    assert code_of(path) == "unreadable"


class FailingFile(io.BytesIO):
    """A file whose store breaks down before a position."""

    broken_below = 0
    failure: OSError

    def read(self, size=-1):
        if self.tell() < self.broken_below:
            raise self.failure
        return super().read(size)


class FailingStore(MemoryFileSystem):
    protocol = "failing"
    cachable = False
    data: bytes = b""
    file_type = FailingFile

    def _open(self, path, mode="rb", **kwargs):
        return self.file_type(self.data)

    def cat_file(self, path, start=None, end=None, **kwargs):
        return self.data[start:end]


@pytest.fixture
def failing_store():
    fsspec.register_implementation("failing", FailingStore, clobber=True)
    yield FailingStore
    FailingFile.broken_below = 0
    FailingStore.file_type = FailingFile


@pytest.mark.parametrize(
    "failure", [OSError("reset"), ConnectionResetError("x"), TimeoutError(), OSError(5, "io")]
)
def test_a_failing_store_is_not_a_damaged_file(tmp_path, write_shard, failing_store, failure):
    path = write_shard(tmp_path / "a.parquet", 60, side=48)
    failing_store.data = path.read_bytes()
    FailingFile.failure = failure
    assert len(failing_store.data) > 2 * 2**16
    with open_parquet("failing://x/a.parquet") as file:
        assert file.read().num_rows == 60
    for broken_below in (len(failing_store.data), 1000):
        FailingFile.broken_below = broken_below
        with pytest.raises(type(failure)) as caught, open_parquet("failing://x/a.parquet") as file:
            file.read()
        assert caught.value is failure


def test_missing_files_are_missing(tmp_path):
    with pytest.raises(FileNotFoundError), open_parquet(str(tmp_path / "none.parquet")):
        pass
    (tmp_path / "folder.parquet").mkdir()
    with pytest.raises(IsADirectoryError), open_parquet(str(tmp_path / "folder.parquet")):
        pass


def test_pyarrow_reads_the_bytes_that_were_checked(shard, failing_store):
    body, footer = split(shard.read_bytes())

    class TwoFaced(io.BytesIO):
        """After its end was read once, another footer is there."""

        def read(self, size=-1):
            data = super().read(size)
            self.getbuffer()[len(body) : len(body) + len(footer)] = bytes(len(footer))
            return data

    failing_store.data, failing_store.file_type = shard.read_bytes(), TwoFaced
    with open_parquet("failing://x/a.parquet") as file:
        assert file.read().equals(pq.read_table(shard))


def test_a_name_that_is_a_chain_of_addresses(tmp_path, write_shard, monkeypatch):
    write_shard(tmp_path / "elsewhere.parquet", 1)
    monkeypatch.chdir(tmp_path)
    with (
        pytest.raises(ContainerError, match="'::'") as caught,
        open_parquet(f"memory://x::{tmp_path}/elsewhere.parquet"),
    ):
        pass
    assert caught.value.code == "unreadable"


def test_errors_of_the_body_stay_what_they_are(shard):
    for error in (CorpusError("mine"), KeyError("x"), FileNotFoundError(2, "x"), PermissionError(13, "x")):
        with pytest.raises(type(error)) as caught, open_parquet(str(shard)):
            raise error
        assert caught.value is error


def test_the_file_is_closed_afterwards(shard):
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        with open_parquet(str(shard)) as file:
            file.read()
    assert len(os.listdir("/proc/self/fd")) == before


def test_errors_travel_between_processes():
    error = ContainerError("truncated", "x ends early")
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), again.code, str(again)) == (ContainerError, "truncated", "x ends early")


@pytest.mark.parametrize(
    ("fields", "purified", "code"),
    [
        ([("image", pa.binary())], False, None),
        ([("photo", pa.binary())], False, "no_image_column"),
        ([("image", pa.string())], False, "wrong_type"),
        ([("image", pa.binary()), ("image", pa.binary())], False, "unsupported_schema"),
        ([("image", pa.binary()), ("acsr_status", pa.string())], False, "purified_before"),
        ([("image", pa.binary()), ("acsr_status", pa.string())], True, None),
    ],
)
def test_schemas(fields, purified, code):
    context = pytest.raises(ContainerError) if code else nullcontext()
    with context as caught:
        check_schema(pa.schema(fields), "image", "some.parquet", purified)
    assert code is None or caught.value.code == code
