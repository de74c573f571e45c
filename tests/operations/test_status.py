"""Status: what is there, who works on it, how runs ended, and what is left, on disks and in stores."""

import json
from pathlib import Path

import pytest

from acsr_ray.cli import run_job
from acsr_ray.config import FailedError
from acsr_ray.corpus import lease as leases
from acsr_ray.corpus.lease import Lease
from acsr_ray.corpus.ledger import Ledger
from acsr_ray.corpus.records import failed_units, run_records
from acsr_ray.corpus.sources import CorpusError
from acsr_ray.distributed.purify import purify_corpus
from acsr_ray.distributed.purify_settings import PurifyCorpusSettings
from acsr_ray.operations.status import StatusSettings, output_status, told_status
from acsr_ray.storage import open_storage


def purify(options, **changes):
    return purify_corpus(PurifyCorpusSettings.model_validate({**options, **changes}))


def status(options):
    return output_status(StatusSettings(output=options["output"]))


def test_a_finished_output(options, stage):
    stage.refuses = lambda data, settings: "decode_error" if data == b"image 5" else None
    purify(options)
    found = status(options)
    assert (found["images"], found["units"], found["shards"]) == (30, 9, 3)
    assert found["statuses"] == {"purified": 29, "quarantined": 1}
    assert found["quarantined"] == {"decode_error": 1}
    assert found["unfinished"] == {}
    assert found["under_way"] is False
    assert found["lease"]["released"] is True
    (record,) = found["runs"]
    assert (record["outcome"], record["failed_units"]) == ("done", 0)
    told = told_status(found)
    assert "images       30 in 9 units of 3 shards" in told
    assert "unfinished   nothing" in told
    assert "none under way" in told
    json.dumps(found)


def test_a_run_under_way_is_told_with_its_beat(options, stage, monkeypatch):
    purify(options)
    ledger = Ledger(options["output"])
    progress = {"images_done": 3, "images_planned": 30, "images_per_s": 1.5, "eta_s": 18.0}
    ledger.storage.write("_acsr/progress.json", json.dumps(progress).encode())
    assert status(options)["progress"] is None
    with Lease(ledger.storage) as lease:
        found = status(options)
        assert found["under_way"] is True
        assert found["progress"] == progress
        assert 0 <= found["lease"]["beat_age_s"] < 20
        assert "3 of 30 images, 1.5/s, 18.0 s left" in told_status(found)
        # Somebody whose beat is old, or whose process is no more, is not under way.
        monkeypatch.setattr(leases, "STALE_S", -1.0)
        assert status(options)["under_way"] is False
        monkeypatch.undo()
        ledger.storage.remove(f"_acsr/lease/{lease.number:08d}.beat")
        assert status(options)["under_way"] is False


def test_what_is_left_to_do(options, source, stage):
    (source / "part-2.parquet").write_bytes(b"garbage")
    stage.fails = lambda unit: "given_up" if (unit.relative, unit.first) == ("part-1", 4) else None
    with pytest.raises(FailedError):
        purify(options)
    output = Path(options["output"])
    (output / "data/part-9.rows-0000000-0000003.deadbeef.parquet").write_bytes(b"")
    next((output / "data").glob("part-0*")).unlink()
    found = status(options)["unfinished"]
    assert found["incomplete_shards"] == ["part-1"]
    # A unit that failed was begun, and is named below.
    assert "images_not_begun" not in found
    assert [uri.rsplit("/", 1)[-1] for uri in found["refused_shards"]] == ["part-2.parquet"]
    assert list(found["failed_units"].values()) == ["as told"]
    assert found["unlisted_units"] == 1
    assert len(found["missing_units"]) == 1
    assert "unfinished   failed units: 1 (part-1.rows-0000004" in told_status(status(options))


def test_what_a_stopped_run_had_not_begun_is_told(options, stage):
    purify(options)
    path = Path(options["output"]) / "_acsr/progress.json"
    progress = json.loads(path.read_text())
    assert (progress["outcome"], status(options)["unfinished"]) == ("done", {})
    path.write_text(
        json.dumps(progress | {"outcome": "stopped", "images_expected": 1800, "images_done": 200})
    )
    assert status(options)["unfinished"] == {"images_not_begun": 1600}
    assert "unfinished   images not begun: 1600" in told_status(status(options))


def test_what_failed_is_told_with_what_was_done(options, stage, capsys):
    stage.fails = lambda unit: "given_up" if (unit.relative, unit.first) == ("part-1", 4) else None
    flags = ["--input", options["input"], "--output", options["output"], "--bundle", options["bundle"]]
    with pytest.raises(SystemExit) as exit_info:
        run_job("purify_corpus", [*flags, "--unit-rows", "4", "--json"])
    told = json.loads(capsys.readouterr().out)
    assert (exit_info.value.code, told["exit_code"], told["images"]) == (1, 1, 26)
    assert told["error"].startswith("1 units failed")
    assert list(told["failed units"].values()) == ["as told"]
    assert Path(told["report"]).exists()


def test_a_failed_unit_that_was_done_since_is_left_to_nobody(options, stage):
    stage.fails = lambda unit: "given_up" if unit.first == 8 else None
    with pytest.raises(FailedError):
        purify(options)
    stage.fails = lambda unit: None
    purify(options)
    assert status(options)["unfinished"] == {}
    assert len(status(options)["runs"]) >= 1


def test_records_of_all_releases_are_read(tmp_path):
    storage = open_storage(str(tmp_path))
    old = {"images": 3, "failed units": {"a.rows": "why"}, "elapsed_s": 1.0}
    new = {"run": "20260103T000000Z", "outcome": "stopped", "failed_units": {"b.rows": "how"}}
    storage.write("_acsr/runs/20260101T000000Z.json", json.dumps(old).encode())
    storage.write("_acsr/runs/20260102T000000Z.json", b"{broken")
    storage.write("_acsr/runs/20260103T000000Z/record.json", json.dumps(new).encode())
    storage.write("_acsr/runs/20260103T000000Z/report.json", b"{}")
    found = list(run_records(storage, 10))
    assert [(record["run"], record["outcome"]) for record in found] == [
        ("20260103T000000Z", "stopped"),
        ("20260101T000000Z", "failed"),
    ]
    assert failed_units(storage) == {"a.rows": "why", "b.rows": "how"}
    assert list(run_records(storage, 1)) == found[:1]


def test_all_failed_units_are_counted_where_a_record_names_the_first(options, stage):
    purify(options)
    record = {"outcome": "failed", "failed_units": {"a.rows": "how"}, "failed_units_total": 1200}
    name = "_acsr/runs/99990101T000000Z/record.json"
    Ledger(options["output"]).storage.write(name, json.dumps(record).encode())
    assert status(options)["runs"][0]["failed_units"] == 1200


def test_an_output_in_a_store(bucket, stage, numbers_shard, tiny_bundle, capsys):
    bucket.put("in/part-0.parquet", numbers_shard(range(6)))
    options = {"input": "s3://corpus/in", "output": "s3://corpus/out", "bundle": str(tiny_bundle)}
    purify(options)
    with Lease(Ledger("s3://corpus/out").storage):
        assert status(options)["under_way"] is True
    run_job("status", ["--output", "s3://corpus/out", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert (found["images"], found["under_way"], found["unfinished"]) == (6, False, {})


def test_there_must_be_a_purification(tmp_path):
    with pytest.raises(CorpusError, match="no purification at"):
        output_status(StatusSettings(output=str(tmp_path / "none")))
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("content", [b'{"input": ', b"[1]", b"\xff"])
def test_damaged_settings_are_told_with_a_way_out(options, stage, capsys, content):
    purify(options)
    path = Path(options["output"]) / "_acsr/run.json"
    path.write_bytes(content)
    for verb in ("status", "repurify_nightly"):
        with pytest.raises(SystemExit) as exit_info:
            run_job(verb, ["--output", options["output"]])
        told = capsys.readouterr().err.splitlines()[-1]
        assert exit_info.value.code == 2
        assert told.startswith(f"error: {path} is damaged")
        assert "put a copy of it back" in told


def test_the_settings_file_of_the_job_names_the_output(options, stage, tmp_path, capsys):
    purify(options)
    path = tmp_path / "night.yaml"
    path.write_text(f"purify_corpus:\n  output: {options['output']}\n  unit_rows: 4\n")
    run_job("status", ["--config", str(path)])
    assert "images       30 in" in capsys.readouterr().out
