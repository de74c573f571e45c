"""The output as a Delta table: a commit per snapshot, never twice, never a listed file that is not there."""

import json
import os
import re
from dataclasses import asdict
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable

from acsr_ray.columns import OUTCOME, PURIFIED, QUARANTINED, REASON, STATUS
from acsr_ray.config import FailedError, MissingExtraError
from acsr_ray.corpus import delta
from acsr_ray.corpus.changes import list_corpus
from acsr_ray.corpus.delta import DeltaConflictError, DeltaLog, begin_delta, find_delta, storage_options
from acsr_ray.corpus.delta_types import DeltaSchemaError
from acsr_ray.corpus.lease import Lease
from acsr_ray.corpus.ledger import Ledger
from acsr_ray.corpus.night import Night, NightSettings
from acsr_ray.corpus.stopping import StopRequest
from acsr_ray.corpus.units import UnitPlan, read_unit
from acsr_ray.filesystems import Access
from acsr_ray.storage import DiskStorage, StorageError, StorageLocationError, open_storage

FINGERPRINT = "ab" * 32
README = Path(__file__).parents[2] / "README.md"
IMAGE_TYPE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


class Died(BaseException):
    """The process is no more."""


def write_shard(path, numbers, **columns):
    cells = [{"bytes": b"image %d" % number, "path": None} for number in numbers]
    table = pa.table({"key": list(numbers), "image": pa.array(cells, IMAGE_TYPE)})
    for name, values in columns.items():
        table = table.append_column(name, values)
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)


def purified(ledger):
    """Return a stand-in for the pipeline; rows with odd keys are refused."""

    def purify(units, parked):
        for unit in units:
            table = read_unit(unit)
            odd = [key % 2 for key in table["key"].to_pylist()]
            columns = {
                STATUS: [QUARANTINED if refused else PURIFIED for refused in odd],
                REASON: ["empty" if refused else None for refused in odd],
            }
            for field in OUTCOME:
                table = table.append_column(
                    field, pa.array(columns.get(field.name, [None] * len(odd)), field.type)
                )
            name = unit.output_name(FINGERPRINT)
            receipt = ledger.publish(name, table, None, parked=unit.relative in parked, first=unit.first)
            yield pa.table({"receipt": [json.dumps(asdict(receipt))]})

    return purify


def spend(source, output, *, begin=True, rows=4, wave_units=4):
    """Spend a night; return its ledger."""
    ledger = Ledger(str(output))
    if begin:
        begin_delta(ledger.storage)
    asked = NightSettings(UnitPlan(unit_rows=rows), FINGERPRINT, wave_units=wave_units)
    with Lease(ledger.storage, stale_s=0.1) as lease:
        Night(asked, ledger, lease, StopRequest(), purified(ledger)).run(list_corpus(str(source)))
    return ledger


def log(output):
    """Return the actions of every commit, oldest first, as lists of (kind, content)."""
    commits = sorted(Path(output, "_delta_log").glob("*.json"))
    return [[next(iter(json.loads(line).items())) for line in c.read_text().splitlines()] for c in commits]


def commits(output):
    """Return (snapshot, files added, files removed) of every commit."""
    return [
        (
            next((content["version"] for kind, content in actions if kind == "txn"), None),
            sum(kind == "add" for kind, _ in actions),
            sum(kind == "remove" for kind, _ in actions),
        )
        for actions in log(output)
    ]


def table_of(output):
    return DeltaTable(str(output)).to_pyarrow_table().sort_by("key")


def check_same(ledger, columns=("key", "image", STATUS, REASON)):
    """Check that table, snapshot, files and their readers agree; return the keys."""
    data = Path(ledger.output, "data")
    names = ledger.snapshot().names()
    assert {path.relative_to(data).as_posix() for path in data.rglob("*.parquet")} == names
    files = DeltaTable(ledger.output).get_add_actions()
    assert sorted(pa.table(files)["num_records"].to_pylist()) == sorted(
        receipt.rows for receipt in ledger.snapshot().receipts()
    )
    expected = pa.concat_tables(
        [pq.ParquetFile(data / name).read() for name in names], promote_options="default"
    ).sort_by("key")
    table = table_of(ledger.output)
    for name in columns:
        assert table[name].to_pylist() == expected[name].to_pylist(), name
    delta_table = DeltaTable(ledger.output).to_pyarrow_dataset()  # noqa: F841  (duckdb finds it by its name)
    counted = duckdb.sql(f"select {STATUS}, count(*) from delta_table group by 1 order by 1").fetchall()
    expected_counts = duckdb.sql(
        f"select {STATUS}, count(*) from read_parquet('{data}/**/*.parquet') group by 1 order by 1"
    ).fetchall()
    assert counted == expected_counts
    return table["key"].to_pylist()


@pytest.fixture
def source(tmp_path):
    for shard in range(4):
        write_shard(tmp_path / "in" / f"part-{shard}.parquet", range(10 * shard, 10 * shard + 10))
    return tmp_path / "in"


@pytest.fixture
def dies(monkeypatch):
    """Let the process die at the n-th call of `DeltaLog.follow`, before or after it did its work."""

    def arm(number, when):
        calls = []
        follow = DeltaLog.follow

        def dying(self, *args):
            calls.append(args)
            if len(calls) == number and when == "before":
                raise Died
            follow(self, *args)
            if len(calls) == number:
                raise Died

        monkeypatch.setattr(DeltaLog, "follow", dying)
        return lambda: monkeypatch.setattr(DeltaLog, "follow", follow)

    return arm


def test_every_wave_is_one_commit_with_its_snapshot(source, tmp_path):
    ledger = spend(source, tmp_path / "out")
    # Twelve units in waves of four.
    assert commits(tmp_path / "out") == [(1, 4, 0), (2, 4, 0), (3, 4, 0)]
    assert ledger.snapshot().number == 3
    assert check_same(ledger) == list(range(40))
    schema = table_of(tmp_path / "out").schema
    assert schema.names == ["key", "image", *OUTCOME.names]
    assert [field.name for field in schema.field("image").type] == ["bytes", "path"]
    # A second night, with or without being asked for a table, has nothing to commit.
    for begin in (True, False):
        spend(source, tmp_path / "out", begin=begin)
    assert len(log(tmp_path / "out")) == 3


def test_what_the_readme_shows(tmp_path, monkeypatch):
    (block,) = re.findall(r"^```python\n([^`]*DeltaTable[^`]*)^```", README.read_text(), re.MULTILINE)
    write_shard(tmp_path / "in" / "a.parquet", range(6), image_id=[[f"id {number}" for number in range(6)]])
    spend(tmp_path / "in", tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    shown = {}
    exec(compile(block, str(README), "exec"), shown)
    assert sorted(shown["good"]["image_id"].to_pylist()) == ["id 0", "id 2", "id 4"]


def test_an_output_is_no_table_unless_asked_for(source, tmp_path):
    ledger = spend(source, tmp_path / "out", begin=False)
    assert find_delta(ledger.storage) is None
    assert not (tmp_path / "out" / "_delta_log").exists()
    # Begun later, all of it comes in one commit, and no file is written anew.
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "data").iterdir()}
    ledger = spend(source, tmp_path / "out")
    assert commits(tmp_path / "out") == [(3, 12, 0)]
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "data").iterdir()} == stamps
    assert check_same(ledger) == list(range(40))


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_crash_around_a_commit_is_made_up_for_once(source, tmp_path, dies, when):
    # The first call is that of the start, of an output with no files.
    alive = dies(3, when)
    with pytest.raises(Died):
        spend(source, tmp_path / "out")
    assert Ledger(str(tmp_path / "out")).snapshot().number == 2
    assert len(log(tmp_path / "out")) == (1 if when == "before" else 2)
    alive()
    ledger = spend(source, tmp_path / "out", begin=False)
    assert commits(tmp_path / "out") == [(1, 4, 0), (2, 4, 0), (3, 4, 0)]
    assert check_same(ledger) == list(range(40))


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_superseded_shard_is_replaced_in_one_commit(source, tmp_path, dies, when):
    ledger = spend(source, tmp_path / "out")
    before = ledger.published()
    write_shard(source / "part-1.parquet", range(100, 107))
    alive = dies(2, when)
    with pytest.raises(Died):
        spend(source, tmp_path / "out")
    # Whatever version the log is at, its files are there.
    keys = table_of(tmp_path / "out")["key"].to_pylist()
    assert (keys == list(range(40))) == (when == "before")
    alive()
    ledger = spend(source, tmp_path / "out")
    assert commits(tmp_path / "out")[3:] == [(4, 2, 3)]
    assert check_same(ledger) == [*range(10), *range(20, 40), *range(100, 107)]
    assert len(before & ledger.published()) == 9


def test_every_version_can_be_read_while_it_is_the_last(source, tmp_path, monkeypatch):
    spend(source, tmp_path / "out")
    write_shard(source / "part-1.parquet", range(100, 107))
    (source / "part-3.parquet").unlink()
    seen = []

    def looking(name):
        real = getattr(DiskStorage, name)

        def call(self, *args):
            result = real(self, *args)
            if (tmp_path / "out" / "_delta_log").exists():
                keys = table_of(tmp_path / "out")["key"].to_pylist()
                if keys not in seen:
                    seen.append(keys)
            return result

        monkeypatch.setattr(DiskStorage, name, call)

    for name in ("move", "remove", "create"):
        looking(name)
    spend(source, tmp_path / "out")
    replaced = [*range(10), *range(20, 40), *range(100, 107)]
    assert seen == [list(range(40)), replaced, [key for key in replaced if not 30 <= key < 40]]


def test_later_columns_are_added_and_other_types_are_told(source, tmp_path):
    spend(source, tmp_path / "out")
    write_shard(source / "part-4.parquet", [40, 41], size=pa.array([1.5, 2.5]))
    spend(source, tmp_path / "out")
    table = table_of(tmp_path / "out")
    assert table["size"].to_pylist() == [None] * 40 + [1.5, 2.5]
    # `size` is text here, and a time of day there: the output has both shards, the table none.
    write_shard(source / "part-5.parquet", [50], size=pa.array(["large"]))
    write_shard(source / "part-6.parquet", [60], at=pa.array([1], pa.time32("s")))
    write_shard(source / "part-7.parquet", [70])
    for _ in range(2):  # the next night tells it again
        ledger = spend(source, tmp_path / "out")
        assert set(ledger.delta.left_out) == {"part-5", "part-6"}
        assert "'size' is string" in ledger.delta.left_out["part-5"]
        assert "'at' is time32[ms], which Delta Lake has no type for" in ledger.delta.left_out["part-6"]
    assert table_of(tmp_path / "out")["key"].to_pylist() == [*range(42), 70]
    assert len(ledger.published()) == 16
    write_shard(source / "part-5.parquet", [50], size=pa.array([3.0]))
    (source / "part-6.parquet").unlink()
    ledger = spend(source, tmp_path / "out")
    assert ledger.delta.left_out == {}
    assert check_same(ledger) == [*range(42), 50, 70]


def test_names_with_escapes(tmp_path):
    for number, name in enumerate(("split=train/ä b.parquet", "a%20b.parquet", "c#d+e.parquet")):
        write_shard(tmp_path / "in" / name, [number])
    ledger = spend(tmp_path / "in", tmp_path / "out")
    assert check_same(ledger) == [0, 1, 2]
    (tmp_path / "in" / "a%20b.parquet").unlink()
    ledger = spend(tmp_path / "in", tmp_path / "out")
    assert commits(tmp_path / "out") == [(1, 3, 0), (2, 0, 1)]
    assert check_same(ledger) == [0, 2]


def test_files_without_quarantined_rows_need_not_be_opened(tmp_path):
    write_shard(tmp_path / "in" / "a.parquet", [0, 2, 4])
    write_shard(tmp_path / "in" / "b.parquet", [1, 2])
    spend(tmp_path / "in", tmp_path / "out")
    for path in (tmp_path / "out" / "data").glob("a.*"):
        path.write_bytes(b"not opened")
    dataset = DeltaTable(str(tmp_path / "out")).to_pyarrow_dataset()
    found = dataset.to_table(filter=pa.compute.field(STATUS) == QUARANTINED)
    assert found["key"].to_pylist() == [1]


def test_what_others_do_to_the_table_is_undone(source, tmp_path):
    ledger = spend(source, tmp_path / "out")
    DeltaTable(ledger.output).optimize.compact()
    assert len(DeltaTable(ledger.output).file_uris()) == 1
    table = DeltaTable(ledger.output)
    doomed = table.vacuum(retention_hours=0, enforce_retention_duration=False, dry_run=True, full=True)
    # They are old now, and no longer listed; but nothing else is.
    assert {Path(name).parts[0] for name in doomed} == {"data"}
    ledger = spend(source, tmp_path / "out")
    assert check_same(ledger) == list(range(40))
    table = DeltaTable(ledger.output)
    doomed = table.vacuum(retention_hours=0, enforce_retention_duration=False, dry_run=True, full=True)
    assert not any(name.startswith(("data/", "_acsr/")) for name in doomed)


def test_an_older_run_commits_nothing(source, tmp_path):
    older = Ledger(str(tmp_path / "out"))
    begin_delta(older.storage)
    empty = older.snapshot()
    spend(source, tmp_path / "out")
    with pytest.raises(DeltaConflictError, match="is at snapshot 3, this run at 0"):
        older.settle(empty)
    assert len(log(tmp_path / "out")) == 3


def test_two_at_the_same_snapshot_commit_once(source, tmp_path):
    ledger = spend(source, tmp_path / "out", begin=False)
    begin_delta(ledger.storage)
    snapshot = ledger.snapshot()
    first, second = find_delta(ledger.storage), find_delta(ledger.storage)
    sizes = ledger.storage.names("data")
    first.follow(snapshot, snapshot.names(), sizes)
    second.follow(snapshot, snapshot.names(), sizes)
    first.follow(snapshot, snapshot.names(), sizes)
    assert commits(tmp_path / "out") == [(3, 12, 0)]


def test_an_output_begun_anew_in_the_same_place(source, tmp_path):
    ledger = spend(source, tmp_path / "out")
    for path in (tmp_path / "out" / "data").iterdir():
        path.unlink()
    for folder in ("snapshots", "lease"):
        for path in (tmp_path / "out" / "_acsr" / folder).iterdir():
            path.unlink()
    (tmp_path / "out" / "_acsr" / "delta.json").unlink()
    (source / "part-0.parquet").unlink()
    ledger = spend(source, tmp_path / "out")
    assert check_same(ledger) == list(range(10, 40))


def test_a_log_that_cannot_be_written_holds_the_old_files(source, tmp_path, monkeypatch):
    ledger = spend(source, tmp_path / "out")
    write_shard(source / "part-1.parquet", range(100, 107))

    def failing(*args, **options):
        raise ledger.delta._library.exceptions.DeltaError("as told")

    monkeypatch.setattr(DeltaTable, "create_write_transaction", failing)
    with pytest.raises(FailedError, match="cannot follow: as told; to give the table up"):
        spend(source, tmp_path / "out")
    monkeypatch.undo()
    assert table_of(tmp_path / "out")["key"].to_pylist() == list(range(40))
    assert len(check_same(spend(source, tmp_path / "out"))) == 37
    monkeypatch.setattr(DeltaTable, "create_write_transaction", lambda *a, **o: exec("raise OSError('gone')"))
    write_shard(source / "part-1.parquet", [7])
    with pytest.raises(StorageError, match="gone"):
        spend(source, tmp_path / "out")


def test_what_cannot_become_a_table_is_refused_at_the_beginning(tmp_path, monkeypatch):
    write_shard(tmp_path / "in" / "a.parquet", [1], at=pa.array([1], pa.time32("s")))
    (shard,) = list_corpus(str(tmp_path / "in"))
    storage = open_storage(str(tmp_path / "out"))
    with pytest.raises(DeltaSchemaError, match="'at' is time32"):
        begin_delta(storage, shard)
    assert find_delta(storage) is None
    # A shard that is damaged does not say that the others are.
    (tmp_path / "in" / "a.parquet").write_bytes(b"PAR1")
    begin_delta(storage, shard)
    assert find_delta(storage) is not None
    with pytest.raises(StorageLocationError, match="cannot be a Delta table"):
        begin_delta(open_storage("memory://delta/out"))

    def absent(name):
        raise ImportError(name)

    monkeypatch.setattr(delta.importlib, "import_module", absent)
    with pytest.raises(MissingExtraError, match=r"acsr-ray\[delta\]"):
        find_delta(storage)


def test_endpoints_without_encryption_are_allowed_only_where_they_are_named():
    named = {"AWS_ENDPOINT_URL": "http://127.0.0.1:9000"}
    assert storage_options("s3://b/out", named, Access()) == {
        "aws_endpoint_url": "http://127.0.0.1:9000",
        "aws_allow_http": "true",
    }
    assert storage_options("s3://b/out", {}, Access()) == {}
    keys = Access("http://minio:9000", "here", access_key="who", secret_key="what")
    assert storage_options("s3://b/out", named, keys) == {
        "aws_endpoint_url": "http://minio:9000",
        "aws_region": "here",
        "aws_access_key_id": "who",
        "aws_secret_access_key": "what",
        "aws_allow_http": "true",
    }
    with pytest.raises(StorageLocationError, match="profile"):
        storage_options("s3://b/out", named, Access(profile="mine"))
    assert storage_options("/data/out", named, Access()) == {}
    own = {**named, "AWS_ENDPOINT_URL_S3": "https://store"}
    assert storage_options("s3a://b/out", own, Access()) == {"aws_endpoint_url": "https://store"}


@pytest.mark.slow
def test_in_an_object_store(source, tmp_path, monkeypatch):
    boto3 = pytest.importorskip("boto3")
    from moto.server import ThreadedMotoServer
    from s3fs import S3FileSystem

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        environment = {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "eu-central-1",
        }
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        S3FileSystem.clear_instance_cache()
        place = {"LocationConstraint": "eu-central-1"}
        boto3.client("s3").create_bucket(Bucket="corpus", CreateBucketConfiguration=place)
        spend(source, "s3://corpus/out")
        write_shard(source / "ä %b.parquet", range(100, 107), size=pa.array([1.5] * 7))
        (source / "part-0.parquet").unlink()
        ledger = spend(source, "s3://corpus/out")
        table = DeltaTable(
            ledger.output, storage_options=storage_options(ledger.output, os.environ, Access())
        )
        assert table.transaction_version(find_delta(ledger.storage).app_id) == ledger.snapshot().number
        keys = table.to_pyarrow_table()["key"].to_pylist()
        assert sorted(keys) == [*range(10, 40), *range(100, 107)]
        version = table.version()
        spend(source, "s3://corpus/out")
        table.update_incremental()
        assert table.version() == version
    finally:
        server.stop()
        S3FileSystem.clear_instance_cache()
