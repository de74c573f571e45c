"""Columns of Parquet files as columns of a Delta table: what every reader of such tables can make of them."""

import pyarrow as pa

from acsr_ray.config import AcsrError

FORBIDDEN = frozenset(" ,;{}()\n\t=")
"""Characters that names of columns cannot have in Delta tables."""

PLAIN = (
    pa.types.is_boolean,
    pa.types.is_signed_integer,
    pa.types.is_float32,
    pa.types.is_float64,
    pa.types.is_date32,
    pa.types.is_decimal128,
)
TEXTS = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
BYTES = (
    pa.types.is_binary,
    pa.types.is_large_binary,
    pa.types.is_binary_view,
    pa.types.is_fixed_size_binary,
)
WIDER = {pa.uint8(): pa.int16(), pa.uint16(): pa.int32(), pa.uint32(): pa.int64()}


class DeltaSchemaError(AcsrError, ValueError):
    """Columns that a Delta table cannot have; the message names the column."""


def delta_schema(schema: pa.Schema) -> pa.Schema:
    """Return a schema in the types that Delta Lake has, as every reader of the files gives them.

    Raises:
        DeltaSchemaError: a column of a type, or with a name, that a Delta table cannot have.
    """
    fields = [pa.field(field.name, _delta_type(field.type, field.name)) for field in schema]
    names = [field.name.casefold() for field in fields]
    for field, name in zip(fields, names, strict=True):
        if names.count(name) > 1:
            raise DeltaSchemaError(f"column {field.name!r}: Delta tables do not tell its case from another's")
    return pa.schema(fields)


def merge_schemas(table: pa.Schema, file: pa.Schema) -> pa.Schema:
    """Return the columns of a table and those that a file has beside them.

    Raises:
        DeltaSchemaError: a column of another type than in the table, or with its name in another case.
    """
    folded = {field.name.casefold(): field for field in table}
    for field in file:
        known = folded.get(field.name.casefold())
        if known is None:
            table = table.append(field)
        elif known.name != field.name or not known.type.equals(field.type):
            raise DeltaSchemaError(
                f"column {field.name!r} is {field.type}, and {known.name!r} is {known.type} in the table"
            )
    return table


def _delta_type(kind: pa.DataType, name: str) -> pa.DataType:
    if not FORBIDDEN.isdisjoint(name):
        raise DeltaSchemaError(f"column {name!r}: Delta tables have no such names")
    if pa.types.is_dictionary(kind):
        return _delta_type(kind.value_type, name)
    if pa.types.is_struct(kind):
        return pa.struct([pa.field(part.name, _delta_type(part.type, part.name)) for part in kind])
    if pa.types.is_map(kind):
        return pa.map_(_delta_type(kind.key_type, name), _delta_type(kind.item_type, name))
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return pa.list_(_delta_type(kind.value_type, name))
    if pa.types.is_timestamp(kind) and kind.unit != "ns":
        # Parquet keeps moments in UTC whatever the zone they are shown in.
        return pa.timestamp("us", "UTC" if kind.tz else None)
    if any(test(kind) for test in TEXTS):
        return pa.string()
    if any(test(kind) for test in BYTES):
        return pa.binary()
    if kind in WIDER or any(test(kind) for test in PLAIN):
        return WIDER.get(kind, kind)
    raise DeltaSchemaError(f"column {name!r} is {kind}, which Delta Lake has no type for")
