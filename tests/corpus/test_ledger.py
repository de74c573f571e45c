"""The output: first writer wins, receipts survive, foreign output is refused, snapshots clean up."""

import hashlib
import io
import json
import uuid
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from acsr_ray.columns import PURIFIED, QUARANTINED, REASON, STATUS
from acsr_ray.corpus.lease import Lease
from acsr_ray.corpus.ledger import LateAttemptError, Ledger, shard_of
from acsr_ray.corpus.retrying import RetryOrder
from acsr_ray.corpus.snapshot import Receipt, ShardEntry, Snapshot, total
from acsr_ray.corpus.sources import CorpusError

SHARD = "train/a"
NAME = f"{SHARD}.rows-0000000-0000003.0123abcd.parquet"


def unit_table(text: str = "x") -> pa.Table:
    statuses = [PURIFIED, QUARANTINED, PURIFIED, QUARANTINED]
    reasons = [None, "empty", "solver_fallback", "decode_error"]
    columns = {"text": [text] * 4, STATUS: statuses, REASON: pa.array(reasons, pa.string())}
    return pa.table(columns).replace_schema_metadata({"huggingface": "{}"})


def refused_table(data: bytes = b"original") -> pa.Table:
    return pa.table({"row": [1, 3], "bytes": pa.array([b"", data], pa.large_binary())})


def snapshot_of(*receipts: Receipt, number: int = 1, complete: bool = True) -> Snapshot:
    shards = {}
    for receipt in receipts:
        relative = shard_of(receipt.name)
        before = shards[relative].receipts if relative in shards else ()
        shards[relative] = ShardEntry(f"in/{relative}", "1", "abc", (*before, receipt), "print", complete)
    return Snapshot(number, shards)


def files(ledger: Ledger) -> set[str]:
    return set(ledger.storage.names(""))


def read(ledger: Ledger, name: str) -> pa.Table:
    return pq.read_table(io.BytesIO(ledger.storage.read(name)))


@pytest.fixture(params=["disk", "objects"])
def ledger(tmp_path, request):
    return Ledger(str(tmp_path / "out") if request.param == "disk" else f"memory://{uuid.uuid4().hex}/out")


def test_publish_makes_a_complete_unit_visible(ledger):
    receipt = ledger.publish(NAME, unit_table(), refused_table(), first=7)
    kept = hashlib.sha256(ledger.storage.read(f"_acsr/quarantine/{NAME}")).hexdigest()
    assert replace(receipt, digest="") == Receipt(
        NAME, 4, {PURIFIED: 2, QUARANTINED: 2}, {"empty": 1, "decode_error": 1}, 7, kept_digest=kept
    )
    assert ledger.published() == {NAME}
    table = read(ledger, f"data/{NAME}")
    assert table.equals(unit_table())
    assert table.schema.metadata[b"huggingface"] == b"{}"
    assert files(ledger) == {f"data/{NAME}", f"_acsr/quarantine/{NAME}"}


def test_the_first_publication_wins(ledger):
    first = ledger.publish(NAME, unit_table("first"), refused_table(b"first"))
    before = ledger.storage.read(f"data/{NAME}")
    quarantine = ledger.storage.read(f"_acsr/quarantine/{NAME}")
    late = ledger.publish(NAME, unit_table("second"), refused_table(b"second"))
    assert ledger.storage.read(f"data/{NAME}") == before
    assert ledger.storage.read(f"_acsr/quarantine/{NAME}") == quarantine
    assert late == first == ledger.receipt(NAME)


def test_a_receipt_has_the_digest_of_the_bytes_that_are_kept_whoever_kept_them(ledger):
    # An attempt that died between its two files.
    buffer = io.BytesIO()
    pq.write_table(refused_table(b"first"), buffer)
    ledger.storage.create(f"_acsr/quarantine/{NAME}", buffer.getvalue())
    receipt = ledger.publish(NAME, unit_table(), refused_table(b"second"))
    assert receipt.kept_digest == hashlib.sha256(buffer.getvalue()).hexdigest()
    assert ledger.receipt(NAME) == receipt
    assert ledger.publish("b.rows-0-3.0.parquet", unit_table(), None).kept_digest == ""


def test_a_snapshot_of_before_kept_bytes_had_digests_is_read(ledger):
    receipt = ledger.publish(NAME, unit_table(), refused_table())
    content = json.loads(snapshot_of(receipt).to_json()) | {"schema_version": 3}
    at = content["unit_fields"].index("kept_digest")
    del content["unit_fields"][at]
    for entry in content["shards"].values():
        for fields in entry["units"]:
            del fields[at]
    read = Snapshot.from_json(json.dumps(content).encode(), "old")
    assert list(read.receipts()) == [replace(receipt, kept_digest="")]


def test_receipts_describe_the_file_that_is_there(ledger):
    first = ledger.publish(NAME, unit_table(), None)
    late = ledger.publish(NAME, unit_table().slice(0, 1), None)
    assert late == first
    assert late.rows == read(ledger, f"data/{NAME}").num_rows == 4


def test_a_file_without_a_receipt_in_it_is_refused(ledger):
    buffer = io.BytesIO()
    pq.write_table(pa.table({"a": [1]}), buffer)
    ledger.storage.create(f"data/{NAME}", buffer.getvalue())
    with pytest.raises(CorpusError, match="not written by a purification"):
        ledger.receipt(NAME)
    ledger.storage.write(f"data/{NAME}", b"PAR1 torn")
    with pytest.raises(CorpusError, match="is damaged"):
        ledger.receipt(NAME)


def test_quarantine_holds_the_original_bytes(ledger):
    ledger.publish(NAME, unit_table(), refused_table(b"\x89broken"))
    assert read(ledger, f"_acsr/quarantine/{NAME}")["bytes"].to_pylist() == [b"", b"\x89broken"]


@pytest.mark.parametrize("nothing", [None, refused_table().slice(0, 0)])
def test_no_quarantine_file_without_refused_rows(ledger, nothing):
    ledger.publish(NAME, unit_table(), nothing)
    assert files(ledger) == {f"data/{NAME}"}


def test_an_attempt_of_a_run_that_was_taken_over_stays_invisible(ledger):
    with Lease(ledger.storage) as first:
        ledger.publish(NAME, unit_table(), refused_table(), lease=first.number)
    with Lease(ledger.storage) as second:
        other = NAME.replace("0123abcd", "89abcdef")
        with pytest.raises(LateAttemptError, match="held by another run"):
            ledger.publish(other, unit_table(), refused_table(), lease=first.number)
        assert ledger.published() == {NAME}
        assert f"_acsr/quarantine/{other}" not in files(ledger)
        ledger.publish(other, unit_table(), None, lease=second.number)
        assert ledger.published() == {NAME, other}


def test_check_refuses_other_settings_and_lists_them(ledger):
    settings = {"limit": None, "bundle_digest": "abc", "decode": {"max_side": 5}}
    ledger.check(settings)
    ledger.claim(settings)
    ledger.check(settings)
    with pytest.raises(CorpusError, match="--anew") as error_info:
        ledger.check({"limit": 10, "bundle_digest": "abc", "decode": {"max_side": 6}, "new": 1})
    message = str(error_info.value)
    assert "limit: None -> 10" in message
    assert "decode.max_side: 5 -> 6" in message
    assert "new: None -> 1" in message
    assert "bundle_digest" not in message


def test_check_says_what_differs_inside_of_another_bundle(ledger):
    ledger.claim({"bundle_digest": "abc"}, {"bundle": {"cbpdn": {"lmbda": 0.1}, "name": "a"}})
    with pytest.raises(CorpusError) as error_info:
        ledger.check({"bundle_digest": "abd"}, {"bundle": {"cbpdn": {"lmbda": 0.2}, "name": "a"}})
    assert "bundle_digest: 'abc' -> 'abd'" in str(error_info.value)
    assert "bundle: bundle.cbpdn.lmbda: 0.1 -> 0.2" in str(error_info.value)
    assert "name" not in str(error_info.value)


def test_check_names_a_bundle_of_another_name_and_no_number_of_it(ledger):
    ledger.claim({"bundle_digest": "abc"}, {"bundle": {"cbpdn": {"lmbda": 0.1}, "name": "a"}})
    with pytest.raises(CorpusError, match=r"bundle\.name: 'a' -> 'b'") as error_info:
        ledger.check({"bundle_digest": "abd"}, {"bundle": {"cbpdn": {"lmbda": 0.2}, "name": "b"}})
    assert "lmbda" not in str(error_info.value)


def test_check_tells_only_the_first_of_many_differences(ledger):
    ledger.claim({f"setting-{number:02d}": 0 for number in range(30)})
    with pytest.raises(CorpusError, match="and 18 more") as error_info:
        ledger.check({f"setting-{number:02d}": 1 for number in range(30)})
    assert "setting-11" in str(error_info.value)
    assert "setting-12" not in str(error_info.value)


def test_check_refuses_a_foreign_data_folder(ledger):
    ledger.storage.create("data/mine.txt", b"x")
    with pytest.raises(CorpusError, match="no purification here wrote"):
        ledger.check({"limit": 1})
    assert files(ledger) == {"data/mine.txt"}


def test_the_name_that_settings_will_give_is_known_before(ledger):
    binding = ledger.binding
    assert binding.naming_after({"a": 1}, "first") == "first"
    ledger.claim({"a": 1})
    binding.order_retry(RetryOrder(1, frozenset()), {"a": 2}, "first")
    assert binding.naming_after({"a": 2}, "second") == "first"
    # The settings of before again: their own name stands for units made under others.
    later = binding.naming_after({"a": 1}, "first")
    assert later != "first"
    ledger.claim({"a": 1})
    assert binding.naming("first") == later


def test_a_snapshot_comes_back_as_it_was(ledger):
    assert ledger.snapshot() == Snapshot()
    receipt = ledger.publish(NAME, unit_table(), None)
    snapshot = replace(snapshot_of(receipt), refused={"in/b.parquet": "truncated: it ends early"})
    ledger.commit(snapshot)
    assert ledger.snapshot() == snapshot


def test_a_snapshot_of_a_later_release_is_refused(ledger):
    content = json.loads(Snapshot(1).to_json()) | {"schema_version": 99}
    ledger.storage.create("_acsr/snapshots/00000001.json", json.dumps(content).encode())
    with pytest.raises(CorpusError, match="schema version 99"):
        ledger.snapshot()


def test_commit_removes_what_is_superseded_and_sweep_the_rest(ledger):
    old = f"{SHARD}.rows-0000000-0000003.ffffffff.parquet"
    orphan = "gone.rows-0000000-0000003.ffffffff.parquet"
    ledger.publish(old, unit_table("old"), refused_table())
    ledger.publish(orphan, unit_table("orphan"), refused_table())
    receipt = ledger.publish(NAME, unit_table("new"), refused_table())
    ledger.storage.write("_acsr/staging/left.tmp", b"half")
    ledger.write_attempt(NAME, {"unit": NAME})
    snapshot = snapshot_of(receipt)
    ledger.commit(snapshot)
    assert ledger.published() == {NAME, orphan}
    assert ledger.sweep(snapshot) == [orphan]
    staged = {"_acsr/staging/left.tmp"} if ledger.output.startswith("memory") else set()
    assert files(ledger) == staged | {
        f"data/{NAME}",
        f"_acsr/quarantine/{NAME}",
        "_acsr/snapshots/00000001.json",
    }


def test_sweep_leaves_what_a_later_run_will_finish(ledger):
    kept = ledger.publish(NAME, unit_table(), None)
    waiting = f"{SHARD}.rows-0000004-0000007.0123abcd.parquet"
    ledger.publish(waiting, unit_table(), refused_table(), parked=True)
    ledger.write_attempt(waiting, {"unit": waiting})
    ledger.commit(snapshot_of(kept))
    assert ledger.sweep(snapshot_of(kept), {waiting}) == []
    assert ledger.finished() == {NAME, waiting}
    assert list(ledger.attempts()) == [{"unit": waiting}]


def test_files_of_an_incomplete_shard_are_left_alone(ledger):
    one = ledger.publish(NAME, unit_table(), None)
    two = f"{SHARD}.rows-0000004-0000007.0123abcd.parquet"
    ledger.publish(two, unit_table(), None)
    ledger.commit(snapshot_of(one, complete=False))
    assert ledger.published() == {NAME, two}


def test_a_snapshot_is_never_replaced(ledger):
    receipt = ledger.publish(NAME, unit_table(), None)
    ledger.commit(snapshot_of(receipt))
    ledger.commit(snapshot_of(receipt))
    with pytest.raises(CorpusError, match="another run committed snapshot 1"):
        ledger.commit(Snapshot(1))
    assert ledger.snapshot() == snapshot_of(receipt)


def test_only_the_last_snapshots_are_kept(ledger):
    for number in range(1, 12):
        ledger.commit(Snapshot(number))
    kept = sorted(name for name in files(ledger) if "snapshots" in name)
    assert kept == [f"_acsr/snapshots/{number:08d}.json" for number in (9, 10, 11)]


def test_units_that_replace_others_appear_only_when_those_are_gone(ledger):
    old, new = "a.rows-0000000-0000003.old.parquet", "a.rows-0000000-0000003.new.parquet"
    ledger.publish(old, unit_table(), None)
    receipt = ledger.publish(new, unit_table(), None, parked=True)
    assert ledger.published() == {old}
    assert ledger.finished() == {old, new}
    assert ledger.receipt(new) == receipt
    ledger.commit(snapshot_of(receipt))
    assert ledger.published() == ledger.finished() == {new}


def test_a_commit_that_was_interrupted_is_ended_by_the_next(ledger):
    old, new = "a.rows-0000000-0000003.old.parquet", "a.rows-0000000-0000003.new.parquet"
    ledger.publish(old, unit_table(), None)
    receipt = ledger.publish(new, unit_table(), None, parked=True)
    snapshot = snapshot_of(receipt)
    # The snapshot is there, and nothing after it was done.
    ledger.storage.create("_acsr/snapshots/00000001.json", snapshot.to_json())
    waiting = "b.rows-0000000-0000003.new.parquet"
    ledger.publish(waiting, unit_table(), None, parked=True)
    assert ledger.settle(ledger.snapshot()) == ({new}, {new, waiting})
    assert (ledger.published(), ledger.finished()) == ({new}, {new, waiting})


def test_nothing_private_but_quarantine_and_ready_looks_like_parquet(tmp_path):
    ledger = Ledger(str(tmp_path))
    receipt = ledger.publish(NAME, unit_table(), None)
    ledger.storage.write("_acsr/staging/left.tmp", b"half")
    ledger.commit(snapshot_of(receipt))
    assert not list((tmp_path / "_acsr").rglob("*.parquet"))


def test_total_adds_up(ledger):
    one = ledger.publish(NAME, unit_table(), None)
    two = Receipt("b", 3, {PURIFIED: 2, QUARANTINED: 1}, {"empty": 1})
    sums = total([one, two])
    assert sums["rows"] == 7
    assert sums["statuses"] == {PURIFIED: 4, QUARANTINED: 3}
    assert sums["quarantined"] == {"empty": 2, "decode_error": 1}
