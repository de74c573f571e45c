"""What somebody has to look at after a run, each with what to do about it."""

from collections.abc import Iterator

from acsr_ray.columns import QUARANTINED
from acsr_ray.reporting.planned import compare
from acsr_ray.reporting.record import RunRecord
from acsr_ray.reporting.wording import counted, number, percent

QUARANTINE_ALARM = 0.01
"""Share of refused images from which on a corpus looks broken rather than blemished."""

ENDS = {
    "stopped": "The same command goes on from there; what was published stays.",
    "failed": "What was published stays. See the log of the run, mend the cause, and give the same command.",
    "running": "The run had not ended when this page was written: figures are of what it had done so far.",
    "unknown": "The run left no record of how it ended, as runs of an earlier release or after a crash.",
}


def notices(record: RunRecord) -> Iterator[tuple[str, str]]:
    """Yield (what is the matter, what to do), most urgent first."""
    if record.outcome in ENDS:
        told = f"{record.detail.rstrip('.')}. " if record.detail else ""
        yield record.outcome.capitalize(), f"{told}{ENDS[record.outcome]}"
    if record.num_failed:
        what = counted(record.num_failed, "unit failed", "units failed")
        yield what, "Their rows are not in the output. The same command tries them again."
    if record.num_refused:
        what = counted(record.num_refused, "shard was refused", "shards were refused")
        yield what, "Listed below with the reason. Mend or remove, and give the same command again."
    statuses = record.statuses or (record.corpus.statuses if record.corpus else {})
    done, refused = sum(statuses.values()), statuses.get(QUARANTINED, 0)
    if done and refused / done > QUARANTINE_ALARM:
        what = f"{percent(refused, done)} of the images are in quarantine"
        yield (
            what,
            "The reasons tell whether a source is broken. Their rows are there, with a null image, and their "
            "bytes in _acsr/quarantine/; `acsr-ray retry` tries those again that may come out better.",
        )
    if record.num_removed:
        what = counted(record.num_removed, "shard", "shards") + " left the input"
        yield what, "Their output was removed with them. If that was not meant, restore them and run again."
    if record.retries:
        what = counted(record.retries, "unit was", "units were") + " tried again"
        yield what, "Workers were lost or hung; nothing is missing. Many mean nodes short of memory."
    for comparison in compare(record):
        if not comparison.is_inside and comparison.quantity == "images_per_s":
            yield (
                f"{number(comparison.ratio)} times the planned rate",
                "Outside the planned range: other hardware, other images, or a busy cluster. Plan again.",
            )
    for field, why in record.unreadable.items():
        yield f"{record.origin or 'The record'}: {field} cannot be read", why
