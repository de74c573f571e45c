"""`acsr-ray report`: the page of a run and the same as JSON, beside the run's record."""

import json
import logging
from dataclasses import asdict
from typing import Any, ClassVar

from pydantic import Field

from acsr_ray.corpus.ledger import Ledger
from acsr_ray.corpus.records import RUNS
from acsr_ray.corpus.sources import CorpusError, absolute_uri
from acsr_ray.filesystems import StoreSettings, over_stores
from acsr_ray.reporting.contents import Contents, Measure, gather
from acsr_ray.reporting.notices import notices
from acsr_ray.reporting.page import run_page
from acsr_ray.reporting.pictures import Picture
from acsr_ray.reporting.planned import compare
from acsr_ray.reporting.record import load_record

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 1
HTML, JSON = "report.html", "report.json"


class ReportSettings(StoreSettings):
    """Write the report of a purification run: one HTML page that needs nothing else, and report.json."""

    sections: ClassVar[tuple[str, ...]] = ("purify_corpus",)
    borrows: ClassVar[bool] = True

    output: str | None = None
    """Folder or URI of the purified corpus, as it was given to purify."""
    run: str | None = None
    """Which run; the last one unless given."""
    input: str | None = None
    """Where the corpus is now, if it was moved since; originals are read from there."""
    images: int = Field(24, ge=0, le=200)
    """Examples of before and after."""


@over_stores
def report(settings: ReportSettings) -> dict[str, Any]:
    """Write the report of a run and return where it is.

    Raises:
        CorpusError: no output is named.
        RunNotFoundError: no such run, or no purification at all.
        StorageError: the output's storage does not answer.
    """
    if settings.output is None:
        raise CorpusError("--output is needed: the folder or URI of a purification")
    source = absolute_uri(settings.input) if settings.input else None
    return write_report(
        Ledger(absolute_uri(settings.output)), settings.run, images=settings.images, source=source
    )


def write_report(
    ledger: Ledger, run: str | None = None, *, images: int = 24, source: str | None = None
) -> dict[str, Any]:
    """Write `report.html` and `report.json` of a run beside its record.

    Args:
        ledger: of the output.
        run: which; the last one unless given.
        images: examples of before and after.
        source: where the corpus is now, if it was moved.
    """
    snapshot = ledger.snapshot()
    record = load_record(ledger.storage, snapshot, run)
    contents = gather(ledger.storage, snapshot, record, images=images, source=source)
    folder = f"{RUNS}/{record.run}"
    told = json.dumps(to_json(contents), indent=1, default=str)
    # Names of a corpus may hold lone surrogates, which are no UTF-8.
    ledger.storage.write(f"{folder}/{JSON}", (told + "\n").encode("utf-8", "backslashreplace"))
    ledger.storage.write(report_file(record.run), run_page(contents).encode("utf-8", "backslashreplace"))
    return {
        "run": record.run,
        "outcome": record.outcome,
        "report": f"{ledger.output}/{report_file(record.run)}",
        "json": f"{ledger.output}/{folder}/{JSON}",
        "pictures": sum(map(len, contents.examples.values())),
    }


def report_file(run: str) -> str:
    """Return the name of a run's page in its output."""
    return f"{RUNS}/{run}/{HTML}"


def report_after_run(ledger: Ledger, run: str) -> str | None:
    """Write a run's report at its end; a report that fails is told in the log and harms nothing.

    Args:
        ledger: of the output.
        run: whose record is written.

    Returns:
        Where the page is, None where it could not be written.
    """
    try:
        where: str = write_report(ledger, run)["report"]
    except Exception as error:  # all is published: whatever is wrong with a page, the run is not
        logger.warning("no report of run %s: %s; `acsr-ray report` tries again", run, error)
        return None
    logger.info("report: %s", where)
    return where


def to_json(contents: Contents) -> dict[str, Any]:
    """Return what the page says, apart from its pictures, as JSON values."""
    record = contents.record
    return {
        "schema_version": SCHEMA_VERSION,
        "run": record.run,
        "record": record.model_dump(mode="json"),
        "notices": [{"what": what, "do": do} for what, do in notices(record)],
        "bundle": contents.names.bundle,
        "residual": _measure(contents.residual),
        "distance": _measure(contents.distance),
        "clusters": {
            "of": contents.usage_source,
            "images": {use.label: use.images for use in contents.usage},
        },
        "planned": [{**asdict(one), "ratio": one.ratio, "inside": one.is_inside} for one in compare(record)],
        "sample": contents.sample,
        "examples": {why: [_example(one) for one in own] for why, own in contents.examples.items()},
        "quarantined": [asdict(row) for row in contents.refused],
    }


def _measure(measure: Measure) -> dict[str, Any]:
    bins = measure.bins
    values = {"edges": list(bins.edges), "counts": list(bins.counts), "of": measure.source}
    if not bins.total:
        return values
    return {**values, "median": bins.quantile(0.5), "p95": bins.quantile(0.95)}


def _example(picture: Picture) -> dict[str, Any]:
    row = picture.row
    return {
        "shard": row.place.relative,
        "row": row.number,
        "path": row.path,
        "class": row.class_id,
        "cluster": row.cluster_id,
        "distance": row.distance,
        "residual": row.residual,
        "reason": row.reason,
        "original": picture.missing or "shown",
    }
