"""The table of each training image's cluster."""

import numpy as np
import pytest

from acsr_ray.clustering.assignments import ASSIGNMENTS, Assignments


@pytest.fixture
def assignments():
    return Assignments(
        ["a.parquet", "b.parquet", "a.parquet", "b.parquet"],
        np.array([0, 0, 5, 7]),
        np.array([3, 1, 1, 0], np.int32),
        np.array([2, 0, 1, 4], np.int32),
    )


def test_round_trip(assignments, tmp_path):
    path = tmp_path / "folder" / ASSIGNMENTS
    assignments.save(path)
    loaded = Assignments.load(path)
    assert list(loaded.shards) == list(assignments.shards)
    for name in ("rows", "class_id", "cluster_id"):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(assignments, name))
    assert loaded.cluster_id.dtype == np.int32
    assert [file.name for file in path.parent.iterdir()] == [ASSIGNMENTS]


def test_clusters_come_in_the_order_asked(assignments):
    keys = [("b.parquet", 7), ("a.parquet", 0), ("a.parquet", 5), ("a.parquet", 0)]
    got = assignments.clusters_of(keys)
    np.testing.assert_array_equal(got, [4, 2, 1, 2])
    assert got.dtype == np.int32


def test_loaded_table_answers_like_the_saved_one(assignments, tmp_path):
    assignments.save(tmp_path / ASSIGNMENTS)
    keys = list(zip(assignments.shards, assignments.rows.tolist(), strict=True))
    loaded = Assignments.load(tmp_path / ASSIGNMENTS)
    np.testing.assert_array_equal(loaded.clusters_of(keys), assignments.cluster_id)


def test_unknown_images_are_counted(assignments):
    keys = [("a.parquet", 0), ("b.parquet", 5), ("c.parquet", 0)]
    with pytest.raises(ValueError, match="2 of 3 images have no cluster"):
        assignments.clusters_of(keys)
