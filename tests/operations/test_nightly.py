"""Nights on a growing corpus: what is new is done, what is gone told; a vanished input costs nothing."""

import json
import os
from pathlib import Path

import pytest
from s3fs import S3FileSystem

from acsr_ray.cli import run_job
from acsr_ray.config import ResumableStop
from acsr_ray.corpus.binding import write_json
from acsr_ray.corpus.images import DecodeLimits
from acsr_ray.corpus.ledger import Ledger
from acsr_ray.corpus.snapshot import Receipt, ShardEntry, Snapshot
from acsr_ray.corpus.stopping import StopRequested
from acsr_ray.distributed.standing import completed
from acsr_ray.operations.nightly import RepurifyNightlySettings, compare, repurify_nightly
from acsr_ray.operations.verify import VerifySettings, verify_output
from acsr_ray.storage import StorageError


def spend(options, **changes):
    return repurify_nightly(RepurifyNightlySettings.model_validate({"pause_s": 0.0, **options, **changes}))


KINDS = ("new", "changed", "removed")


def counts(summary):
    return {key: summary[key] for key in ("outcome", "new", "changed", "removed", "images", "quarantined")}


def test_three_nights_on_a_growing_corpus_in_s3(bucket, stage, numbers_shard, tiny_bundle, visible, capsys):
    stage.refuses = lambda data, settings: "decode_error" if data == b"image 5" else None
    for shard in range(3):
        bucket.put(f"in/part-{shard}.parquet", numbers_shard(range(10 * shard, 10 * shard + 10)))
    where = {"output": "s3://corpus/out"}
    first = {"input": "s3://corpus/in", "bundle": str(tiny_bundle), "unit_rows": 4, **where}
    assert counts(spend(first)) == {
        "outcome": "done",
        "new": 3,
        "changed": 0,
        "removed": 0,
        "images": 30,
        "quarantined": 1,
    }
    assert len(stage.units) == 9

    bucket.put("in/part-3.parquet", numbers_shard(range(30, 36)))
    bucket.put("in/part-1.parquet", numbers_shard(range(100, 107)))
    bucket.remove("in/part-2.parquet")
    stage.units.clear()
    second = spend(first)
    assert counts(second) == {
        "outcome": "done",
        "new": 1,
        "changed": 1,
        "removed": 1,
        "images": 13,
        "quarantined": 0,
    }
    assert [second[f"{kind}_shards"] for kind in KINDS] == [["part-3"], ["part-1"], ["part-2"]]
    assert {name for name, _ in stage.done} == {"part-1", "part-3"}
    expected = [*range(10), *range(30, 36), *range(100, 107)]
    assert sorted(visible("s3://corpus/out")) == expected

    stage.units.clear()
    third = spend(first)
    assert third["outcome"] == "done"
    assert not any(third[key] for key in ("new", "changed", "removed", "images", "quarantined"))
    assert not stage.units
    assert third["corpus"]["images"] == len(expected)

    found = verify_output(VerifySettings(input="s3://corpus/in", **where))
    assert (found["clean"], found["images"], found["problems"]) == (True, len(expected), [])
    listed = bucket.keys("out/data/")
    bucket.put("out/data/part-9.rows-0000000-0000003.deadbeef.parquet", bucket.get(listed[0]))
    damaged = bytearray(bucket.get(listed[1]))
    damaged[len(damaged) // 2] ^= 1
    bucket.put(listed[1], bytes(damaged))
    found = verify_output(VerifySettings(**where))
    told = {(problem["kind"], problem["name"]) for problem in found["problems"]}
    orphan = "data/part-9.rows-0000000-0000003.deadbeef.parquet"
    assert told == {("orphan", orphan), ("damaged", listed[1].removeprefix("out/"))}
    assert found["exit_code"] == 1
    with pytest.raises(SystemExit) as exit_info:
        run_job("verify", ["--output", "s3://corpus/out", "--json"])
    assert exit_info.value.code == 1
    assert len(json.loads(capsys.readouterr().out)["problems"]) == 2


def test_the_second_night_needs_but_the_output(options, source, stage, write_numbers, monkeypatch, capsys):
    spend(options, keep_original=True)
    write_numbers(source / "part-3.parquet", range(30, 33))
    stage.units.clear()
    # The bundle is no packaged one, and only a run's record knows where it is.
    record = {"run": "20260101T000000Z-000001", "bundle": options["bundle"]}
    storage = Ledger(options["output"]).storage
    write_json(storage, f"_acsr/runs/{record['run']}/record.json", record)
    run_job("repurify_nightly", ["--output", options["output"]])
    assert stage.done == [("part-3", 0)]
    out = capsys.readouterr().out
    assert out.startswith("acsr_ray nightly outcome=done new=1 changed=0 removed=0 refused=0 images=3 ")
    assert len(out.splitlines()) == 1


def test_an_input_that_vanished_empties_nothing(options, source, stage, visible, tmp_path, capsys):
    spend(options)
    before = visible(options["output"])
    source.rename(tmp_path / "elsewhere")
    gone = spend(options)
    assert (gone["outcome"], gone["exit_code"]) == ("failed", 1)
    assert "the input is gone" in gone["error"]
    source.mkdir()
    (source / "README.md").write_text("soon")
    assert spend(options)["exit_code"] == 1
    assert visible(options["output"]) == before
    (tmp_path / "elsewhere" / "part-0.parquet").rename(source / "part-0.parquet")
    told = spend(options)
    assert told["exit_code"] == 1
    assert "2 of 3 shards" in told["error"]
    assert "part-1, part-2" in told["error"]
    assert visible(options["output"]) == before
    with pytest.raises(SystemExit) as exit_info:
        run_job("repurify_nightly", ["--output", options["output"], "--bundle", options["bundle"]])
    assert exit_info.value.code == 1
    captured = capsys.readouterr()
    assert captured.out.startswith("acsr_ray nightly outcome=failed new=0 changed=0 removed=0 ")
    assert "detail=" in captured.out
    assert "error: 2 of 3 shards" in captured.err
    meant = spend(options, max_removed_share=1.0)
    assert (meant["outcome"], meant["removed"]) == ("done", 2)
    assert sorted(visible(options["output"])) == list(range(10))


def test_shards_that_were_emptied_count_as_gone(options, source, stage, write_numbers, visible):
    spend(options)
    for shard in (1, 2):
        write_numbers(source / f"part-{shard}.parquet", range(0))
    told = spend(options)
    assert (told["exit_code"], told["outcome"]) == (1, "failed")
    assert len(visible(options["output"])) == 30
    assert spend(options, max_removed_share=1.0)["outcome"] == "done"
    assert sorted(visible(options["output"])) == list(range(10))


def test_images_that_left_a_folder_count_as_gone(options, stage, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(10):
        (folder / f"{number}.png").write_bytes(b"image %d" % number)
    options["input"] = str(folder)
    spend(options)
    for number in range(4, 10):
        (folder / f"{number}.png").unlink()
    told = spend(options)
    assert "6 of 10 images" in told["error"]
    assert len(Ledger(options["output"]).published()) == 3


def test_a_stop_is_resumed_within_the_job(options, stage, visible):
    stops = iter([StorageError("busy"), ResumableStop("a node is leaving")])

    def stop(unit):
        if unit.relative == "part-1" and (error := next(stops, None)):
            raise error

    stage.before_unit = stop
    night = spend(options)
    assert (night["outcome"], night["attempts"], night["new"]) == ("done", 3, 3)
    assert sorted(visible(options["output"])) == list(range(30))
    # Nothing is done twice: what a stop left behind is taken.
    begun = [key for key in stage.done if key[0] == "part-0"]
    assert begun == [("part-0", 0), ("part-0", 4), ("part-0", 8)]


@pytest.mark.parametrize(
    ("error", "attempts"), [(StorageError("busy"), 2), (StopRequested("stopped on request"), 1)]
)
def test_a_stop_that_stays_ends_with_75(options, stage, error, attempts):
    def stop(unit):
        raise error

    stage.before_unit = stop
    night = spend(options, attempts=2)
    assert (night["outcome"], night["exit_code"], night["attempts"]) == ("stopped", 75, attempts)


def test_what_fails_for_good_fails_the_night_once(options, stage, visible):
    stage.fails = lambda unit: "given_up" if (unit.relative, unit.first) == ("part-1", 4) else None
    night = spend(options)
    assert (night["outcome"], night["exit_code"], night["attempts"]) == ("failed", 1, 1)
    assert "1 units failed" in night["error"]
    assert night["images"] == 26


def test_a_shard_that_cannot_be_read_is_told_and_fails_only_when_asked_to(options, source, stage):
    spend(options)
    (source / "part-1.parquet").write_bytes(b"garbage")
    night = spend(options)
    assert (night["outcome"], night["refused"], "exit_code" in night) == ("done", 1, False)
    ((uri, why),) = night["refused_first"].items()
    assert uri.endswith("part-1.parquet")
    assert why.startswith("not_parquet")
    assert spend(options, strict=True)["exit_code"] == 1
    for shard in (0, 2):
        (source / f"part-{shard}.parquet").write_bytes(b"garbage")
    assert "no shard of the input can be read" in spend(options)["error"]


def test_settings_that_cannot_work_end_with_2_and_a_line(options, stage, capsys):
    spend(options)
    refused = spend(options, keep_original=True)
    assert (refused["outcome"], refused["exit_code"]) == ("refused", 2)
    with pytest.raises(SystemExit) as exit_info:
        run_job("repurify_nightly", ["--output", options["output"] + "-none"])
    assert exit_info.value.code == 2
    assert capsys.readouterr().out.startswith("acsr_ray nightly outcome=refused ")


def line_of(capsys, *flags):
    """Run the job as a scheduler does; return its exit code, and the fields of its one line."""
    with pytest.raises(SystemExit) as exit_info:
        run_job("repurify_nightly", list(flags))
    (line,) = capsys.readouterr().out.splitlines()
    words = line.split(" ", 11)
    assert words[:2] == ["acsr_ray", "nightly"]
    return exit_info.value.code, dict(word.split("=", 1) for word in words[2:])


@pytest.fixture
def dead_store(monkeypatch):
    """A store at which nobody listens."""
    monkeypatch.setenv("ACSR_STORAGE_DEADLINE_S", "0.1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    S3FileSystem.clear_instance_cache()
    yield
    S3FileSystem.clear_instance_cache()


def test_a_store_that_is_down_has_its_line_and_its_attempts(dead_store, stage, capsys):
    where = ["--output", "s3://corpus/out", "--input", "s3://corpus/in"]
    code, told = line_of(capsys, *where, "--attempts", "2", "--pause-s", "0")
    assert (code, told["outcome"], told["attempts"], told["images"]) == (75, "stopped", "2", "0")
    assert "s3://corpus/out" in json.loads(told["detail"])
    assert not stage.units


def test_a_store_that_comes_back_is_asked_for_the_settings_then(
    bucket, stage, numbers_shard, tiny_bundle, monkeypatch
):
    bucket.put("in/part-0.parquet", numbers_shard(range(6)))
    first = {"input": "s3://corpus/in", "bundle": str(tiny_bundle), "unit_rows": 4}
    spend({"output": "s3://corpus/out", **first})
    bucket.put("in/part-1.parquet", numbers_shard(range(6, 12)))
    up = os.environ["AWS_ENDPOINT_URL"]
    monkeypatch.setenv("ACSR_STORAGE_DEADLINE_S", "0.1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    S3FileSystem.clear_instance_cache()

    def repaired(seconds, stop, error):
        monkeypatch.setenv("AWS_ENDPOINT_URL", up)
        S3FileSystem.clear_instance_cache()
        return True

    monkeypatch.setattr("acsr_ray.operations.nightly._pause", repaired)
    stage.units.clear()
    night = spend({"output": "s3://corpus/out"}, bundle=str(tiny_bundle))
    assert (night["outcome"], night["attempts"], night["new"]) == ("done", 2, 1)
    # By the output's own unit size.
    assert stage.done == [("part-1", 0), ("part-1", 4)]


def test_what_nobody_foresaw_has_its_line_too(options, stage, capsys):
    def broken(unit):
        raise ZeroDivisionError("division by\nzero")

    stage.before_unit = broken
    flags = ["--output", options["output"], "--input", options["input"], "--bundle", options["bundle"]]
    flags += ["--unit-rows", "4"]
    code, told = line_of(capsys, *flags)
    assert (code, told["outcome"], told["attempts"]) == (1, "failed", "1")
    assert json.loads(told["detail"]) == "ZeroDivisionError: division by"
    stage.before_unit = lambda unit: None
    spend(options)
    snapshot = max(Path(options["output"]).glob("_acsr/snapshots/*.json"))
    snapshot.write_bytes(b"{broken")
    assert line_of(capsys, *flags)[1]["outcome"] == "failed"


def test_what_is_given_is_laid_over_the_outputs_own_at_every_depth(options, stage):
    spend(options, decode=DecodeLimits(max_side=500, max_frames=3))
    night = RepurifyNightlySettings.model_validate(
        {"output": options["output"], "decode": {"max_side": 400}, "unit_rows": 5}
    )
    merged = completed(night)
    assert (merged.decode.max_side, merged.decode.max_frames) == (400, 3)
    assert (merged.unit_rows, merged.input) == (5, options["input"])


def test_settings_of_another_release_are_told(options, stage):
    spend(options)
    storage = Ledger(options["output"]).storage
    write_json(storage, "_acsr/run.json", {"unit_rows": "many"})
    night = spend({"output": options["output"]})
    assert (night["outcome"], night["exit_code"]) == ("refused", 2)
    assert "unit_rows" in night["error"]


def test_all_shards_that_went_are_named_and_have_a_page(
    options, source, stage, write_numbers, caplog, tmp_path
):
    for shard in range(3, 30):
        write_numbers(source / f"part-{shard:02}.parquet", range(10 * shard, 10 * shard + 2))
    with caplog.at_level("INFO"):
        assert len(spend(options)["new_shards"]) == 30
    assert "30 shards new: part-0, part-03, " in caplog.text
    for shard in range(3, 30):
        (source / f"part-{shard:02}.parquet").unlink()
    gone = [f"part-{shard:02}" for shard in range(3, 30)]
    caplog.clear()
    with caplog.at_level("INFO"):
        night = spend(options, max_removed_share=1.0)
    assert (night["removed_shards"], night["removed_shards_total"]) == (gone, 27)
    record_file = max(Path(options["output"]).glob("_acsr/runs/*/record.json"))
    record = json.loads(record_file.read_text())
    assert (record["images"], record["removed_shards"], record["removed_shards_total"]) == (0, gone, 27)
    line = next(one for one in caplog.messages if one.startswith("27 shards removed: part-03, "))
    assert "part-22 (the first 20; " in line
    assert f"in {record_file})" in line
    page = record_file.with_name("report.html").read_text()
    assert "27 shards left the input" in page
    assert all(name in page for name in gone)
    # Nothing to tell, nothing to show.
    spend(options)
    assert not max(Path(options["output"]).glob("_acsr/runs/*/record.json")).with_name("report.html").exists()


def test_a_shard_that_lost_rows_is_a_changed_one(options, source, stage, write_numbers):
    spend(options)
    write_numbers(source / "part-1.parquet", range(10, 18))
    write_numbers(source / "part-2.parquet", range(0))
    assert spend(options)["changed_shards"] == ["part-1", "part-2"]


def test_a_night_counts_what_its_snapshots_differ_in():
    def entry(*names):
        receipts = tuple(Receipt(name, 4, {"purified": 3, "quarantined": 1}, {"empty": 1}) for name in names)
        return ShardEntry("uri", "v", "c", receipts, "f")

    before = Snapshot(1, {"a": entry("a1", "a2"), "b": entry("b1"), "c": entry("c1"), "e": entry("e1")})
    # `e` was only touched: another version, the same files.
    after = Snapshot(2, {"a": entry("a1", "a3"), "b": entry("b1"), "d": entry("d1"), "e": entry("e1")})
    assert compare(before, after) == {
        "new": 1,
        "changed": 1,
        "removed": 1,
        **{"new_shards": ["d"], "new_shards_total": 1},
        **{"changed_shards": ["a"], "changed_shards_total": 1},
        **{"removed_shards": ["c"], "removed_shards_total": 1},
        "images": 8,
        "quarantined": 2,
        "reasons": {"empty": 2},
    }
