"""Records: read as far as they can be read, of this release and of earlier ones."""

import json
import math
import uuid

import pytest

from acsr_ray.corpus.snapshot import Receipt, ShardEntry, Snapshot
from acsr_ray.reporting.record import Bins, RunNotFoundError, list_runs, load_record, read_record
from acsr_ray.storage import open_storage


@pytest.fixture
def storage():
    return open_storage(f"memory://{uuid.uuid4().hex}")


@pytest.fixture
def snapshot():
    receipt = Receipt("a.rows-0-4.x.parquet", 5, {"purified": 4, "quarantined": 1}, {"empty": 1})
    return Snapshot(
        3, {"a": ShardEntry("/in/a.parquet", "5-1", "c", (receipt,), "f")}, {"/in/b.parquet": "bad"}
    )


def put(storage, name, content):
    storage.write(f"_acsr/runs/{name}", json.dumps(content).encode())


def test_a_full_record_is_read_as_it_is(storage, snapshot, purified, record_of):
    written = record_of(purified)
    put(storage, "20260301T020304Z/record.json", written)
    record = load_record(storage, snapshot)
    assert not record.unreadable
    read = record.model_dump(mode="json")
    for name, value in written.items():
        if name != "schema_version":
            assert read[name] == value, name
    assert record.residual.total == written["statuses"]["purified"]


def test_absent_fields_stand_for_nothing_and_totals_come_from_the_snapshot(storage, snapshot):
    put(storage, "1/record.json", {"run": "another name", "later": "field"})
    record = load_record(storage, snapshot)
    assert record.run == "1"
    assert record.outcome == "unknown"
    assert record.images is None
    assert record.corpus.images == 5
    assert record.corpus.quarantined == {"empty": 1}
    assert record.output == storage.root


def test_a_field_of_another_type_is_named_and_left_out(storage, snapshot):
    fields = {
        "images": "many",
        "statuses": {"purified": [1]},
        "residual": {"edges": [0, 1], "counts": [1, 2]},
        "distance": {"edges": [0, 1, 1], "counts": [1, 2]},
        "timeline": [[2, 1], [1, 2]],
        "elapsed_s": math.nan,
        "units": 7,
        "input": "/in",
    }
    record = read_record(fields, storage, snapshot)
    assert set(record.unreadable) == set(fields) - {"units", "input"}
    assert (record.units, record.input) == (7, "/in")
    assert record.images is None


@pytest.mark.parametrize("data", [b"{", b"[1]", b"\xff", b"[" * 100_000])
def test_a_damaged_record_leaves_what_the_snapshot_says(storage, snapshot, data):
    storage.write("_acsr/runs/1/record.json", data)
    record = load_record(storage, snapshot)
    assert record.corpus.images == 5
    assert "record" in record.detail


def test_a_summary_of_an_earlier_release(storage, snapshot):
    put(
        storage,
        "20250101T000000Z.json",
        {
            "bundle_digest": "abc",
            "input": "/in",
            "images": 90,
            "statuses": {"purified": 89, "quarantined": 1},
            "quarantined": {"empty": 1},
            "this run": "30 images in 2 units",
            "images/s": 3.0,
            "refused shards": {"/in/x.parquet": "truncated"},
            "elapsed_s": 10.0,
        },
    )
    record = load_record(storage, snapshot)
    assert (record.run, record.outcome) == ("20250101T000000Z", "done")
    assert (record.images, record.units, record.elapsed_s) == (30, 2, 10.0)
    assert record.corpus.images == 90
    assert record.refused_shards == {"/in/x.parquet": "truncated"}
    assert record.settings == {"bundle_digest": "abc", "input": "/in"}
    assert not record.unreadable


def test_the_last_run_is_taken_and_others_by_name(storage, snapshot):
    for name in ("20260101T000000Z.json", "20260103T000000Z/record.json", "20260102T000000Z/record.json"):
        put(storage, name, {"input": name})
    put(storage, "20260104T000000Z/report.json", {})
    put(storage, "-odd/record.json", {})
    assert list(list_runs(storage)) == ["20260101T000000Z", "20260102T000000Z", "20260103T000000Z"]
    assert load_record(storage, snapshot).run == "20260103T000000Z"
    assert load_record(storage, snapshot, "20260101T000000Z").input == "20260101T000000Z.json"
    for run in ("../../x", "20260104T000000Z", "-odd", ""):
        with pytest.raises(RunNotFoundError):
            load_record(storage, snapshot, run)


def test_an_output_without_runs_is_told_by_its_snapshot(storage, snapshot):
    record = load_record(storage, snapshot)
    assert record.run == "snapshot-00000003"
    assert record.refused_shards == {"/in/b.parquet": "bad"}
    with pytest.raises(RunNotFoundError, match="no purification at"):
        load_record(storage, Snapshot())


def test_quantiles_lie_where_the_counts_are():
    bins = Bins(edges=(0, 1, 3), counts=(1, 3))
    assert bins.quantile(0.25) == 1
    assert bins.quantile(0.625) == 2
    assert bins.quantile(1) == 3
    assert math.isnan(Bins().quantile(0.5))


def test_credentials_are_hidden(storage, snapshot):
    settings = {
        "s3": {"secret_key": "S3CR", "access_key": "S3CR", "endpoint": "http://user:S3CR@host:9000/x"},
        "auth_token": "S3CR",
        "api_key": None,
        "uris": ["s3://id:S3CR@bucket/x", "s3://bucket/me@home"],
        "image_column": "image",
    }
    fields = {
        "settings": settings,
        "input": "s3://id:S3CR@bucket/x",
        "detail": "cannot read s3://id:S3CR@bucket/x",
    }
    record = read_record(fields, storage, snapshot)
    assert "S3CR" not in record.model_dump_json()
    assert record.settings["s3"]["endpoint"] == "http://host:9000/x"
    assert record.settings["uris"][1] == "s3://bucket/me@home"
    assert record.settings["image_column"] == "image"
    assert record.settings["api_key"] is None
    assert record.input == "s3://bucket/x"
