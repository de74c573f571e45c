"""Units: they cover the rows once in order, name outputs after content, and read what was planned."""

import os
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from acsr_ray.columns import IMAGE, LABEL
from acsr_ray.corpus.containers import check_schema
from acsr_ray.corpus.sources import CorpusError
from acsr_ray.corpus.units import Unit, plan_units, read_unit


def plan(location, unit_rows=250, unit_megabytes=32.0, limit=None, image_column=IMAGE):
    return plan_units(
        str(location),
        image_column=image_column,
        unit_rows=unit_rows,
        unit_megabytes=unit_megabytes,
        limit=limit,
    )


def put(path, data=b"x"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


@settings(deadline=None, max_examples=25)
@given(
    sizes=st.lists(st.integers(0, 23), min_size=1, max_size=4).filter(any),
    unit_rows=st.integers(1, 9),
    limit=st.one_of(st.none(), st.integers(1, 60)),
    group=st.integers(1, 10),
)
def test_units_cover_the_first_rows_once_and_in_order(sizes, unit_rows, limit, group):
    with tempfile.TemporaryDirectory() as folder:
        written = []
        for number, size in enumerate(sizes):
            cells = [f"{number}-{row}".encode() for row in range(size)]
            table = pa.table({IMAGE: pa.array(cells, pa.binary())})
            pq.write_table(table, Path(folder) / f"shard-{number}.parquet", row_group_size=group)
            written += cells
        units = plan(folder, unit_rows, limit=limit)
        read = [cell for unit in units for cell in read_unit(unit)[IMAGE].to_pylist()]
        assert read == written[:limit]
        assert all(1 <= unit.num_rows <= unit_rows for unit in units)
        names = [unit.output_name("f" * 64) for unit in units]
        assert names == sorted(names)
        assert len(set(names)) == len(names)


@pytest.mark.parametrize("unit_rows", [1, 3, 5, 7, 20])
def test_reading_across_row_groups_equals_slicing(tmp_path, write_shard, unit_rows):
    path = write_shard(tmp_path / "a.parquet", 17, side=4, row_group_size=5)
    whole = pq.read_table(path)
    for unit in plan(path, unit_rows):
        table = read_unit(unit)
        assert table.equals(whole.slice(unit.first, unit.num_rows))
        assert table.schema.equals(whole.schema, check_metadata=True)


def test_units_of_large_images_have_fewer_rows(tmp_path, write_shard):
    path = write_shard(tmp_path / "a.parquet", 24, side=16)
    rows = [unit.num_rows for unit in plan(path, 24, unit_megabytes=0.05)]
    assert len(rows) > 1
    assert sum(rows) == 24
    assert max(rows) < 24
    assert {unit.num_rows for unit in plan(path, 24, unit_megabytes=1e-6)} == {1}
    assert len(plan(path, 24, unit_megabytes=32.0)) == 1


def test_names_sort_in_input_order_across_folders(tmp_path, write_shard):
    for name in ("b/1", "a", "a-b", "b/10", "b/9", "a/z", "A"):
        write_shard(tmp_path / f"{name}.parquet", 3, side=4)
    units = plan(tmp_path, unit_rows=2)
    names = [unit.output_name("0" * 64) for unit in units]
    assert names == sorted(names)
    assert [unit.first for unit in units] == [0, 2] * 7
    assert all(name.startswith(f"{unit.relative}.rows-") for name, unit in zip(names, units, strict=True))


def test_names_sort_when_one_shard_name_extends_another(tmp_path, write_shard):
    for name in ("train", "train.q", "train.a"):
        write_shard(tmp_path / f"{name}.parquet", 1, side=4)
    names = [unit.output_name("0" * 64) for unit in plan(tmp_path)]
    assert names == sorted(names)


def test_names_follow_content_fingerprint_and_rows(tmp_path, write_shard):
    path = write_shard(tmp_path / "a.parquet", 4, side=4, seed=0)
    (unit,) = plan(path)
    name = unit.output_name("one")
    assert name == plan(path)[0].output_name("one")
    assert name != unit.output_name("two")
    # A copy, or a new modification time, is the same content.
    os.utime(path, (1, 1))
    assert plan(path)[0].output_name("one") == name
    assert plan(path, limit=3)[0].output_name("one") != name
    write_shard(path, 4, side=4, seed=1)
    assert plan(path)[0].output_name("one") != name
    assert Path(name).name.startswith("a.rows-0000000-0000003.")


def test_json_round_trip(tmp_path, write_shard):
    write_shard(tmp_path / "shards" / "a.parquet", 5, side=4)
    put(tmp_path / "photos" / "ä b" / "1.png")
    put(tmp_path / "photos" / "2.png")
    for unit in [*plan(tmp_path / "shards", 2), *plan(tmp_path / "photos")]:
        restored = Unit.from_json(unit.to_json())
        assert restored == unit
        assert hash(restored) == hash(unit)
        assert restored.output_name("f") == unit.output_name("f")


def test_image_folder_becomes_rows(tmp_path):
    root = tmp_path / "photos"
    for name in ("bee/2.png", "ant/1.png", "ant/3.png", "bee/skip.txt"):
        put(root / name, name.encode())
    units = plan(root, unit_rows=2)
    assert [(unit.first, unit.last) for unit in units] == [(0, 1), (2, 2)]
    tables = [read_unit(unit) for unit in units]
    cells = [cell for table in tables for cell in table[IMAGE].to_pylist()]
    assert [cell["path"] for cell in cells] == ["ant/1.png", "ant/3.png", "bee/2.png"]
    assert [cell["bytes"] for cell in cells] == [b"ant/1.png", b"ant/3.png", b"bee/2.png"]
    assert [label for table in tables for label in table[LABEL].to_pylist()] == [0, 0, 1]
    assert plan(root, unit_rows=2, limit=1)[0].files == units[0].files[:1]


def test_image_folder_without_classes_has_no_label_column(tmp_path):
    put(tmp_path / "1.png")
    assert read_unit(plan(tmp_path)[0]).column_names == [IMAGE]


def test_a_new_or_changed_file_changes_only_its_unit(tmp_path):
    for number in range(4):
        put(tmp_path / f"{number}.png")
    before = [unit.output_name("f") for unit in plan(tmp_path, unit_rows=2)]
    put(tmp_path / "3.png", b"longer")
    after = [unit.output_name("f") for unit in plan(tmp_path, unit_rows=2)]
    assert after[0] == before[0]
    assert after[1] != before[1]


def schema(**columns):
    return pa.schema(list(columns.items()))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (schema(photo=pa.binary()), "no column 'image'.*photo"),
        (schema(image=pa.string()), "must be binary"),
        (schema(image=pa.list_(pa.uint8())), "must be binary"),
        (schema(image=pa.struct([("path", pa.string())])), "must be binary"),
        (schema(image=pa.struct([("bytes", pa.string())])), "must be binary"),
        (schema(image=pa.binary(), acsr_status=pa.string()), "acsr_status: it was purified before"),
    ],
)
def test_unusable_schemas_are_refused(tmp_path, bad, message):
    with pytest.raises(CorpusError, match=message):
        check_schema(bad, IMAGE, "some.parquet")
    pq.write_table(bad.empty_table(), tmp_path / "a.parquet")
    with pytest.raises(CorpusError, match=message):
        plan(tmp_path)


@pytest.mark.parametrize(
    "good",
    [
        schema(image=pa.binary()),
        schema(image=pa.large_binary(), label=pa.int64()),
        schema(image=pa.struct([("path", pa.string()), ("bytes", pa.binary())])),
    ],
)
def test_usable_schemas(good):
    check_schema(good, IMAGE, "some.parquet")


def test_no_rows_at_all_is_refused(tmp_path):
    pq.write_table(schema(image=pa.binary()).empty_table(), tmp_path / "a.parquet")
    with pytest.raises(CorpusError, match="has no rows"):
        plan(tmp_path)


def test_a_file_that_is_not_parquet_is_refused(tmp_path):
    put(tmp_path / "a.parquet", b"PAR1 not really")
    with pytest.raises(CorpusError, match=r"a\.parquet is not a readable Parquet file"):
        plan(tmp_path)


def test_a_shard_that_shrank_after_planning_is_refused(tmp_path, write_shard):
    path = write_shard(tmp_path / "a.parquet", 6, side=4)
    (unit,) = plan(path)
    write_shard(path, 4, side=4)
    with pytest.raises(CorpusError, match="changed after it was planned"):
        read_unit(unit)
