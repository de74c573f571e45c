"""The verb: page and JSON beside the record, on disks and in object stores, whatever is missing."""

import json
import uuid

import pytest

from acsr_ray.corpus.ledger import Ledger
from acsr_ray.reporting.job import ReportSettings, report, report_after_run, write_report
from acsr_ray.reporting.record import RunNotFoundError
from acsr_ray.storage import StorageError


@pytest.fixture
def recorded(purified, record_of, keep):
    return keep(purified, record_of(purified))


def test_page_and_json_lie_beside_the_record(purified, recorded):
    told = report(ReportSettings(output=str(purified.output)))
    folder = purified.output / "_acsr" / "runs" / recorded
    assert {path.name for path in folder.iterdir()} == {"record.json", "report.html", "report.json"}
    assert told["report"] == str(folder / "report.html")
    assert (told["run"], told["outcome"], told["pictures"]) == (recorded, "done", 24)
    content = json.loads((folder / "report.json").read_text())
    assert content["record"]["images"] == 60
    assert sum(map(len, content["examples"].values())) == 24
    assert len(content["quarantined"]) == 6
    assert sum(content["clusters"]["images"].values()) == 54
    assert content["planned"][0]["inside"] is True
    assert sorted(path.name for path in (purified.output / "data").iterdir()) == sorted(
        purified.ledger.published()
    )


def test_the_same_output_gives_the_same_page(purified, recorded):
    page = purified.output / "_acsr" / "runs" / recorded / "report.html"
    write_report(purified.ledger, recorded, images=2)
    first = page.read_bytes()
    write_report(Ledger(str(purified.output)), recorded, images=2)
    assert page.read_bytes() == first


def test_an_output_in_an_object_store(purify, hostile_corpus, record_of, keep):
    purified = purify(hostile_corpus, f"memory://{uuid.uuid4().hex}")
    keep_run = keep(purified, {"run": "20260101T000000Z", "outcome": "done", "input": str(hostile_corpus)})
    told = report_after_run(purified.ledger, keep_run)
    assert told == f"{purified.ledger.output}/_acsr/runs/{keep_run}/report.html"
    page = purified.ledger.storage.read(f"_acsr/runs/{keep_run}/report.html").decode()
    assert page.count("<img") > 72


def test_what_cannot_be_reported_is_an_error_of_the_verb_and_a_line_of_a_run(
    tmp_path, purified, caplog, monkeypatch
):
    with pytest.raises(RunNotFoundError, match="no purification"):
        report(ReportSettings(output=str(tmp_path / "nothing")))
    with pytest.raises(RunNotFoundError, match="no run 'x'"):
        report(ReportSettings(output=str(purified.output), run="x"))
    assert report_after_run(purified.ledger, "x") is None
    assert "no report of run x" in caplog.text

    def fail(*_):
        raise StorageError("full")

    monkeypatch.setattr(purified.ledger.storage, "read", fail)
    assert report_after_run(purified.ledger, "y") is None
