"""Verify: each kind of damage is found and named, an output without any is clean, orphans can be swept."""

import io
import json
import os
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from acsr_ray.cli import run_job
from acsr_ray.columns import STATUS
from acsr_ray.config import ResumableStop
from acsr_ray.corpus.lease import Lease, LeaseError
from acsr_ray.corpus.ledger import Ledger
from acsr_ray.corpus.sources import CorpusError
from acsr_ray.distributed.purify import purify_corpus
from acsr_ray.distributed.purify_settings import PurifyCorpusSettings
from acsr_ray.operations import verify as verifying
from acsr_ray.operations.retry import RetrySettings, retry
from acsr_ray.operations.verify import VerifySettings, verify_output

ORPHAN = "part-1.rows-0000000-0000003.deadbeef.parquet"


@pytest.fixture
def options(options, stage):
    """An output with a row of ten quarantined."""
    stage.refuses = lambda data, settings: "decode_error" if data.endswith(b"5") else None
    purify_corpus(PurifyCorpusSettings.model_validate(options))
    return options


def verify(options, **changes):
    return verify_output(VerifySettings.model_validate({"output": options["output"], **changes}))


def kinds(found):
    return sorted((problem["kind"], problem["name"].split(".rows-")[0]) for problem in found["problems"])


def unit(options, start="part-0.rows-0000004"):
    return next((Path(options["output"]) / "data").glob(f"{start}*"))


def rewrite(options, change: Callable[[pa.Table], pa.Table], folder="data", start="part-0.rows-0000004"):
    """Change a file, and the snapshot's digest of it, as an error of ours would."""
    ledger = Ledger(options["output"])
    path = next((Path(options["output"]) / folder).glob(f"{start}*"))
    path.write_bytes(to_bytes(change(pq.read_table(path))))
    forget_digest(ledger, path.name)


def to_bytes(table):
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return buffer.getvalue()


def forget_digest(ledger, name, **changes):
    """Commit a snapshot that knows no digest of a file, nor of what was kept beside it."""
    snapshot = ledger.snapshot()
    shards = {
        relative: replace(
            entry,
            receipts=tuple(
                replace(receipt, digest="", kept_digest="", **changes) if receipt.name == name else receipt
                for receipt in entry.receipts
            ),
        )
        for relative, entry in snapshot.shards.items()
    }
    ledger.commit(replace(snapshot, number=snapshot.number + 1, shards=shards))


def test_what_is_as_it_should_be_is_clean(options, capsys):
    for threads in (1, 8):
        found = verify(options, input=options["input"], threads=threads)
        assert (found["clean"], found["images"], found["files"]) == (True, 30, 9)
        assert found["statuses"] == {"purified": 27, "quarantined": 3}
        assert "exit_code" not in found
    run_job("verify", ["--output", options["output"]])
    assert capsys.readouterr().out.splitlines()[-1] == "clean"


def test_a_flipped_byte_and_an_orphan_are_found(options, capsys):
    path = unit(options)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    (path.parent / ORPHAN).write_bytes(path.read_bytes())
    (path.parent / "notes.txt").write_text("mine")
    found = verify(options)
    assert kinds(found) == [
        ("damaged", "data/part-0"),
        ("orphan", "data/notes.txt"),
        ("orphan", "data/part-1"),
    ]
    assert (found["clean"], found["exit_code"]) == (False, 1)
    with pytest.raises(SystemExit) as exit_info:
        run_job("verify", ["--output", options["output"]])
    captured = capsys.readouterr()
    assert exit_info.value.code == 1
    assert captured.out.splitlines()[-1] == "not clean"
    assert "1 damaged" in captured.err


def test_repair_sweeps_what_belongs_to_nothing_and_no_more(options, stage, visible):
    before = visible(options["output"])
    output = Path(options["output"])
    for name in (
        f"data/{ORPHAN}",
        f"_acsr/ready/{ORPHAN}",
        f"_acsr/quarantine/{ORPHAN}",
        "_acsr/staging/x.tmp",
    ):
        (output / name).parent.mkdir(exist_ok=True)
        (output / name).write_bytes(b"left")
    assert [kind for kind, _ in kinds(verify(options))] == ["leftover", "leftover", "leftover", "orphan"]
    found = verify(options, repair=True)
    assert (found["clean"], found["removed"]) == (True, [ORPHAN])
    assert visible(options["output"]) == before
    with Lease(Ledger(options["output"]).storage), pytest.raises(LeaseError):
        verify(options, repair=True)


def test_a_commit_that_did_not_end_is_told_and_ended(options):
    path = unit(options)
    (Path(options["output"]) / "_acsr/ready").mkdir(exist_ok=True)
    path.rename(Path(options["output"]) / "_acsr/ready" / path.name)
    assert [kind for kind, _ in kinds(verify(options))] == ["leftover", "missing"]
    assert verify(options, repair=True)["clean"]


def test_what_a_run_under_way_has_not_listed_yet_is_no_orphan(options):
    ledger = Ledger(options["output"])
    (Path(options["output"]) / "data" / ORPHAN).write_bytes(b"new")
    with Lease(ledger.storage):
        found = verify(options)
    assert found["clean"]
    assert "a run is under way; 1 files" in found["notes"][0]


def test_a_snapshot_that_changes_meanwhile_is_verified_again(options, monkeypatch):
    ledger = Ledger(options["output"])
    real = verifying.check_rows

    def check_rows(*arguments):
        if ledger.snapshot().number == 1:
            ledger.commit(replace(ledger.snapshot(), number=2))
        return real(*arguments)

    monkeypatch.setattr(verifying, "check_rows", check_rows)
    with pytest.raises(ResumableStop, match="verify again"):
        verify(options)


def drop_row(table):
    return table.slice(0, table.num_rows - 1)


def set_status(table):
    statuses = ["purified"] * table.num_rows
    return table.set_column(table.column_names.index(STATUS), STATUS, pa.array(statuses))


def swap_rows(table):
    order = pa.array([1, 0, *range(2, table.num_rows)])
    return table.set_column(0, "key", table["key"].take(order))


@pytest.mark.parametrize(
    ("change", "folder", "found"),
    [
        (drop_row, "data", [("rows", "data/part-0")] * 2),
        (set_status, "data", [("quarantine", "_acsr/quarantine/part-0"), ("quarantine", "data/part-0")]),
        (drop_row, "_acsr/quarantine", [("quarantine", "_acsr/quarantine/part-0")]),
        (lambda table: table.drop_columns(["key"]), "data", []),
        (lambda table: table.drop_columns([STATUS]), "data", [("damaged", "data/part-0")]),
        (swap_rows, "data", []),
    ],
)
def test_rows_that_do_not_agree(options, change, folder, found):
    rewrite(options, change, folder)
    told = kinds(verify(options))
    if change is set_status:
        # Both counts differ too.
        assert told[-2:] == [("rows", "data/part-0")] * 2
        told = told[:-2]
    assert told == found


def test_columns_of_the_input_are_compared_row_for_row(options):
    rewrite(options, swap_rows)
    (problem,) = verify(options, input=options["input"])["problems"]
    assert problem["name"] == "part-0 rows 4 to 7"
    assert "column 'key'" in problem["detail"]


def test_bytes_that_are_kept_for_no_row_and_rows_whose_bytes_are_not(options):
    kept = next((Path(options["output"]) / "_acsr/quarantine").glob("part-0*"))
    kept.rename(kept.with_name(unit(options, "part-2.rows-0000000").name))
    assert kinds(verify(options)) == [
        ("quarantine", "_acsr/quarantine/part-0"),
        ("quarantine", "_acsr/quarantine/part-2"),
    ]


def test_kept_bytes_that_changed_are_found(options):
    path = next((Path(options["output"]) / "_acsr/quarantine").glob("part-0*"))
    kept = pq.read_table(path)
    other = pa.array([b"forged"] * kept.num_rows, pa.large_binary())
    position = kept.column_names.index("bytes")
    path.write_bytes(to_bytes(kept.set_column(position, "bytes", other)))
    found = verify(options)
    assert kinds(found) == [("quarantine", "_acsr/quarantine/part-0")]
    assert "not those that were kept" in found["problems"][0]["detail"]
    # Of an output of before nobody knows.
    forget_digest(Ledger(options["output"]), path.name)
    assert verify(options)["clean"]


def test_a_file_that_is_gone(options):
    unit(options).unlink()
    assert kinds(verify(options)) == [("missing", "data/part-0")]


def test_gaps_and_overlaps_of_rows(options):
    ledger = Ledger(options["output"])
    forget_digest(ledger, unit(options).name, first=3)
    assert [kind for kind, _ in kinds(verify(options))] == ["gap", "overlap", "quarantine"]


def test_an_input_that_moved_on(options, source, write_numbers):
    write_numbers(source / "part-0.parquet", range(50, 60))
    write_numbers(source / "part-3.parquet", range(60, 64))
    (source / "part-1.parquet").unlink()
    (source / "part-2.parquet").touch()
    (source / "part-4.parquet").write_bytes(b"garbage")
    told = {problem["name"]: problem["detail"] for problem in verify(options, input=str(source))["problems"]}
    assert told.keys() == {"part-0", "part-1", "part-3", "part-4"}
    assert "changed since" in told["part-0"]
    assert "no longer in the input" in told["part-1"]
    assert "0 of its 4 rows" in told["part-3"]
    assert "not_parquet" in told["part-4"]
    assert verify(options)["clean"]


def test_a_folder_of_images_and_a_limit(stage, tmp_path, tiny_bundle):
    folder = tmp_path / "photos"
    for number in range(9):
        path = folder / ("cat" if number < 5 else "dog") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"image %d" % number)
    options = {
        "input": str(folder),
        "output": str(tmp_path / "all"),
        "bundle": str(tiny_bundle),
        "unit_rows": 4,
    }
    purify_corpus(PurifyCorpusSettings.model_validate(options))
    assert verify(options, input=str(folder))["clean"]
    limited = {**options, "output": str(tmp_path / "few"), "limit": 6}
    purify_corpus(PurifyCorpusSettings.model_validate(limited))
    assert verify(limited, input=str(folder))["images"] == 6
    assert verify(limited, input=str(folder))["clean"]
    (folder / "dog" / "8.png").unlink()
    assert kinds(verify(options, input=str(folder)))[0] == ("input", "photos")


def purify(options, **changes):
    return purify_corpus(PurifyCorpusSettings.model_validate({**options, **changes}))


def write_tar(path, numbers):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number in numbers:
            for extension, data in (("png", b"image %d" % number), ("txt", b"text %d" % number)):
                info = tarfile.TarInfo(f"{number:04d}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


@pytest.mark.parametrize(("most_rows", "limit"), [(4, None), (1, None), (4, 15)])
def test_tars_are_compared_with_their_input(most_rows, limit, stage, tmp_path, tiny_bundle):
    source = tmp_path / "tars"
    for shard in range(2):
        write_tar(source / f"{shard}.tar", range(10 * shard, 10 * shard + 10))
    options = {"input": str(source), "output": str(tmp_path / "out"), "bundle": str(tiny_bundle)}
    stage.fails = lambda unit: "too_large" if unit.num_rows > most_rows else None
    purify(options, unit_rows=4, limit=limit)
    found = verify(options, input=str(source))
    assert (found["problems"], found["images"]) == ([], limit or 20)
    name = unit(options, "1.rows-0000004").name

    def change_text(table):
        texts = pa.array(["other"] * table.num_rows)
        return table.set_column(table.column_names.index("txt"), "txt", texts)

    rewrite(options, change_text, start=name)
    (problem,) = verify(options, input=str(source))["problems"]
    assert problem["name"].startswith("1 rows 4 to ")
    assert "column 'txt'" in problem["detail"]
    write_tar(source / "1.tar", range(30, 40))
    (problem,) = verify(options, input=str(source))["problems"]
    assert (problem["name"], problem["kind"]) == ("1", "input")


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(10):
        (folder / f"{number}.png").write_bytes(b"image %d" % number)
    return folder


def test_an_image_of_a_folder_that_changed_is_found(stage, photos, tmp_path, tiny_bundle):
    options = {"input": str(photos), "output": str(tmp_path / "out"), "bundle": str(tiny_bundle)}
    purify(options, unit_rows=4)
    assert verify(options, input=str(photos))["clean"]
    (photos / "5.png").write_bytes(b"image 7")
    os.utime(photos / "5.png", (1, 1))
    (problem,) = verify(options, input=str(photos))["problems"]
    assert (problem["kind"], problem["name"]) == ("input", "photos rows 4 to 7")


def test_units_of_a_folder_that_were_retried_or_cut_are_clean(stage, photos, tmp_path, tiny_bundle):
    options = {"input": str(photos), "output": str(tmp_path / "out"), "bundle": str(tiny_bundle)}
    stage.fails = lambda unit: "too_large" if unit.num_rows > 3 else None
    stage.refuses = lambda data, settings: "too_large" if data.endswith(b"5") else None
    purify(options, unit_rows=4)
    stage.refuses = lambda data, settings: None
    retry(RetrySettings.model_validate({**options, "unit_rows": 4, "decode": {"max_side": 30_000}}))
    receipts = [
        receipt
        for entry in Ledger(options["output"]).snapshot().shards.values()
        for receipt in entry.receipts
    ]
    assert sorted((receipt.first, receipt.generation) for receipt in receipts) == [
        (0, 0),
        (2, 0),
        (4, 1),
        (6, 0),
        (8, 0),
    ]
    assert verify(options, input=str(photos))["problems"] == []


def test_there_must_be_a_purification(tmp_path):
    for location in (None, str(tmp_path / "none")):
        with pytest.raises(CorpusError):
            verify_output(VerifySettings(output=location, repair=True))
    assert not (tmp_path / "none").exists()


def test_the_list_for_programs_is_bounded(options, monkeypatch, capsys):
    monkeypatch.setattr(verifying, "MOST_TOLD", 2)
    for path in list((Path(options["output"]) / "data").iterdir())[:4]:
        path.unlink()
    with pytest.raises(SystemExit):
        run_job("verify", ["--output", options["output"], "--json"])
    found = json.loads(capsys.readouterr().out)
    assert (len(found["problems"]), found["problem_counts"]) == (2, {"missing": 4})
