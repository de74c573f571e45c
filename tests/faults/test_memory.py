"""Row 10: Ray's object store is full, and there is no room to spill what it holds."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from acsr_ray.corpus.ledger import Ledger

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]

LARGE, SMALL = 1600, 16
ROWS = {0: 10, 1: 10, 2: 18, 3: 10}
"""Rows of each shard; the pixels of the third take 132 MiB, where the store holds 100."""


def write_images(folder):
    folder.mkdir()
    for shard, rows in ROWS.items():
        side = LARGE if shard == 2 else SMALL
        cells = []
        for row in range(rows):
            buffer = io.BytesIO()
            Image.fromarray(np.full((side, side, 3), 20 * shard + row, np.uint8)).save(buffer, "PNG")
            cells.append({"bytes": buffer.getvalue(), "path": f"{shard}-{row}.png"})
        image = pa.array(cells, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
        keys = [f"{shard}-{row}" for row in range(rows)]
        pq.write_table(pa.table({"image_id": keys, "image": image}), folder / f"part-{shard}.parquet")
    return folder


def test_a_full_object_store_stops_the_job_and_one_with_room_ends_it(start_purify, tmp_path):
    source, output = write_images(tmp_path / "in"), tmp_path / "out"
    # No disk is as empty as that: nothing can be spilled.
    full = {"RAY_local_fs_capacity_threshold": "0.0001"}
    job = start_purify(source, output, unit_rows=18, environment=full)
    assert job.wait() == 75, job.told()
    (line,) = [line for line in job.told().splitlines() if line.startswith("error:")]
    assert "no room left in Ray's object store" in line
    done = Ledger(str(output)).published()
    assert Ledger(str(output)).snapshot().names() == done
    again = start_purify(source, output, unit_rows=18)
    assert again.wait() == 0, again.told()
    assert f'"images": {sum(ROWS.values())}, "statuses": {{"purified": {sum(ROWS.values())}}}' in again.told()
    published = Ledger(str(output)).published()
    assert done <= published
    rows = [row for name in published for row in pq.read_table(output / "data" / name).to_pylist()]
    assert sorted(row["image_id"] for row in rows) == sorted(
        f"{shard}-{row}" for shard, rows in ROWS.items() for row in range(rows)
    )
