"""A survey counts what a run would do, refuses what it would refuse, and reads no body for it."""

import io
import json
import os
import tarfile
from dataclasses import asdict, replace
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.local import LocalFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st

from acsr_ray.corpus import units as units_module
from acsr_ray.corpus.changes import list_corpus
from acsr_ray.corpus.lease import Lease
from acsr_ray.corpus.ledger import Ledger
from acsr_ray.corpus.night import Night, NightSettings
from acsr_ray.corpus.stopping import StopRequest
from acsr_ray.corpus.survey import OutputState, Survey, survey_corpus
from acsr_ray.corpus.units import UnitPlan, plan_units, read_unit

FINGERPRINT = "cd" * 32
PLAN = UnitPlan(unit_rows=4)
IMAGE_TYPE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
BROKEN = {
    "truncated": "truncated",
    "garbage": "not_parquet",
    "nameless": "no_image_column",
    "text": "wrong_type",
    "purified": "purified_before",
}


def table(rows: int, size: int = 8) -> pa.Table:
    cells = [{"bytes": os.urandom(size), "path": None} for _ in range(rows)]
    return pa.table({"key": list(range(rows)), "image": pa.array(cells, IMAGE_TYPE)})


def write(path: Path, rows: int, group: int = 3, kind: str = "good", size: int = 8) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = table(rows, size)
    if kind == "nameless":
        content = content.rename_columns(["key", "picture"])
    elif kind == "text":
        content = pa.table({"image": ["x"] * rows})
    elif kind == "purified":
        content = content.append_column("acsr_status", pa.array(["purified"] * rows))
    pq.write_table(content, path, row_group_size=group)
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-1])
    elif kind == "garbage":
        path.write_bytes(b"rubbish" * 30)


def output_state(output: Path) -> OutputState:
    ledger = Ledger(str(output))
    return OutputState(ledger.snapshot(), FINGERPRINT, ledger.finished())


def survey(source: Path, output: Path | None = None, limit: int | None = None) -> Survey:
    state = OutputState(fingerprint=FINGERPRINT) if output is None else output_state(output)
    return survey_corpus(list_corpus(str(source)), PLAN, state, limit)


def run_night(source: Path, output: Path, limit: int | None = None) -> int:
    """Do what a run does, with units written as they are; return how many images it did."""
    ledger = Ledger(str(output))
    done = 0

    def copy(units, parked):
        nonlocal done
        for unit in units:
            rows = read_unit(unit)
            done += rows.num_rows
            rows = rows.append_column("acsr_status", pa.array(["purified"] * rows.num_rows))
            rows = rows.append_column("acsr_reason", pa.array([None] * rows.num_rows, pa.string()))
            receipt = ledger.publish(
                unit.output_name(FINGERPRINT), rows, None, parked=unit.relative in parked, first=unit.first
            )
            yield pa.table({"receipt": [json.dumps(asdict(receipt))]})

    with Lease(ledger.storage) as lease:
        ledger.claim({})
        asked = NightSettings(PLAN, FINGERPRINT, limit)
        Night(asked, ledger, lease, StopRequest(), copy).run(list_corpus(str(source)))
    return done


LAYOUT = st.lists(
    st.tuples(st.integers(0, 11), st.integers(1, 5), st.sampled_from(["good", "good", *BROKEN])),
    min_size=1,
    max_size=5,
)


@settings(max_examples=15, deadline=None)
@given(LAYOUT, st.none() | st.integers(1, 30))
def test_any_layout_against_counting_by_hand(tmp_path_factory, layout, limit):
    source = tmp_path_factory.mktemp("layout")
    rows = groups = size = 0
    codes = []
    left = 10**9 if limit is None else limit
    for number, (count, group, kind) in enumerate(layout):
        path = source / f"{number}.parquet"
        write(path, count, group, kind)
        if left == 0:
            continue
        if kind != "good":
            codes.append((path.resolve().as_posix(), BROKEN[kind]))
            continue
        file = pq.ParquetFile(path)
        taken = min(count, left)
        rows, left = rows + taken, left - taken
        groups += file.metadata.num_row_groups
        held = sum(
            file.metadata.row_group(g).column(c).total_uncompressed_size
            for g in range(file.metadata.num_row_groups)
            for c in (1, 2)
        )
        size += held * taken // count if count else held
    found = survey(source, limit=limit)
    told = found.as_json()
    assert (told["images"], told["images_to_do"], told["row_groups"]) == (rows, rows, groups)
    assert told["bytes"] == size
    assert [(p.shard.removeprefix("file://"), p.code) for p in found.problems] == codes
    assert all(problem.message for problem in found.problems)
    if rows and not codes:
        planned = plan_units(str(source), image_column="image", unit_rows=4, unit_megabytes=32, limit=limit)
        cut = [(unit.relative, unit.first, unit.last) for unit in planned]
        assert [(unit.relative, unit.first, unit.last) for unit in found.units_to_do] == cut
        assert told["units"] == told["units_to_do"] == len(cut)


def test_only_what_is_new_or_changed_is_to_do(tmp_path):
    source, output = tmp_path / "in", tmp_path / "out"
    for name, rows in (("a", 6), ("b", 9), ("c", 5), ("d", 3)):
        write(source / f"{name}.parquet", rows)
    assert run_night(source, output) == 23
    told = survey(source, output).as_json()
    assert (told["images"], told["images_to_do"], told["units_to_do"]) == (23, 0, 0)
    assert told["shard_states"]["unchanged"] == 4
    write(source / "b.parquet", 10)
    write(source / "e.parquet", 2)
    (source / "d.parquet").unlink()
    found = survey(source, output)
    states = {Path(shard.uri).name: shard.state for shard in found.shards}
    assert states == {
        "a.parquet": "unchanged",
        "b.parquet": "changed",
        "c.parquet": "unchanged",
        "e.parquet": "new",
    }
    told = found.as_json()
    assert (told["images"], told["images_to_do"], told["images_maybe_done"]) == (23, 12, 0)
    assert (told["units"], told["units_to_do"]) == (2 + 3 + 2 + 1, 4)
    assert found.removed == ("d",)
    assert run_night(source, output) == 12
    assert survey(source, output).as_json()["images_to_do"] == 0


def test_a_shard_that_was_only_touched_may_be_done(tmp_path):
    source, output = tmp_path / "in", tmp_path / "out"
    write(source / "a.parquet", 6)
    run_night(source, output)
    os.utime(source / "a.parquet", (1, 1))
    (shard,) = survey(source, output).shards
    assert (shard.state, shard.images_to_do, shard.maybe_done, shard.is_hashed) == ("changed", 6, 6, True)
    assert run_night(source, output) == 0


def test_units_that_a_killed_run_left_may_be_done(tmp_path):
    source, output = tmp_path / "in", tmp_path / "out"
    write(source / "a.parquet", 10)
    run_night(source, output)
    for snapshot in (output / "_acsr" / "snapshots").iterdir():
        snapshot.unlink()
    (output / "data" / sorted(os.listdir(output / "data"))[0]).unlink()
    (shard,) = survey(source, output).shards
    assert (shard.state, shard.images_to_do, shard.maybe_done) == ("new", 10, 6)
    assert run_night(source, output) == 4


def test_a_lost_file_of_the_output_is_to_do_again(tmp_path):
    source, output = tmp_path / "in", tmp_path / "out"
    write(source / "a.parquet", 10)
    run_night(source, output)
    (output / "data" / sorted(os.listdir(output / "data"))[1]).unlink()
    (shard,) = survey(source, output).shards
    # The snapshot knows the content, so nothing is uncertain.
    assert (shard.state, shard.images_to_do, shard.is_hashed) == ("unfinished", 4, False)


def test_other_settings_make_all_of_it_new(tmp_path):
    source, output = tmp_path / "in", tmp_path / "out"
    write(source / "a.parquet", 6)
    run_night(source, output)
    state = replace(output_state(output), fingerprint="ef" * 32)
    (shard,) = survey_corpus(list_corpus(str(source)), PLAN, state).shards
    assert (shard.state, shard.images_to_do) == ("changed", 6)


def test_a_folder_of_images_is_one_shard(tmp_path):
    source, output = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    for number in range(10):
        (source / f"{number}.png").write_bytes(bytes(5))
    told = survey(source).as_json()
    assert (told["images"], told["units"], told["bytes"], told["shards"]) == (10, 3, 50, 1)
    assert run_night(source, output) == 10
    assert survey(source, output).as_json()["images_to_do"] == 0
    (source / "95.png").write_bytes(bytes(5))
    (shard,) = survey(source, output).shards
    assert (shard.state, shard.images, shard.images_to_do) == ("changed", 11, 3)


def test_tars_tell_their_bytes(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for number in range(6):
            for extension, size in (("png", 100), ("txt", 7), ("bin", 5000)):
                info = tarfile.TarInfo(f"{number}.{extension}")
                info.size = size
                tar.addfile(info, io.BytesIO(b"x" * size))
    told = survey(tmp_path).as_json()
    assert (told["images"], told["units"], told["bytes"], told["bytes_hashed"]) == (6, 2, 642, 642)
    assert survey(tmp_path, limit=3).as_json()["bytes"] == 321


class CountingFileSystem(LocalFileSystem):
    """The local disk; counts the bytes that are read of it."""

    protocol = "counted"
    cachable = False
    bytes_read = 0

    def _open(self, path, mode="rb", **options):
        file = super()._open(path, mode, **options)
        read = file.f.read

        class Counted:
            def __getattr__(self, name):
                return getattr(inner, name)

            def read(self, size=-1):
                data = read(size)
                CountingFileSystem.bytes_read += len(data)
                return data

        inner = file.f
        file.f = Counted()
        return file


def test_no_body_is_read_and_nothing_is_hashed(tmp_path, monkeypatch):
    fsspec.register_implementation("counted", CountingFileSystem, clobber=True)
    for name in "abc":
        write(tmp_path / f"{name}.parquet", 40, group=10, size=100_000)

    def never(uri):
        raise AssertionError(f"{uri} is hashed")

    monkeypatch.setattr(units_module, "_file_digest", never)
    CountingFileSystem.bytes_read = 0
    found = survey_corpus(list_corpus(f"counted://{tmp_path}"), PLAN, OutputState())
    assert found.as_json()["images"] == 120
    assert found.as_json()["bytes"] > 12_000_000
    # The end of each file, where the footer is, and four bytes of its start.
    assert 0 < CountingFileSystem.bytes_read <= 3 * (2**16 + 4)


@pytest.mark.parametrize("fault", [FileNotFoundError("gone"), PermissionError(13, "no", "x")])
def test_what_the_store_does_not_deliver_is_a_problem(fault, tmp_path, monkeypatch):
    write(tmp_path / "a.parquet", 3)
    source = list_corpus(str(tmp_path))

    def fail(*_):
        raise fault

    monkeypatch.setattr("acsr_ray.corpus.survey.parquet_facts", fail)
    (problem,) = survey_corpus(source, PLAN, OutputState()).problems
    assert problem.code == ("vanished" if isinstance(fault, FileNotFoundError) else "unreadable")
