"""The output folder: first writer wins, receipts survive, foreign output is refused, snapshots clean up."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from acsr_ray.columns import PURIFIED, QUARANTINED, REASON, STATUS
from acsr_ray.corpus.ledger import Ledger, Receipt, total
from acsr_ray.corpus.sources import CorpusError

NAME = "train/a.rows-0000000-0000003.0123abcd.parquet"


def unit_table(text: str = "x") -> pa.Table:
    statuses = [PURIFIED, QUARANTINED, PURIFIED, QUARANTINED]
    reasons = [None, "empty", "solver_fallback", "decode_error"]
    columns = {"text": [text] * 4, STATUS: statuses, REASON: pa.array(reasons, pa.string())}
    return pa.table(columns).replace_schema_metadata({"huggingface": "{}"})


def refused_table(data: bytes = b"original") -> pa.Table:
    return pa.table({"row": [1, 3], "bytes": pa.array([b"", data], pa.large_binary())})


def all_files(ledger: Ledger) -> set[str]:
    return {p.relative_to(ledger.output).as_posix() for p in ledger.output.rglob("*") if p.is_file()}


@pytest.fixture
def ledger(tmp_path):
    return Ledger(str(tmp_path / "out"))


def test_publish_makes_a_complete_unit_visible(ledger):
    receipt = ledger.publish(NAME, unit_table(), refused_table())
    assert receipt == Receipt(NAME, 4, {PURIFIED: 2, QUARANTINED: 2}, {"empty": 1, "decode_error": 1})
    assert ledger.published() == {NAME}
    table = pq.read_table(ledger.data / NAME)
    assert table.equals(unit_table())
    assert table.schema.metadata[b"huggingface"] == b"{}"
    assert not list((ledger.private / "staging").iterdir())


def test_the_first_publication_wins(ledger):
    first = ledger.publish(NAME, unit_table("first"), refused_table(b"first"))
    before = (ledger.data / NAME).read_bytes()
    quarantine = (ledger.private / "quarantine" / NAME).read_bytes()
    ledger.publish(NAME, unit_table("second"), refused_table(b"second"))
    assert (ledger.data / NAME).read_bytes() == before
    assert (ledger.private / "quarantine" / NAME).read_bytes() == quarantine
    assert ledger.receipt(NAME) == first
    assert not list((ledger.private / "staging").iterdir())


def test_receipts_describe_the_file_that_is_there(ledger):
    ledger.publish(NAME, unit_table(), None)
    late = unit_table().slice(0, 1)
    ledger.publish(NAME, late, None)
    assert ledger.receipt(NAME).rows == pq.read_metadata(ledger.data / NAME).num_rows == 4


def test_receipt_is_rebuilt_from_the_footer(ledger):
    receipt = ledger.publish(NAME, unit_table(), None)
    for path in (ledger.private / "receipts").rglob("*.json"):
        path.unlink()
    assert ledger.receipt(NAME) == receipt
    assert list((ledger.private / "receipts").rglob("*.json"))


def test_a_file_without_a_receipt_in_it_is_refused(ledger):
    (ledger.data / NAME).parent.mkdir(parents=True)
    pq.write_table(pa.table({"a": [1]}), ledger.data / NAME)
    with pytest.raises(CorpusError, match="not written by a purification"):
        ledger.receipt(NAME)


def test_quarantine_holds_the_original_bytes(ledger):
    ledger.publish(NAME, unit_table(), refused_table(b"\x89broken"))
    assert pq.read_table(ledger.private / "quarantine" / NAME)["bytes"].to_pylist() == [b"", b"\x89broken"]


@pytest.mark.parametrize("nothing", [None, refused_table().slice(0, 0)])
def test_no_quarantine_file_without_refused_rows(ledger, nothing):
    ledger.publish(NAME, unit_table(), nothing)
    assert not (ledger.private / "quarantine").exists()


def test_claim_refuses_other_settings_and_lists_them(ledger):
    ledger.claim({"limit": None, "bundle_digest": "abc", "decode": {"max_side": 5}})
    ledger.claim({"limit": None, "bundle_digest": "abc", "decode": {"max_side": 5}})
    with pytest.raises(CorpusError, match="other settings") as error_info:
        ledger.claim({"limit": 10, "bundle_digest": "abc", "decode": {"max_side": 6}, "new": 1})
    message = str(error_info.value)
    assert "limit: None -> 10" in message
    assert "decode: {'max_side': 5} -> {'max_side': 6}" in message
    assert "new: None -> 1" in message
    assert "bundle_digest" not in message
    assert json.loads((ledger.private / "run.json").read_text())["limit"] is None


def test_claim_refuses_a_foreign_data_folder(ledger):
    ledger.data.mkdir(parents=True)
    ledger.claim({"limit": 1})
    (ledger.private / "run.json").unlink()
    (ledger.data / "mine.txt").write_text("x")
    with pytest.raises(CorpusError, match="no purification here wrote"):
        ledger.claim({"limit": 1})
    assert not (ledger.private / "run.json").exists()
    assert (ledger.data / "mine.txt").read_text() == "x"


def test_commit_removes_what_is_superseded_and_sweeps_staging(ledger):
    ledger.claim({"limit": 1})
    old = "train/a.rows-0000000-0000003.ffffffff.parquet"
    ledger.publish(old, unit_table("old"), refused_table())
    receipt = ledger.publish(NAME, unit_table("new"), refused_table())
    (ledger.private / "staging" / "left.tmp").write_bytes(b"half")
    ledger.commit([receipt])
    assert ledger.published() == {NAME}
    assert all_files(ledger) == {
        f"data/{NAME}",
        f"_acsr/quarantine/{NAME}",
        f"_acsr/receipts/{NAME.removesuffix('.parquet')}.json",
        "_acsr/manifest.json",
        "_acsr/run.json",
    }
    manifest = json.loads((ledger.private / "manifest.json").read_text())
    assert manifest["files"] == {NAME: {"rows": 4, PURIFIED: 2, QUARANTINED: 2}}


def test_nothing_private_but_quarantine_looks_like_parquet(ledger):
    ledger.publish(NAME, unit_table(), None)
    (ledger.private / "staging" / "left.tmp").write_bytes(b"half")
    assert not list(ledger.private.rglob("*.parquet"))


def test_total_adds_up(ledger):
    one = ledger.publish(NAME, unit_table(), None)
    two = Receipt("b", 3, {PURIFIED: 2, QUARANTINED: 1}, {"empty": 1})
    sums = total([one, two])
    assert sums["rows"] == 7
    assert sums["statuses"] == {PURIFIED: 4, QUARANTINED: 3}
    assert sums["quarantined"] == {"empty": 2, "decode_error": 1}


def test_units_that_replace_others_appear_only_when_those_are_gone(ledger):
    old, new = "a.rows-0000000-0000003.old.parquet", "a.rows-0000000-0000003.new.parquet"
    ledger.publish(old, unit_table(), None)
    receipt = ledger.publish(new, unit_table(), None, parked=True)
    assert ledger.published() == {old}
    assert ledger.finished() == {old, new}
    assert ledger.receipt(new) == receipt
    ledger.commit([receipt])
    assert ledger.published() == ledger.finished() == {new}
    assert pq.read_table(ledger.data / new).num_rows == 4


def test_shards_are_remembered_by_version(ledger):
    assert ledger.known_shards() == {}
    ledger.commit([], {"file:///a.parquet": ("10-1", "digest")})
    assert ledger.known_shards() == {"file:///a.parquet": ("10-1", "digest")}


def test_a_parked_unit_that_was_overtaken_leaves_nothing_behind(ledger):
    overtaken = "a.rows-0000000-0000003.mid.parquet"
    kept = ledger.publish(NAME, unit_table(), None)
    ledger.publish(overtaken, unit_table(), refused_table(), parked=True)
    ledger.commit([kept])
    assert ledger.finished() == {NAME}
    assert not [name for name in all_files(ledger) if ".mid" in name]
