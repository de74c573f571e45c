"""Blocks of Ray Data: one per unit from end to end."""

import pytest

from acsr_ray.columns import UNIT
from acsr_ray.corpus.units import Unit, plan_units
from acsr_ray.distributed.blocks import unit_blocks

pytestmark = pytest.mark.ray


def test_every_unit_is_a_block(tmp_path, write_shard, ray_local):
    source = write_shard(tmp_path / "a.parquet", 10)
    units = plan_units(str(source), image_column="image", unit_rows=3, unit_megabytes=32.0, limit=None)
    mapped = unit_blocks(units).map_batches(lambda table: table, batch_size=None, batch_format="pyarrow")
    tables = list(mapped.iter_batches(batch_size=None, batch_format="pyarrow"))
    assert [table.num_rows for table in tables] == [1, 1, 1, 1]
    found = {Unit.from_json(text) for table in tables for text in table[UNIT].to_pylist()}
    assert found == set(units)
