"""Types of columns in a Delta table: what files hold must come out of it, or be refused by name."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable, Schema
from deltalake.transaction import AddAction, create_table_with_add_actions

from acsr_ray.corpus.delta_types import DeltaSchemaError, delta_schema, merge_schemas

VALUES = {
    "bool": pa.array([True, None]),
    "int8": pa.array([-1, None], pa.int8()),
    "uint8": pa.array([200, None], pa.uint8()),
    "uint16": pa.array([60_000, None], pa.uint16()),
    "uint32": pa.array([4_000_000_000, None], pa.uint32()),
    "float": pa.array([1.5, None], pa.float32()),
    "decimal": pa.array([1, None], pa.decimal128(10, 2)),
    "day": pa.array([1, None], pa.date32()),
    "local": pa.array([1, None], pa.timestamp("ms")),
    "zoned": pa.array([1, None], pa.timestamp("us", "Europe/Berlin")),
    "large": pa.array(["ü", None], pa.large_string()),
    "coded": pa.array(["a", None]).dictionary_encode(),
    "fixed": pa.array([b"1234", None], pa.binary(4)),
    "list": pa.array([["a", "b"], None]),
    "vector": pa.array([[1.0, 2.0], None], pa.list_(pa.float32(), 2)),
    "map": pa.array([[("a", 1)], None], pa.map_(pa.string(), pa.int32())),
    "nested": pa.array(
        [{"a": [{"b": 200}]}, None], pa.struct([("a", pa.list_(pa.struct([("b", pa.uint8())])))])
    ),
}


def test_values_come_out_as_they_are_in_the_files(tmp_path):
    table = pa.table(VALUES)
    pq.write_table(table, tmp_path / "a.parquet")
    stored = pq.read_table(tmp_path / "a.parquet")
    schema = delta_schema(stored.schema)
    size = (tmp_path / "a.parquet").stat().st_size
    add = AddAction("a.parquet", size, {}, 1, True, json.dumps({"numRecords": 2}))
    create_table_with_add_actions(str(tmp_path), Schema.from_arrow(schema), [add])
    found = DeltaTable(str(tmp_path))
    read = found.to_pyarrow_table()
    for name in VALUES:
        assert read[name].to_pylist() == stored[name].to_pylist(), name
    # What the table says of itself is what its files are compared with.
    assert delta_schema(pa.schema(found.schema().to_arrow())).equals(schema)
    assert merge_schemas(schema, schema).equals(schema)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (pa.uint64(), "is uint64"),
        (pa.float16(), "is halffloat"),
        (pa.timestamp("ns"), r"is timestamp\[ns\]"),
        (pa.time64("us"), "is time64"),
        (pa.duration("s"), "is duration"),
        (pa.null(), "is null"),
        (pa.list_(pa.struct([("inner", pa.uint64())])), "'inner' is uint64"),
        (pa.struct([("a b", pa.int32())]), "'a b': Delta tables have no such names"),
    ],
)
def test_what_has_no_type_is_named(kind, message):
    with pytest.raises(DeltaSchemaError, match=message):
        delta_schema(pa.schema([("x", kind)]))


def test_names_differ_by_more_than_case():
    with pytest.raises(DeltaSchemaError, match="its case"):
        delta_schema(pa.schema([("Label", pa.int32()), ("label", pa.int32())]))
    table = pa.schema([("label", pa.int32())])
    with pytest.raises(DeltaSchemaError, match="'Label' is int32, and 'label' is int32"):
        merge_schemas(table, pa.schema([("Label", pa.int32())]))
    with pytest.raises(DeltaSchemaError, match="'label' is string, and 'label' is int32"):
        merge_schemas(table, pa.schema([("label", pa.string())]))
    assert merge_schemas(table, pa.schema([("more", pa.int8())])).names == ["label", "more"]
