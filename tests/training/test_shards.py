"""Planning of labelled shards: what was purified before is taken only where it is asked for."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from acsr_ray.columns import STATUS
from acsr_ray.corpus.sources import CorpusError
from acsr_ray.training.feed import decode_unit
from acsr_ray.training.shards import plan_training

STATUSES = ["purified", "quarantined", "purified", "purified", "quarantined"]


@pytest.fixture
def purified(tmp_path, smooth_pixels, encoded, hf_table, write_parquet):
    """Return a shard as purification leaves it: the whole image cell of a quarantined row is null."""
    table = hf_table([encoded(image) for image in smooth_pixels(len(STATUSES), 16, 16, 0)])
    cells = [
        cell if status == "purified" else None
        for cell, status in zip(table["image"].to_pylist(), STATUSES, strict=True)
    ]
    position = table.column_names.index("image")
    table = table.set_column(position, "image", pa.array(cells, table["image"].type))
    return str(write_parquet(tmp_path / "a.parquet", table.append_column(STATUS, pa.array(STATUSES))))


def test_purified_shards_are_refused_unless_asked_for(purified):
    with pytest.raises(CorpusError, match="acsr_status: it was purified before"):
        plan_training([purified], 1)
    shards = plan_training([purified], 1, purified=True)
    assert shards.num_rows == len(STATUSES)
    assert shards.class_names == ("ant", "bee", "cat")


def test_quarantined_rows_of_purified_shards_are_not_trained_on(purified):
    shards = plan_training([purified], 1, purified=True)
    labels = pq.read_table(purified)["label"].to_pylist()
    unreadable = 0
    for unit in shards.units:
        rows = decode_unit(unit, 16)
        unreadable += rows.unreadable
        for source, label in zip(rows.source.tolist(), rows.labels.tolist(), strict=True):
            if source >= 0:
                assert STATUSES[unit.first + source] == "purified"
                assert label == labels[unit.first + source]
    assert unreadable == 2


def test_a_purified_row_still_needs_its_label(purified):
    table = pq.read_table(purified)
    labels = pa.array([None, *table["label"].to_pylist()[1:]], pa.int64())
    pq.write_table(table.set_column(table.column_names.index("label"), "label", labels), purified)
    with pytest.raises(CorpusError, match="rows without a label"):
        plan_training([purified], 1, purified=True)
