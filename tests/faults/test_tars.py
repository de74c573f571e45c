"""Tars in an object store: the same rows as on a disk, read by ranges, whatever the weather."""

import io
import tarfile

import pytest

from acsr_ray.corpus.units import plan_units, read_unit
from acsr_ray.storage import patiently


@pytest.fixture
def tars(tmp_path):
    """60 samples in three tars."""
    folder = tmp_path / "in"
    folder.mkdir()
    for shard in range(3):
        with tarfile.open(folder / f"part-{shard}.tar", "w") as tar:
            for number in range(20 * shard, 20 * shard + 20):
                for extension, size in (("jpg", 3000), ("txt", 10)):
                    info = tarfile.TarInfo(f"{number:03d}.{extension}")
                    info.size, info.mtime = size, 1.5
                    tar.addfile(info, io.BytesIO(b"%d" % (number % 10) * size))
    return folder


def plan(location):
    options = {"image_column": "image", "unit_rows": 7, "unit_megabytes": 32.0, "limit": None}
    return patiently(lambda: plan_units(location, **options), "planning")


def test_rows_from_an_object_store_are_those_from_a_disk(store, tars, monkeypatch):
    expected = [row for unit in plan(str(tars)) for row in read_unit(unit).to_pylist()]
    location = store.upload(tars, "in")
    store.weather.share = 0.1
    units = plan(location)
    rows = [row for unit in units for row in patiently(lambda u=unit: read_unit(u), "reading").to_pylist()]
    assert len(rows) == 60
    assert rows == expected
    # The store's own digest decides what changed.
    assert all(unit.content.startswith("etag ") for unit in units)
