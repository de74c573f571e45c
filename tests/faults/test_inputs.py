"""Rows 19, 20, 22, 23, 27 and 28: input that is damaged, changes or vanishes, and settings that change."""

import json
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from acsr_ray.artifacts import ArtifactError
from acsr_ray.corpus.ledger import Ledger
from acsr_ray.corpus.sources import CorpusError

pytestmark = pytest.mark.ray

SHARDS, ROWS = 6, 10


@pytest.fixture
def source(make_corpus, tmp_path):
    return make_corpus(tmp_path / "in", SHARDS, ROWS)


def keys(output):
    found = []
    for path in sorted((output / "data").rglob("*.parquet")):
        found += pq.read_table(path, columns=["image_id"])["image_id"].to_pylist()
    return found


def numbered(*shards):
    return [f"id-{number}" for shard in shards for number in range(shard * ROWS, (shard + 1) * ROWS)]


def test_shards_that_cannot_be_read_are_left_out_and_the_others_finish(
    source, purify, tmp_path, ray_local, make_table
):
    """Rows 19 and 20: truncated, garbage, without the column, of another type; an empty one is no fault."""
    output = tmp_path / "out"
    whole = (source / "part-01.parquet").read_bytes()
    (source / "part-01.parquet").write_bytes(whole[: len(whole) // 2])
    (source / "part-02.parquet").write_bytes(b"these are no columns")
    pq.write_table(make_table(range(30, 40)).drop_columns("image"), source / "part-03.parquet")
    pq.write_table(make_table(range(0)), source / "part-04.parquet")
    with_numbers = make_table(range(50, 60)).set_column(1, "image", pa.array(range(10)))
    pq.write_table(with_numbers, source / "part-05.parquet")
    summary = purify(source, output)
    assert keys(output) == numbered(0)
    codes = {uri.rsplit("/", 1)[1]: told.split(":")[0] for uri, told in summary["refused shards"].items()}
    assert codes == {
        "part-01.parquet": "truncated",
        "part-02.parquet": "not_parquet",
        "part-03.parquet": "no_image_column",
        "part-05.parquet": "wrong_type",
    }
    # Mended, it is done the next time; the others are told again.
    (source / "part-01.parquet").write_bytes(whole)
    summary = purify(source, output)
    assert keys(output) == numbered(0, 1)
    assert len(summary["refused shards"]) == 3


def test_nothing_readable_at_all_is_an_error(tmp_path, purify):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.parquet").write_bytes(b"nothing")
    with pytest.raises(CorpusError, match="no shard can be read"):
        purify(folder, tmp_path / "out")


@pytest.mark.slow
def test_a_damaged_page_costs_its_unit_alone(source, purify, tmp_path, ray_local, make_table):
    """Row 20: the footer is fine, the images' pages are not."""
    path = source / "part-02.parquet"
    pq.write_table(make_table(range(20, 30)), path, row_group_size=5, write_page_checksum=True)
    data = bytearray(path.read_bytes())
    with pq.ParquetFile(path) as file:
        place = file.metadata.row_group(1).column(1).data_page_offset + 200
    data[place : place + 50] = bytes(50)
    path.write_bytes(data)
    summary = purify(source, tmp_path / "out", unit_rows=5)
    assert set(keys(tmp_path / "out")) == set(numbered(0, 1, 3, 4, 5)) | {f"id-{n}" for n in range(20, 25)}
    ((uri, told),) = summary["refused shards"].items()
    assert uri.endswith("part-02.parquet")
    assert "unreadable" in told or "ReadUnits" in told


@pytest.mark.slow
def test_shards_that_change_or_vanish_while_the_job_runs(start_purify, source, tmp_path, make_table):
    """Row 20: what changed is planned anew, what vanished is left out, nothing is mixed."""
    output = tmp_path / "out"
    job = start_purify(source, output, faults={"slow": {"ReadUnits": 0.3}})
    job.until(lambda: len(Ledger(str(output)).published()) >= 2)
    time.sleep(0.01)
    pq.write_table(make_table(range(1000, 1000 + ROWS)), source / "part-04.parquet")
    (source / "part-05.parquet").unlink()
    assert job.wait() == 0, job.told()
    changed = [f"id-{number}" for number in range(1000, 1000 + ROWS)]
    assert keys(output) == numbered(0, 1, 2, 3) + changed
    assert "vanished" in job.told()


@pytest.mark.slow
def test_one_night_after_another(source, purify, tmp_path, ray_local, make_table):
    """Row 28 and the increments: nothing new, a touched shard, a changed, a new one, one that is gone."""
    output = tmp_path / "out"
    purify(source, output)
    stamps = {path.name: path.stat().st_mtime_ns for path in (output / "data").iterdir()}

    def night(**changes):
        summary = purify(source, output, **changes)
        return summary["this run"]

    assert "nothing to do" in night()
    touched = source / "part-00.parquet"
    touched.write_bytes(touched.read_bytes())
    assert "nothing to do" in night()
    assert {path.name: path.stat().st_mtime_ns for path in (output / "data").iterdir()} == stamps
    pq.write_table(make_table(range(100, 110)), source / "part-01.parquet")
    assert night() == "10 images in 1 units"
    pq.write_table(make_table(range(200, 210)), source / "part-09.parquet")
    assert night() == "10 images in 1 units"
    (source / "part-02.parquet").unlink()
    assert "nothing to do" in night()
    expected = numbered(0) + [f"id-{n}" for n in range(100, 110)] + numbered(3, 4, 5)
    assert keys(output) == expected + [f"id-{n}" for n in range(200, 210)]
    assert Ledger(str(output)).snapshot().names() == Ledger(str(output)).published()


@pytest.mark.slow
def test_another_bundle_is_an_error_with_a_diff_and_anew_replaces_all(
    source, purify, tmp_path, ray_local, make_bundle
):
    """Row 27; a cluster's size and a release are no change."""
    from acsr_ray.sparse.cbpdn import CbpdnConfig

    output = tmp_path / "out"
    purify(source, output)
    before = {path.name for path in (output / "data").iterdir()}
    other = make_bundle(tmp_path / "other", cbpdn=CbpdnConfig(iterations=10, lmbda=0.3))
    with pytest.raises(CorpusError) as error_info:
        purify(source, output, bundle=str(other))
    assert "bundle: bundle.cbpdn.lmbda: " in str(error_info.value)
    assert "-> 0.3" in str(error_info.value)
    assert "nothing to do" in purify(source, output, batch_size=3, ray={"actors": 2})["this run"]
    assert {path.name for path in (output / "data").iterdir()} == before
    assert purify(source, output, bundle=str(other), anew=True)["this run"] == "60 images in 6 units"
    after = {path.name for path in (output / "data").iterdir()}
    assert len(after) == len(before)
    assert after.isdisjoint(before)
    assert keys(output) == numbered(*range(SHARDS))
    assert "nothing to do" in purify(source, output, bundle=str(other))["this run"]


def test_a_tampered_bundle_ends_the_job_before_anything_is_written(source, purify, tmp_path, make_bundle):
    """Row 25, from the job's side."""
    bundle = make_bundle(tmp_path / "bundle")
    data = bytearray((bundle / "dictionaries.safetensors").read_bytes())
    data[-1] ^= 1
    (bundle / "dictionaries.safetensors").write_bytes(data)
    with pytest.raises(ArtifactError, match="was changed"):
        purify(source, tmp_path / "out", bundle=str(bundle))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_keys_are_only_data(purify, tmp_path, ray_local, make_table):
    """Row 22: duplicate keys, paths, NULs and 10 KB in the id column change no path and lose no row."""
    odd = ["same", "same", "../../etc/passwd", "nul\0", "a/b", "é\u0301", "x" * 10_000, "", "-rf", "ok"]
    table = make_table(range(10)).set_column(0, "image_id", pa.array(odd))
    folder = tmp_path / "in"
    folder.mkdir()
    pq.write_table(table, folder / "a.parquet")
    pq.write_table(table, folder / "b.parquet")
    purify(folder, tmp_path / "out")
    assert keys(tmp_path / "out") == odd * 2
    names = [path.name for path in (tmp_path / "out" / "data").iterdir()]
    assert sorted(name.split(".")[0] for name in names) == ["a", "b"]


@pytest.mark.slow
def test_what_the_solver_fails_on_is_passed_only_when_asked_for(start_purify, make_corpus, tmp_path):
    """Row 23: the low band by default; the image itself, byte for byte, as an explicit choice."""
    source = make_corpus(tmp_path / "in", 1, 8)
    before = pq.read_table(source / "part-00.parquet").to_pylist()
    job = start_purify(source, tmp_path / "out", faults={"fallback": [3]}, on_failure="pass_through")
    assert job.wait() == 0, job.told()
    rows = []
    for path in sorted((tmp_path / "out" / "data").iterdir()):
        rows += pq.read_table(path).to_pylist()
    statuses = ["passed_through" if number == 3 else "purified" for number in range(8)]
    assert [row["acsr_status"] for row in rows] == statuses
    assert rows[3]["image"]["bytes"] == before[3]["image"]["bytes"]
    assert rows[3]["acsr_reason"] == "solver_fallback"
    assert rows[4]["image"]["bytes"] != before[4]["image"]["bytes"]
    run = json.loads((tmp_path / "out/_acsr/run.json").read_text())
    assert run["on_failure"] == "pass_through"


def test_a_full_disk_stops_before_anything_is_begun(source, purify, tmp_path):
    """Row 10: the alarm comes early, and the stop is one that can be resumed."""
    import shutil

    from acsr_ray.storage import StorageError

    free = shutil.disk_usage(tmp_path).free // 2**20
    with pytest.raises(StorageError, match="are left for") as error_info:
        purify(source, tmp_path / "out", min_free_megabytes=10 * free)
    assert error_info.value.exit_code == 75
    assert not (tmp_path / "out" / "data").exists()
