"""What an output holds, whether a run is under way, how the last runs ended, and what is left to do."""

import json
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from acsr_ray.corpus.lease import look
from acsr_ray.corpus.ledger import ATTEMPTS, DATA, READY, Ledger
from acsr_ray.corpus.records import PROGRESS, failed_units, read_object, run_records
from acsr_ray.corpus.snapshot import Snapshot, total
from acsr_ray.corpus.sources import CorpusError, absolute_uri
from acsr_ray.filesystems import StoreSettings, over_stores

SHOWN = 5
RECORD_KEYS = ("run", "started_at", "outcome", "detail", "images", "this run", "elapsed_s")


class StatusSettings(StoreSettings):
    """Tell what an output holds, who writes it, how the last runs ended and what is unfinished."""

    sections: ClassVar[tuple[str, ...]] = ("purify_corpus",)
    borrows: ClassVar[bool] = True

    output: str | None = None
    """Folder or URI of a purification."""

    def render(self, summary: Mapping[str, Any]) -> str:
        """Return the status as a few lines."""
        return told_status(summary)


@over_stores
def output_status(settings: StatusSettings) -> dict[str, Any]:
    """Return the status of an output, from what lies there; costs a listing and the snapshot.

    Raises:
        CorpusError: no purification is there.
    """
    if settings.output is None:
        raise CorpusError("--output is needed: the folder or URI of a purification")
    ledger = Ledger(absolute_uri(settings.output))
    bound = ledger.binding.settings()
    if bound is None:
        raise CorpusError(f"no purification at {ledger.output}: it has no _acsr/run.json")
    snapshot, sizes = ledger.snapshot(), ledger.storage.names(DATA)
    sums = total(snapshot.receipts())
    lease = look(ledger.storage)
    under_way = lease is not None and lease.lives
    return {
        "output": ledger.output,
        "input": bound.get("input"),
        "snapshot": snapshot.number,
        "shards": len(snapshot.shards),
        "units": sum(len(entry.receipts) for entry in snapshot.shards.values()),
        "images": sums["rows"],
        "megabytes": round(sum(sizes.values()) / 2**20, 1),
        "statuses": sums["statuses"],
        "quarantined": sums["quarantined"],
        "under_way": under_way,
        "lease": None if lease is None else lease.to_dict(),
        "progress": read_object(ledger.storage, PROGRESS) if under_way else None,
        "runs": [
            {key: record[key] for key in RECORD_KEYS if key in record}
            | {
                "failed_units": record.get("failed_units_total", len(record.get("failed_units") or {})),
                # Records of before have the number alone.
                "removed_shards": record.get("removed_shards_total", record.get("removed_shards", 0)),
            }
            for record in run_records(ledger.storage, SHOWN)
        ],
        "unfinished": unfinished(ledger, snapshot, sizes.keys(), under_way=under_way),
    }


def unfinished(
    ledger: Ledger, snapshot: Snapshot, there: Iterable[str], *, under_way: bool = False
) -> dict[str, Any]:
    """Return what a run would still do, or has left behind; only what there is.

    Args:
        ledger: of the output.
        snapshot: the current one.
        there: names of the files in `data/`.
        under_way: whether a run is at work, whose progress says the rest.
    """
    listed, visible = snapshot.names(), {name for name in there if name.endswith(".parquet")}
    order = ledger.binding.retry_order()
    failed = {name: why for name, why in failed_units(ledger.storage).items() if name not in listed}
    found: dict[str, Any] = {
        "incomplete_shards": [name for name, entry in snapshot.shards.items() if not entry.complete],
        "images_not_begun": 0 if under_way else _not_begun(read_object(ledger.storage, PROGRESS)),
        "refused_shards": dict(snapshot.refused),
        "failed_units": failed,
        "unlisted_units": len(visible - listed),
        "missing_units": sorted(listed - visible),
        "parked_units": len(ledger.storage.names(READY)),
        "units_that_fell": len(ledger.storage.names(ATTEMPTS)),
        "retry": order.to_dict() if order is not None and order.is_open else None,
    }
    return {key: value for key, value in found.items() if value}


def _not_begun(progress: Mapping[str, Any] | None) -> int:
    """Return about how many images the last run still had before it, if it was stopped or killed."""
    if progress is None or progress.get("outcome") not in ("stopped", "running"):
        return 0
    expected, done = progress.get("images_expected"), progress.get("images_done")
    return max(0, expected - done) if isinstance(expected, int) and isinstance(done, int) else 0


def told_status(status: Mapping[str, Any]) -> str:
    """Return a status as lines for people."""
    lines = [
        f"output       {status['output']}",
        f"input        {status['input']}",
        f"images       {status['images']} in {status['units']} units of {status['shards']} shards, "
        f"{status['megabytes']} MiB (snapshot {status['snapshot']})",
        f"statuses     {_counts(status['statuses'])}",
        f"quarantined  {_counts(status['quarantined'])}",
        f"run          {_told_run(status)}",
    ]
    for record in status["runs"]:
        done = record.get("this run", f"{record.get('images', '?')} images")
        detail = f", {record['detail']}" if record.get("detail") else ""
        failed = f", {record['failed_units']} units failed" if record["failed_units"] else ""
        seconds = record.get("elapsed_s")
        took = "" if seconds is None else f" in {seconds} s"
        lines.append(f"before       {record['run']} {record['outcome']}: {done}{took}{failed}{detail}")
    for key, value in status["unfinished"].items():
        lines.append(f"unfinished   {key.replace('_', ' ')}: {_shortened(value)}")
    if not status["unfinished"]:
        lines.append("unfinished   nothing")
    return "\n".join(lines)


def _told_run(status: Mapping[str, Any]) -> str:
    lease, progress = status["lease"], status["progress"]
    if lease is None or lease["released"]:
        return "none under way"
    who = f"process {lease.get('pid')} of {lease.get('host')} since {lease.get('since')}"
    if not status["under_way"]:
        return f"none under way; {who} ended without giving the output back"
    told = f"{who}, beat {lease['beat_age_s']} s ago"
    if progress is None:
        return told
    done, planned, rate, left = map(progress.get, ("images_done", "images_planned", "images_per_s", "eta_s"))
    return f"{told}; {done} of {planned} images, {rate}/s, {left} s left"


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items()) or "none"


def _shortened(value: Any) -> str:  # noqa: ANN401  (a JSON value)
    if isinstance(value, list):
        more = f" and {len(value) - SHOWN} more" if len(value) > SHOWN else ""
        return f"{len(value)} ({', '.join(value[:SHOWN])}{more})"
    if isinstance(value, Mapping) and "number" not in value:
        shown = "; ".join(f"{name}: {why}" for name, why in list(value.items())[:SHOWN])
        more = f"; and {len(value) - SHOWN} more" if len(value) > SHOWN else ""
        return f"{len(value)} ({shown}{more})"
    return json.dumps(value)
