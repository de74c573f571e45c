"""Fault rows 19 to 22: hostile and damaged shards and keys, as planning and reading meet them."""

import pickle
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from acsr_ray.columns import IMAGE
from acsr_ray.corpus.containers import ContainerError
from acsr_ray.corpus.labelled import label_names
from acsr_ray.corpus.sources import CorpusError
from acsr_ray.corpus.units import plan_units, read_unit


def plan(location, **options):
    return plan_units(
        str(location),
        **{"image_column": IMAGE, "unit_rows": 100, "unit_megabytes": 32.0, "limit": None, **options},
    )


def refusal(location):
    with pytest.raises(ContainerError) as caught:
        plan(location)
    assert str(location) in str(caught.value)
    return caught.value.code


@pytest.mark.parametrize(
    ("columns", "code"),
    [
        ({"photo": pa.binary()}, "no_image_column"),
        ({"image": pa.string()}, "wrong_type"),
        ({"image": pa.struct([("path", pa.string())])}, "wrong_type"),
        ({"image": pa.binary(), "acsr_status": pa.string()}, "purified_before"),
        ({"image": pa.binary(), "id": pa.uuid()}, "extension_type"),
    ],
)
def test_row_19_schemas(tmp_path, columns, code):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.schema(list(columns.items())).empty_table(), path)
    assert refusal(path) == code


def test_row_19_schemas_that_drift_between_shards_are_each_their_own(tmp_path, write_shard):
    write_shard(tmp_path / "a.parquet", 2, side=4)
    table = pq.read_table(tmp_path / "a.parquet")
    pq.write_table(table.drop_columns(["caption"]), tmp_path / "b.parquet")
    pq.write_table(table.set_column(0, "id", table["id"].cast(pa.string())), tmp_path / "c.parquet")
    assert [read_unit(unit).num_rows for unit in plan(tmp_path)] == [2, 2, 2]


def test_row_20_shards_that_are_damaged(tmp_path, write_shard):
    path = write_shard(tmp_path / "a.parquet", 4, side=8)
    data = path.read_bytes()
    for content, code in (
        (data[: len(data) // 2], "truncated"),
        (b"", "truncated"),
        (b"ZIP!" + data[4:], "not_parquet"),
        (data[:-8] + b"\xff\xff\0\0PAR1", "unreadable"),
    ):
        path.write_bytes(content)
        assert refusal(path) == code


@pytest.mark.parametrize("compression", ["none", "snappy", "zstd"])
def test_row_20_a_shard_that_is_damaged_after_planning(tmp_path, write_shard, compression):
    path = write_shard(tmp_path / "a.parquet", 30, side=16)
    pq.write_table(pq.read_table(path), path, compression=compression, write_page_checksum=True)
    (unit,) = plan(path)
    data = bytearray(path.read_bytes())
    # In the pages of the images, which are most of the file.
    data[len(data) // 3] ^= 1
    path.write_bytes(data)
    with pytest.raises(ContainerError) as caught:
        read_unit(unit)
    assert caught.value.code == "unreadable"
    path.write_bytes(data[:-20])
    with pytest.raises(ContainerError) as caught:
        read_unit(unit)
    assert caught.value.code == "truncated"


def test_row_20_a_shard_that_vanishes_is_not_damaged(tmp_path, write_shard):
    path = write_shard(tmp_path / "a.parquet", 4, side=8)
    (unit,) = plan(path)
    path.unlink()
    with pytest.raises(FileNotFoundError):
        read_unit(unit)


@pytest.fixture
def trap(tmp_path):
    """An extension type that unpickles what a file says, and a table whose file would make a canary."""
    canary = tmp_path / "canary"

    class Bomb:
        def __reduce__(self):
            return (Path.touch, (canary,))

    class Unpickling(pa.ExtensionType):
        def __init__(self):
            super().__init__(pa.binary(), "tests.unpickling")

        def __arrow_ext_serialize__(self):
            return pickle.dumps(Bomb())

        @classmethod
        def __arrow_ext_deserialize__(cls, storage_type, serialized):
            pickle.loads(serialized)
            return cls()

    kind = Unpickling()
    pa.register_extension_type(kind)
    extra = pa.ExtensionArray.from_storage(kind, pa.array([b"x"] * 2, pa.binary()))
    yield pa.table({IMAGE: pa.array([b"", b""]), "extra": extra}), canary
    pa.unregister_extension_type("tests.unpickling")


def test_row_21_a_pickle_in_a_shard_is_never_loaded(tmp_path, trap):
    table, canary = trap
    path = tmp_path / "in" / "a.parquet"
    path.parent.mkdir()
    pq.write_table(table, path)
    canary.unlink(missing_ok=True)
    assert refusal(path) == "extension_type"
    assert not canary.exists()
    pq.read_schema(path)
    assert canary.exists()


def test_row_21_a_shard_that_turns_hostile_after_planning(tmp_path, trap, write_shard):
    table, canary = trap
    path = write_shard(tmp_path / "in" / "a.parquet", 2, side=4)
    (unit,) = plan(path)
    pq.write_table(table, path)
    canary.unlink(missing_ok=True)
    with pytest.raises(ContainerError) as caught:
        read_unit(unit)
    assert caught.value.code == "extension_type"
    assert not canary.exists()


def test_row_22_keys_of_rows_are_data(tmp_path, write_shard):
    keys = ["../../etc/passwd", "same", "same", "n\0ul", "\u202eabc", "x" * 10_240, "", "C:\\a", "e\u0301"]
    path = write_shard(tmp_path / "a.parquet", len(keys), side=4)
    table = pq.read_table(path)
    pq.write_table(table.set_column(0, "id", pa.array(keys)), path)
    units = plan(path, unit_rows=2)
    assert [unit.output_name("f").split(".rows-")[0] for unit in units] == ["a"] * 5
    assert len({unit.output_name("f") for unit in units}) == 5
    # Which row has which key does not matter to any name, and they all come through.
    assert all(len(unit.output_name("f")) < 60 for unit in units)
    assert [key for unit in units for key in read_unit(unit)["id"].to_pylist()] == keys


def test_row_22_shards_that_only_differ_for_an_object_store(tmp_path, write_shard):
    store = fsspec.filesystem("memory")
    data = write_shard(tmp_path / "a.parquet", 2, side=4).read_bytes()
    keys = ("x/a", "x//a", "x/../a", "../x/a", "x\\a", "x/\u00e9", "x/e\u0301", "x/" + "k" * 900)
    for key in keys:
        store.pipe(f"/row-22/{key}.parquet", data)
    try:
        units = plan("memory://row-22")
        names = [unit.output_name("f") for unit in units]
        assert len(set(names)) == len(keys)
        assert names == sorted(names)
        assert all(Path("/out", name).resolve().is_relative_to("/out") for name in names)
        assert all(len(part.encode()) <= 255 for name in names for part in name.split("/"))
        assert [read_unit(unit).num_rows for unit in units] == [2] * len(keys)
    finally:
        store.rm("/row-22", recursive=True)


def test_row_22_an_image_whose_name_is_a_chain_of_addresses_is_not_followed(tmp_path):
    (tmp_path / "b.png::x.png").write_bytes(b"x")
    (tmp_path / "b.png").write_bytes(b"y")
    (unit,) = plan(tmp_path)
    cells = {cell["path"]: cell["bytes"] for cell in read_unit(unit)[IMAGE].to_pylist()}
    assert cells == {"b.png": b"y", "b.png::x.png": None}


def test_row_22_a_shard_whose_name_is_a_chain_of_addresses_is_not_followed(tmp_path, write_shard):
    write_shard(tmp_path / "b.parquet::x.parquet", 3, side=4)
    write_shard(tmp_path / "b.parquet", 2, side=4)
    with pytest.raises(ContainerError, match="::"):
        plan(tmp_path)


def test_class_names_that_are_no_json(tmp_path, write_shard):
    for text in (
        "{",
        "[]",
        '{"info": 3}',
        "[" * 100_000,
        '{"info": {"features": {"label": {"names": [1]}}}}',
    ):
        with pytest.raises(CorpusError, match="Hugging Face"):
            label_names(pa.schema([]).with_metadata({"huggingface": text}))
    assert label_names(pa.schema([]).with_metadata({"huggingface": "{}"})) == ()
