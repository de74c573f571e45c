"""A run over a corpus: whatever units meet, each row ends up published once, or its shard or unit is told."""

import io
import json
import random
import tarfile
from collections import Counter
from dataclasses import asdict

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from acsr_ray.columns import PURIFIED, REASON, STATUS
from acsr_ray.config import FailedError, ResumableStop
from acsr_ray.corpus.changes import list_corpus
from acsr_ray.corpus.lease import Lease
from acsr_ray.corpus.ledger import Ledger
from acsr_ray.corpus.night import Night, NightSettings
from acsr_ray.corpus.run_record import RunAbout
from acsr_ray.corpus.sources import CorpusError
from acsr_ray.corpus.stopping import StopRequest
from acsr_ray.corpus.units import Unit, UnitPlan, read_unit
from acsr_ray.purification.failures import failed_unit
from acsr_ray.storage import DiskStorage, StorageError

FINGERPRINT = "ab" * 32
IMAGE_TYPE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def write_shard(path, numbers):
    cells = [{"bytes": b"image %d" % number, "path": None} for number in numbers]
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"key": list(numbers), "image": pa.array(cells, IMAGE_TYPE)}), path)


def keys(output):
    """Return the keys of all visible rows."""
    ledger = Ledger(str(output))
    found = []
    for name in sorted(ledger.published()):
        found += pq.read_table(io.BytesIO(ledger.storage.read(f"data/{name}")))["key"].to_pylist()
    return found


class Purifier:
    """Stands for the pipeline: publishes units, or fails on them as it is told."""

    def __init__(self, output, fails=lambda unit: None):
        self.ledger = Ledger(str(output))
        self.fails = fails
        self.units: list[Unit] = []

    def __call__(self, units, parked):
        for unit in units:
            self.units.append(unit)
            kind = self.fails(unit)
            if kind == "lost":
                continue
            if kind is not None:
                yield failed_unit(unit.to_json(), kind, "as told")
                continue
            table = read_unit(unit)
            table = table.append_column(STATUS, pa.array([PURIFIED] * table.num_rows))
            table = table.append_column(REASON, pa.nulls(table.num_rows, pa.string()))
            name = unit.output_name(FINGERPRINT)
            receipt = self.ledger.publish(name, table, None, parked=unit.relative in parked, first=unit.first)
            yield pa.table({"name": [name], "rows": [receipt.rows], "receipt": [json.dumps(asdict(receipt))]})


def spend(source, output, fails=lambda unit: None, *, stop=None, rows=4, **changes):
    """Spend a night; return it and the purifier."""
    purifier = Purifier(output, fails)
    ledger = Ledger(str(output))
    asked = NightSettings(UnitPlan(unit_rows=rows), FINGERPRINT, **changes)
    with Lease(ledger.storage) as lease:
        night = Night(asked, ledger, lease, stop or StopRequest(), purifier)
        night.run(list_corpus(str(source)))
    return night, purifier


@pytest.fixture(scope="module", autouse=True)
def impatient():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("acsr_ray.corpus.night.IDLE_PAUSE_S", 0.0)
        yield


@pytest.fixture
def source(tmp_path):
    for shard in range(3):
        write_shard(tmp_path / "in" / f"part-{shard}.parquet", range(10 * shard, 10 * shard + 10))
    return tmp_path / "in"


@given(seed=st.integers(0, 10**6), wave=st.integers(1, 12), rows=st.integers(1, 12))
@settings(max_examples=40, deadline=None)
def test_whatever_passes_ends_with_every_row_once(tmp_path_factory, seed, wave, rows):
    """Failures that pass: deferred, lost by Ray, too large, and stages that fail at most twice on a unit."""
    folder, generator = tmp_path_factory.mktemp("night"), random.Random(seed)
    for shard in range(3):
        write_shard(folder / "in" / f"part-{shard}.parquet", range(10 * shard, 10 * shard + 10))
    failures: dict[Unit, int] = {}

    def fails(unit):
        if unit.num_rows > 3:
            return "too_large"
        if failures.setdefault(unit, 0) < 2 and generator.random() < 0.4:
            failures[unit] += 1
            return generator.choice(["deferred", "stage", "lost"])
        return None

    night, _ = spend(folder / "in", folder / "out", fails, rows=rows, wave_units=wave)
    assert not night.failed
    assert keys(folder / "out") == list(range(30))
    assert night.summary(1.0)["images"] == 30
    again, purifier = spend(folder / "in", folder / "out", rows=rows, wave_units=wave)
    assert "nothing to do" in again.summary(1.0)["this run"]
    assert purifier.units == []


def test_a_stage_that_fails_for_good_costs_its_unit_alone(source, tmp_path):
    night, purifier = spend(
        source,
        tmp_path / "out",
        lambda unit: "stage" if (unit.relative, unit.first) == ("part-1", 4) else None,
    )
    ((name, told),) = night.failed.items()
    assert name.startswith("part-1.rows-0000004-0000007")
    assert told == "as told"
    assert len([unit for unit in purifier.units if unit.first == 4 and unit.relative == "part-1"]) == 3
    assert keys(tmp_path / "out") == [key for key in range(30) if not 14 <= key < 18]
    # The next run, without the fault, does just that.
    _, purifier = spend(source, tmp_path / "out")
    assert [(unit.relative, unit.first) for unit in purifier.units] == [("part-1", 4)]
    assert keys(tmp_path / "out") == list(range(30))


def test_storage_that_fails_stops_and_keeps_what_is_done(source, tmp_path):
    seen = []

    def fails(unit):
        seen.append(unit)
        return "storage" if len(seen) == 6 else None

    with pytest.raises(StorageError, match="as told"):
        spend(source, tmp_path / "out", fails, wave_units=6)
    ledger = Ledger(str(tmp_path / "out"))
    assert len(ledger.snapshot().names()) == 5
    spend(source, tmp_path / "out")
    assert keys(tmp_path / "out") == list(range(30))


def test_a_stop_commits_what_is_done(source, tmp_path):
    stop = StopRequest()

    def fails(unit):
        if unit.relative == "part-1":
            stop._on_signal(15, None)
        return "deferred" if stop.is_made else None

    with pytest.raises(ResumableStop, match="stopped on request"):
        spend(source, tmp_path / "out", fails, stop=stop)
    assert keys(tmp_path / "out") == list(range(10))
    assert Ledger(str(tmp_path / "out")).snapshot().shards.keys() == {"part-0"}


def test_a_shard_that_changes_is_planned_anew_and_never_mixed(source, tmp_path):
    path = source / "part-1.parquet"
    changed = []

    def fails(unit):
        if unit.relative == "part-1" and unit.first == 4 and not changed:
            changed.append(1)
            write_shard(path, range(100, 107))
            return "changed"
        return None

    spend(source, tmp_path / "out", fails, wave_units=5)
    assert sorted(keys(tmp_path / "out")) == [*range(10), *range(20, 30), *range(100, 107)]
    assert Ledger(str(tmp_path / "out")).published() == Ledger(str(tmp_path / "out")).snapshot().names()


def test_a_shard_that_always_changes_is_left_out(source, tmp_path):
    night, _ = spend(source, tmp_path / "out", lambda unit: "changed" if unit.relative == "part-1" else None)
    ((uri, told),) = night.refused.items()
    assert uri.endswith("part-1.parquet")
    assert told.startswith("changing")
    assert keys(tmp_path / "out") == [*range(10), *range(20, 30)]


def test_a_shard_that_cannot_be_read_any_more_keeps_its_last_output(source, tmp_path):
    spend(source, tmp_path / "out")
    (source / "part-1.parquet").write_bytes(b"garbage")
    night, _ = spend(source, tmp_path / "out")
    assert [told.split(":")[0] for told in night.refused.values()] == ["not_parquet"]
    assert keys(tmp_path / "out") == list(range(30))


def test_what_leaves_the_input_leaves_the_output(source, tmp_path):
    spend(source, tmp_path / "out")
    (source / "part-0.parquet").unlink()
    night, _ = spend(source, tmp_path / "out")
    assert night.summary(1.0)["removed shards"] == 1
    assert keys(tmp_path / "out") == list(range(10, 30))


def test_an_output_file_that_is_gone_is_made_again(source, tmp_path):
    spend(source, tmp_path / "out")
    next((tmp_path / "out" / "data").glob("part-2*")).unlink()
    _, purifier = spend(source, tmp_path / "out")
    assert [unit.relative for unit in purifier.units] == ["part-2"]
    assert keys(tmp_path / "out") == list(range(30))


def test_a_limit_is_the_first_rows(source, tmp_path):
    spend(source, tmp_path / "out", limit=13)
    assert keys(tmp_path / "out") == list(range(13))
    _, purifier = spend(source, tmp_path / "out", limit=13)
    assert not purifier.units


def test_an_input_without_rows_is_an_error(tmp_path):
    write_shard(tmp_path / "in" / "a.parquet", range(0))
    with pytest.raises(CorpusError, match="no rows"):
        spend(tmp_path / "in", tmp_path / "out")


def test_code_that_fails_commits_what_was_done_before(source, tmp_path):
    def fails(unit):
        if unit.relative == "part-2":
            raise FailedError("a stage cannot start")
        return

    with pytest.raises(FailedError, match="cannot start"):
        spend(source, tmp_path / "out", fails)
    assert Ledger(str(tmp_path / "out")).snapshot().shards.keys() == {"part-0", "part-1"}


def test_what_a_limit_cut_is_done_when_the_limit_goes(source, tmp_path):
    spend(source, tmp_path / "out", limit=13)
    spend(source, tmp_path / "out")
    assert keys(tmp_path / "out") == list(range(30))


def test_a_shard_that_is_only_touched_while_it_is_read_is_done(source, tmp_path):
    """All old units say that it changed; their answers do not count against the new plan."""
    touched = []

    def fails(unit):
        if unit.relative != "part-1":
            return None
        if not touched:
            touched.append(unit.version)
            (source / "part-1.parquet").touch()
        return "changed" if unit.version == touched[0] else None

    night, _ = spend(source, tmp_path / "out", fails, rows=1)
    assert not night.refused
    assert keys(tmp_path / "out") == list(range(30))


def test_a_link_is_the_file_behind_it(source, tmp_path):
    (tmp_path / "links").mkdir()
    for path in source.iterdir():
        (tmp_path / "links" / path.name).symlink_to(path)
    night, _ = spend(tmp_path / "links", tmp_path / "out", rows=2)
    assert not night.refused
    write_shard(source / "part-1.parquet", range(100, 110))
    spend(tmp_path / "links", tmp_path / "out", rows=2)
    assert sorted(keys(tmp_path / "out")) == [*range(10), *range(20, 30), *range(100, 110)]


def test_a_shard_that_changes_before_a_stop_shows_no_row_twice(source, tmp_path):
    """Its first units are published when it changes; its new ones stay hidden until all are there."""
    path, stop, changed = source / "part-1.parquet", StopRequest(), []

    def fails(unit):
        if unit.relative == "part-1" and unit.first == 4 and not changed:
            changed.append(unit.version)
            # The same rows in other bytes, so that their units have other names.
            pq.write_table(pq.read_table(path), path, compression="none")
            return "changed"
        if changed and unit.version == changed[0]:
            return "changed"
        if changed and unit.relative == "part-1" and unit.first == 8:
            stop._on_signal(15, None)
            return "deferred"
        return None

    with pytest.raises(ResumableStop):
        spend(source, tmp_path / "out", fails, stop=stop)
    seen = keys(tmp_path / "out")
    assert len(seen) == len(set(seen))
    spend(source, tmp_path / "out")
    assert keys(tmp_path / "out") == list(range(30))


def test_storage_that_fails_is_not_waited_for_by_every_unit(source, tmp_path):
    seen = []

    def fails(unit):
        seen.append(unit)
        return "storage"

    with pytest.raises(StorageError):
        spend(source, tmp_path / "out", fails)
    assert len(seen) == 1


def test_a_run_that_was_taken_over_removes_nothing(source, tmp_path):
    """A zombie that wakes in the middle of a commit knows only an old snapshot."""
    ledger = Ledger(str(tmp_path / "out"))
    spend(source, tmp_path / "out")
    old = ledger.snapshot()
    write_shard(source / "part-1.parquet", range(100, 110))
    spend(source, tmp_path / "out")

    def lost():
        raise FailedError("taken over")

    for remove in (ledger.settle, lambda snapshot, check: ledger.sweep(snapshot, frozenset(), check)):
        with pytest.raises(FailedError, match="taken over"):
            remove(old, lost)
    assert sorted(keys(tmp_path / "out")) == [*range(10), *range(20, 30), *range(100, 110)]


def test_partial_progress_of_a_folder_is_committed_night_by_night(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(12):
        (folder / f"{number:02d}.png").write_bytes(b"image %d" % number)

    class Photos(Purifier):
        def __call__(self, units, parked):
            for unit in units:
                if self.fails(unit):
                    yield failed_unit(unit.to_json(), self.fails(unit), "as told")
                    continue
                table = read_unit(unit).append_column("key", pa.array(range(unit.first, unit.last + 1)))
                table = table.append_column(STATUS, pa.array([PURIFIED] * table.num_rows))
                table = table.append_column(REASON, pa.nulls(table.num_rows, pa.string()))
                name = unit.output_name(FINGERPRINT)
                receipt = self.ledger.publish(name, table, None, parked=unit.relative in parked)
                yield pa.table({"name": [name], "receipt": [json.dumps(asdict(receipt))]})

    def night(fails):
        ledger = Ledger(str(tmp_path / "out"))
        asked = NightSettings(UnitPlan(unit_rows=2), FINGERPRINT)
        with Lease(ledger.storage) as lease:
            one = Night(asked, ledger, lease, StopRequest(), Photos(tmp_path / "out", fails))
            one.run(list_corpus(str(folder)))
        return one.summary(1.0)["images"]

    assert night(lambda unit: "given_up" if unit.first >= 4 else None) == 4
    assert night(lambda unit: "given_up" if unit.first == 8 else None) == 10
    assert night(lambda unit: None) == 12
    assert keys(tmp_path / "out") == list(range(12))


def write_tar(path, numbers):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number in numbers:
            data = b"image %d" % number
            info = tarfile.TarInfo(f"{number:03d}.png")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def tar_keys(output):
    ledger, found = Ledger(str(output)), []
    for name in sorted(ledger.published()):
        found += pq.read_table(io.BytesIO(ledger.storage.read(f"data/{name}")))["__key__"].to_pylist()
    return [int(key) for key in found]


def test_nights_over_tars(tmp_path):
    """All of them, then the new one, the changed one, a damaged one, one that goes, and nothing."""
    source, output = tmp_path / "in", tmp_path / "out"
    for shard in range(3):
        write_tar(source / f"part-{shard}.tar", range(10 * shard, 10 * shard + 10))
    spend(source, output)
    assert tar_keys(output) == list(range(30))
    (source / "part-0.tar").touch()
    assert not spend(source, output)[1].units
    write_tar(source / "part-1.tar", range(100, 105))
    write_tar(source / "part-3.tar", range(30, 34))
    _, purifier = spend(source, output)
    assert {unit.relative for unit in purifier.units} == {"part-1", "part-3"}
    assert tar_keys(output) == [*range(10), *range(100, 105), *range(20, 34)]
    whole = (source / "part-2.tar").read_bytes()
    (source / "part-2.tar").write_bytes(whole[:3000])
    (source / "part-0.tar").unlink()
    night, purifier = spend(source, output)
    assert not purifier.units
    ((uri, told),) = night.refused.items()
    assert uri.endswith("part-2.tar")
    assert told.startswith("truncated: ")
    # The last good rows of what is damaged now stay, those of what is gone do not.
    assert tar_keys(output) == [*range(100, 105), *range(20, 34)]
    (source / "part-2.tar").write_bytes(whole)
    assert "nothing to do" in spend(source, output)[0].summary(1.0)["this run"]


def test_a_tar_that_changes_is_planned_anew_and_never_mixed(tmp_path):
    source, changed = tmp_path / "in", []
    for shard in range(2):
        write_tar(source / f"part-{shard}.tar", range(10 * shard, 10 * shard + 10))

    def fails(unit):
        if unit.relative == "part-1" and unit.first == 4 and not changed:
            changed.append(1)
            write_tar(source / "part-1.tar", range(100, 107))
            return "changed"
        return None

    spend(source, tmp_path / "out", fails, wave_units=5)
    assert sorted(tar_keys(tmp_path / "out")) == [*range(10), *range(100, 107)]


def test_units_of_a_tar_are_halved(tmp_path):
    write_tar(tmp_path / "in" / "a.tar", range(11))
    spend(tmp_path / "in", tmp_path / "out", lambda unit: "too_large" if unit.num_rows > 2 else None, rows=11)
    assert tar_keys(tmp_path / "out") == list(range(11))


def test_classes_that_come_or_go_change_labels_and_names_of_all_rows(tmp_path):
    """A file that keeps its place in the order may be of another class by then."""
    folder, output = tmp_path / "photos", tmp_path / "out"
    for number in range(12):
        path = folder / ("ant", "bee", "cat")[number // 4] / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"image %d" % number)

    def as_published():
        ledger, found = Ledger(str(output)), set()
        for name in sorted(ledger.published()):
            table = pq.read_table(io.BytesIO(ledger.storage.read(f"data/{name}")))
            features = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
            classes = tuple(features["label"]["names"])
            labels = [classes[label] for label in table["label"].to_pylist()]
            paths = [cell["path"] for cell in table["image"].to_pylist()]
            found |= {(path, label, classes) for path, label in zip(paths, labels, strict=True)}
        return found

    def as_listed():
        paths = sorted(path.relative_to(folder) for path in folder.rglob("*.png"))
        classes = tuple(sorted({path.parts[0] for path in paths}))
        return {(path.as_posix(), path.parts[0], classes) for path in paths}

    spend(folder, output)
    assert as_published() == as_listed()
    for path in (folder / "ant").iterdir():
        path.rename(folder / "bee" / path.name)
    (folder / "ant").rmdir()
    spend(folder, output)
    assert as_published() == as_listed()
    (folder / "dog").mkdir()
    (folder / "dog" / "99.png").write_bytes(b"image 99")
    spend(folder, output)
    assert as_published() == as_listed()


def test_a_night_without_news_lists_the_output_twice(source, tmp_path, monkeypatch):
    """At its beginning, and before it removes what is left over; a list of a store takes many requests."""
    spend(source, tmp_path / "out")
    listed = Counter()
    names = DiskStorage.names
    monkeypatch.setattr(DiskStorage, "names", lambda self, top: (listed.update([top]), names(self, top))[1])
    spend(source, tmp_path / "out")
    assert listed["data"] == listed["_acsr/ready"] == 2


def test_a_folder_of_tars_becomes_parquet_under_the_same_names(tmp_path):
    """The shard's name stays, its rows are those of the new kind."""
    source, output = tmp_path / "in", tmp_path / "out"
    write_shard(source / "part-0.parquet", range(10))
    spend(source, output)
    (source / "part-0.parquet").unlink()
    write_tar(source / "part-0.tar", range(5))
    spend(source, output)
    assert tar_keys(output) == list(range(5))


def test_the_tally_hears_of_everything(source, tmp_path):
    """Tries that fail, shards that are refused, units that are given up, shards that are gone."""
    spend(source, tmp_path / "out")
    (source / "part-0.parquet").unlink()
    write_shard(source / "part-1.parquet", range(100, 110))
    write_shard(source / "part-3.parquet", range(40, 52))
    (source / "part-4.parquet").write_bytes(b"garbage")
    failures = Counter()

    def fails(unit):
        failures[unit.relative, unit.first] += 1
        if (unit.relative, unit.first) == ("part-3", 8):
            return "stage"
        if unit.relative == "part-1" and unit.first == 0 and failures["part-1", 0] < 3:
            return "stage"
        return "deferred" if unit.relative == "part-1" and failures[unit.relative, unit.first] == 1 else None

    night, _ = spend(source, tmp_path / "out", fails)
    about = RunAbout("r", "", str(source), str(tmp_path / "out"), "", {})
    record = night.tally.record(about, "failed", "", night.tally.corpus(), night.tally.changes())
    assert (record["images"], record["units"], record["statuses"]) == (18, 5, {"purified": 18})
    # Two of the unit that passed the third time, two of the one that never does; what waits is no retry.
    assert record["retries"] == 4
    assert record["failed_units"] == night.failed
    assert record["refused_shards"] == night.refused
    assert len(night.refused) == record["refused_shards_total"] == record["failed_units_total"] == 1
    assert (record["removed_shards"], record["removed_shards_total"]) == (["part-0"], 1)
    assert (record["new_shards"], record["changed_shards"]) == (["part-3"], ["part-1"])
    assert record["corpus"]["images"] == len(keys(tmp_path / "out")) == 28
    progress = night.tally.progress("r", "failed")
    assert (progress["images_done"], progress["images_expected"]) == (18, 22)


def test_what_is_planned_grows_wave_by_wave_and_what_is_expected_does_not(source, tmp_path):
    seen = []

    def fails(unit):
        progress = night.tally.progress("r", "running")
        seen.append((progress["images_done"], progress["images_planned"], progress["images_expected"]))

    purifier = Purifier(tmp_path / "out", fails)
    ledger = Ledger(str(tmp_path / "out"))
    asked = NightSettings(UnitPlan(unit_rows=5), FINGERPRINT, wave_units=2)
    with Lease(ledger.storage) as lease:
        night = Night(asked, ledger, lease, StopRequest(), purifier)
        night.run(list_corpus(str(source)))
    assert seen == [(0, 10, 30), (5, 10, 30), (10, 20, 30), (15, 20, 30), (20, 30, 30), (25, 30, 30)]
