"""Labelled shards in memory: order, sizes, names, unreadable rows, refusals; shards we write."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from acsr_ray.corpus.labelled import (
    image_bytes,
    label_names,
    parquet_shards,
    read_labelled,
    resize_pixels,
)
from acsr_ray.corpus.sources import CorpusError
from acsr_ray.corpus.writing import write_shard as write_labelled_shard


def test_rows_keep_their_place_and_unreadable_ones_are_counted(
    tmp_path, smooth_pixels, encoded, hf_table, write_parquet
):
    pixels = smooth_pixels(5, 16, 16, seed=1)
    cells = [encoded(image) for image in pixels]
    write_parquet(tmp_path / "b.parquet", hf_table([cells[0], b"broken", None, cells[1]]))
    write_parquet(tmp_path / "c.parquet", hf_table(cells[2:]), row_group_size=1)
    data = read_labelled([str(tmp_path / "c.parquet"), str(tmp_path / "b.parquet")], 16)
    assert len(data) == 5
    assert data.num_unreadable == 2
    assert np.array_equal(data.pixels, pixels[[2, 3, 4, 0, 1]])
    assert data.labels.tolist() == [0, 1, 2, 0, 0]
    assert data.rows.tolist() == [0, 1, 2, 0, 3]
    assert data.shard_of.tolist() == [0, 0, 0, 1, 1]
    assert [shard.rsplit("/", 1)[1] for shard in data.shards] == ["c.parquet", "b.parquet"]
    assert data.class_names == ("ant", "bee", "cat")


def test_images_are_resized_to_one_square(tmp_path, smooth_pixels, encoded, hf_table, write_parquet):
    cells = [encoded(smooth_pixels(1, h, w, seed=h)[0]) for h, w in ((8, 8), (20, 31), (5, 40))]
    path = write_parquet(tmp_path / "a.parquet", hf_table(cells))
    data = read_labelled([str(path)], 12)
    assert data.pixels.shape == (3, 12, 12, 3)
    assert data.pixels.dtype == np.uint8


def test_resize_keeps_equal_sizes_and_constant_colours(smooth_pixels):
    pixels = smooth_pixels(1, 9, 9, seed=0)[0]
    assert resize_pixels(pixels, 9) is pixels
    flat = np.full((7, 31, 3), (10, 200, 30), np.uint8)
    assert (resize_pixels(flat, 5) == (10, 200, 30)).all()


def test_class_names_default_to_the_labels(tmp_path, encoded, smooth_pixels):
    cell = encoded(smooth_pixels(1, 4, 4, seed=0)[0])
    table = pa.table({"image": pa.array([cell, cell], pa.binary()), "label": [2, 0]})
    pq.write_table(table, tmp_path / "a.parquet")
    assert read_labelled([str(tmp_path)], 4).class_names == ("0", "1", "2")


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (pa.table({"label": [1]}), "no column image"),
        (pa.table({"image": pa.array([b"x"], pa.binary())}), "no column label"),
        (
            pa.table({"image": pa.array([b"x"], pa.binary()), "label": pa.array([None], pa.int64())}),
            "without a label",
        ),
        (pa.table({"image": pa.array([b"x"], pa.binary()), "label": [1]}), "no readable labelled image"),
    ],
)
def test_unusable_shards_are_refused(tmp_path, table, message):
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(CorpusError, match=message):
        read_labelled([str(tmp_path)], 8)


def test_image_folders_are_not_shards(tmp_path):
    (tmp_path / "a.png").write_bytes(b"x")
    with pytest.raises(CorpusError, match="image folder"):
        parquet_shards([str(tmp_path)])


def test_image_bytes_of_every_layout():
    cells = [b"a", None, b"", b"c"]
    kind = pa.struct([("path", pa.string()), ("bytes", pa.binary())])
    structs = pa.array([None if c is None else {"path": "p", "bytes": c} for c in cells], kind)
    for column in (pa.array(cells, pa.binary()), pa.array(cells, pa.large_binary()), structs):
        assert list(image_bytes(column)) == cells
        assert list(image_bytes(pa.chunked_array([column.slice(0, 1), column.slice(1)]))) == cells
        assert list(image_bytes(column.slice(2))) == cells[2:]
    # A null struct whose child still holds bytes is null.
    hidden = pa.StructArray.from_arrays([pa.array([b"secret"])], names=["bytes"], mask=pa.array([True]))
    assert list(image_bytes(hidden)) == [None]


@pytest.mark.parametrize("metadata", [None, {}, {"huggingface": "{}"}, {"pandas": "{}"}])
def test_label_names_may_be_absent(metadata):
    assert label_names(pa.schema([("label", pa.int64())], metadata=metadata)) == ()


def test_written_shards_are_read_back_exactly(tmp_path, smooth_pixels):
    pixels = smooth_pixels(4, 10, 10, seed=3)
    labels = np.array([1, 0, 1, 1])
    path = tmp_path / "deep" / "x.parquet"
    write_labelled_shard(path, pixels, labels, ["k0", "k1", "k2", "k3"], ["no", "yes"])
    data = read_labelled([str(path)], 10)
    assert np.array_equal(data.pixels, pixels)
    assert np.array_equal(data.labels, labels)
    assert data.class_names == ("no", "yes")
    table = pq.read_table(path)
    assert table["image_id"].to_pylist() == ["k0", "k1", "k2", "k3"]
    assert table["image"][2].as_py()["path"] == "k2.png"
