"""Nights, a retry and a verification with all stages on Ray: the stand-in of the other tests is none here."""

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from acsr_ray.corpus.lease import look
from acsr_ray.corpus.ledger import Ledger
from acsr_ray.distributed.probe import view_cluster
from acsr_ray.distributed.purify import PurifyCorpusSettings, purify_corpus
from acsr_ray.operations.nightly import RepurifyNightlySettings, repurify_nightly
from acsr_ray.operations.retry import RetrySettings, retry
from acsr_ray.operations.status import StatusSettings, output_status
from acsr_ray.operations.verify import VerifySettings, verify_output

pytestmark = [pytest.mark.slow, pytest.mark.ray]

SIDE = 16
IMAGE_TYPE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def draw(number, fmt):
    coarse = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(coarse.repeat(SIDE // 4, axis=0).repeat(SIDE // 4, axis=1)).save(buffer, fmt)
    return buffer.getvalue()


def image_rows(numbers):
    """Return rows in which every fifth image is a GIF."""
    cells = [{"bytes": draw(n, "GIF" if n % 5 == 0 else "PNG"), "path": f"{n}"} for n in numbers]
    return pa.table({"key": list(numbers), "image": pa.array(cells, IMAGE_TYPE)})


def write(path, numbers):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(image_rows(numbers), path)


def rows_of(output):
    found = {}
    for path in sorted((Path(output) / "data").iterdir()):
        for row in pq.read_table(path).to_pylist():
            found[row["key"]] = row["image"] and row["image"]["bytes"], row["acsr_reason"]
    return found


def files(output):
    found = (Path(output) / "data").iterdir()
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in found}


def test_nights_and_a_retry(tmp_path, tiny_bundle, ray_local):
    for shard in range(3):
        write(tmp_path / "in" / f"part-{shard}.parquet", range(8 * shard, 8 * shard + 8))
    output = str(tmp_path / "out")
    options = {"input": str(tmp_path / "in"), "output": output, "bundle": str(tiny_bundle), "unit_rows": 4}
    night = RepurifyNightlySettings.model_validate(options)
    first = repurify_nightly(night)
    assert (first["outcome"], first["new"], first["images"], first["quarantined"]) == ("done", 3, 24, 5)

    write(tmp_path / "in/part-3.parquet", range(24, 28))
    write(tmp_path / "in/part-0.parquet", range(100, 108))
    second = repurify_nightly(night)
    told = tuple(second[key] for key in ("outcome", "new", "changed", "removed", "images"))
    assert told == ("done", 1, 1, 0, 12)
    third = repurify_nightly(night)
    assert (third["images"], third["new"], third["changed"]) == (0, 0, 0)

    before, rows = files(output), rows_of(output)
    gifs = {number for number, (_, reason) in rows.items() if reason == "unsupported_format"}
    assert gifs == {10, 15, 20, 25, 100, 105}
    raised = {"decode": {"extra_formats": ["GIF"]}}
    summary = retry(RetrySettings.model_validate({"output": output, "bundle": str(tiny_bundle), **raised}))
    assert summary["retry"]["quarantined before"] == {"unsupported_format": 6}
    assert summary["retry"]["quarantined now"] == {}
    after = files(output)
    assert before.keys() & after.keys()
    assert {name: after[name] for name in before.keys() & after.keys()}.items() <= before.items()
    purify_corpus(
        PurifyCorpusSettings.model_validate({**options, **raised, "output": str(tmp_path / "fresh")})
    )
    assert rows_of(output) == rows_of(tmp_path / "fresh")
    assert repurify_nightly(RepurifyNightlySettings.model_validate({**options, **raised}))["images"] == 0

    assert verify_output(VerifySettings(output=output, input=options["input"]))["clean"]
    found = output_status(StatusSettings(output=output))
    assert (found["images"], found["quarantined"], found["unfinished"]) == (28, {}, {})
    assert look(Ledger(output).storage).released


def shard_bytes(numbers):
    buffer = io.BytesIO()
    pq.write_table(image_rows(numbers), buffer)
    return buffer.getvalue()


def test_three_nights_in_a_store(bucket, tiny_bundle, ray_local):
    """From S3 to S3: all, then what is new, changed and gone, then nothing; then damage that is found."""
    for shard in range(3):
        bucket.put(f"in/part-{shard}.parquet", shard_bytes(range(8 * shard, 8 * shard + 8)))
    where = {"input": "s3://corpus/in", "output": "s3://corpus/out"}
    night = RepurifyNightlySettings.model_validate({**where, "bundle": str(tiny_bundle), "unit_rows": 4})
    told = [repurify_nightly(night)]
    bucket.put("in/part-3.parquet", shard_bytes(range(24, 28)))
    bucket.put("in/part-0.parquet", shard_bytes(range(100, 108)))
    bucket.remove("in/part-2.parquet")
    told += [repurify_nightly(night), repurify_nightly(night)]
    names = ("outcome", "new", "changed", "removed", "images", "quarantined")
    assert [tuple(one[name] for name in names) for one in told] == [
        ("done", 3, 0, 0, 24, 5),
        ("done", 1, 1, 1, 12, 3),
        ("done", 0, 0, 0, 0, 0),
    ]
    expected = [*range(8, 16), *range(24, 28), *range(100, 108)]
    listed = bucket.keys("out/data/")
    rows = [row for key in listed for row in pq.read_table(io.BytesIO(bucket.get(key))).to_pylist()]
    assert sorted(row["key"] for row in rows) == expected
    assert all((row["image"] is None) == (row["key"] % 5 == 0) for row in rows)
    assert verify_output(VerifySettings.model_validate(where))["clean"]

    bucket.put("out/data/part-9.rows-0000000-0000003.deadbeef.parquet", bucket.get(listed[0]))
    damaged = bytearray(bucket.get(listed[1]))
    damaged[len(damaged) // 2] ^= 1
    bucket.put(listed[1], bytes(damaged))
    problems = verify_output(VerifySettings.model_validate(where))["problems"]
    assert {problem["kind"] for problem in problems} == {"orphan", "damaged"}


def test_the_cluster_is_looked_at(ray_local):
    view = view_cluster("auto")
    assert (view.nodes, view.resources["CPU"]) == (1, 2.0)
