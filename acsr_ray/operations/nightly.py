"""The night's job: purify what is new or changed, forget what is gone, and say in one line how it went.

Nothing here decides what is new: that is `purify_corpus`. This is what a scheduler needs around it: stops
that can be resumed are resumed, an input that vanished empties no output, and the exit code is not 0 only
where somebody has to look.
"""

import json
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import Field

from acsr_ray.config import AcsrError, FailedError, ResumableStop
from acsr_ray.corpus.changes import list_corpus
from acsr_ray.corpus.differences import shard_changes
from acsr_ray.corpus.lease import LeaseError
from acsr_ray.corpus.ledger import Ledger
from acsr_ray.corpus.run_record import told_changes
from acsr_ray.corpus.snapshot import Snapshot, total
from acsr_ray.corpus.sources import CorpusError, absolute_uri
from acsr_ray.corpus.stopping import StopRequest, StopRequested, stop_request
from acsr_ray.distributed.purify import purify_corpus
from acsr_ray.distributed.purify_settings import PurifyCorpusSettings
from acsr_ray.distributed.standing import completed
from acsr_ray.filesystems import connected

logger = logging.getLogger(__name__)

SHOWN = 20
COUNTS = ("new", "changed", "removed", "refused", "images", "quarantined")


class RepurifyNightlySettings(PurifyCorpusSettings):
    """Purify what is new or changed since the last night, remove what left the input; one summary line.

    Settings are those of the output unless given, so that after the first night --output is enough.
    """

    sections: ClassVar[tuple[str, ...]] = ("purify_corpus", "repurify_nightly")

    max_removed_share: float = Field(0.5, ge=0, le=1)
    """Fail, and remove nothing, where more than this share of what was purified is no longer in the input."""
    attempts: int = Field(3, ge=1)
    """How often a stop that can be resumed is resumed before the job ends with 75."""
    pause_s: float = Field(60.0, ge=0)
    """Seconds before each further attempt."""
    strict: bool = False
    """Fail where a shard of the input cannot be read, even if others can."""

    def render(self, summary: Mapping[str, Any]) -> str:
        """Return the line for a scheduler's log."""
        return told_night(summary)


@dataclass
class Attempts:
    """How the night's attempts went, and what they found."""

    output: str
    count: int = 0
    outcome: str = "done"
    error: str = ""
    exit_code: int = 0
    before: Snapshot | None = None
    """Of the evening; None where the output could never be read."""

    def end(self, error: Exception | None) -> None:
        """Note how an attempt ended; None: well."""
        self.error = "" if error is None else str(error)
        if error is None:
            self.outcome, self.exit_code = "done", 0
        elif isinstance(error, ResumableStop | LeaseError):
            self.outcome, self.exit_code = "stopped", ResumableStop.exit_code
        elif isinstance(error, AcsrError):
            self.outcome = "failed" if isinstance(error, FailedError) else "refused"
            self.exit_code = error.exit_code
        else:
            logger.error("not foreseen", exc_info=error)
            self.error = f"{type(error).__name__}: {error}"
            self.outcome, self.exit_code = "failed", FailedError.exit_code


def repurify_nightly(settings: RepurifyNightlySettings) -> dict[str, Any]:
    """Spend a night and return its summary; where it did not end well, with `error` and `exit_code`.

    Whatever happens once there is an output to speak of is told so, and not raised: a scheduler's log is to
    have its line of the nights that fail, above all. Counts are zeros where the output cannot be read.

    Raises:
        CorpusError: no output is named.
    """
    if settings.output is None:
        raise CorpusError("--output is needed, and on the first night --input")
    attempts, began = Attempts(settings.output), time.monotonic()
    with stop_request() as stop:
        _attempt(settings, attempts, stop)
    before = attempts.before or Snapshot()
    after = _look_again(settings, attempts)
    night, refused = compare(before, after), after.refused
    summary: dict[str, Any] = {
        "outcome": attempts.outcome,
        **night,
        "refused": len(refused),
        "refused_first": dict(list(refused.items())[:SHOWN]),
        "attempts": attempts.count,
        "seconds": round(time.monotonic() - began, 1),
        "corpus": _corpus(after),
        "output": attempts.output,
    }
    _judge(settings, after, attempts)
    if attempts.exit_code:
        summary |= {"outcome": attempts.outcome, "error": attempts.error, "exit_code": attempts.exit_code}
    return summary


def compare(before: Snapshot, after: Snapshot) -> dict[str, Any]:
    """Return what a night changed: shards new, changed and removed, and images and quarantined rows done.

    Args:
        before: the snapshot of the evening.
        after: the one of the morning.
    """
    known, changes = before.names(), shard_changes(before, after)
    sums = total(receipt for receipt in after.receipts() if receipt.name not in known)
    return {
        "new": len(changes.new),
        "changed": len(changes.changed),
        "removed": len(changes.removed),
        **told_changes(changes),
        "images": sums["rows"],
        "quarantined": sum(sums["quarantined"].values()),
        "reasons": sums["quarantined"],
    }


def told_night(summary: Mapping[str, Any]) -> str:
    """Return a night as one line of `key=value`."""
    pairs = [f"{key}={summary[key]}" for key in ("outcome", *COUNTS, "seconds", "attempts")]
    if "error" in summary:
        first, _, _ = summary["error"].partition("\n")
        pairs.append(f"detail={json.dumps(first)}")
    return " ".join(["acsr_ray nightly", *pairs])


def _attempt(settings: RepurifyNightlySettings, attempts: Attempts, stop: StopRequest) -> None:
    """Run until the end, a failure, or the last attempt's stop."""
    while True:
        attempts.count += 1
        try:
            with connected(settings.connection):
                _run(settings, attempts, stop)
        except Exception as error:  # the night's line is owed whatever happens
            attempts.end(error)
            may_go_on = attempts.outcome == "stopped" and not isinstance(error, StopRequested)
            if may_go_on and attempts.count < settings.attempts and _pause(settings.pause_s, stop, error):
                continue
        else:
            attempts.end(None)
        return


def _run(settings: RepurifyNightlySettings, attempts: Attempts, stop: StopRequest) -> None:
    """Purify with the output's own settings, which a store that is down does not give either."""
    assert settings.output is not None
    ledger = Ledger(absolute_uri(settings.output))
    attempts.output = ledger.output
    settings = completed(settings)
    if attempts.before is None:
        attempts.before = ledger.snapshot()
    # Purifying listens for stops itself, and only for those to come.
    stop.check()
    try:
        purify_corpus(settings)
    except (ResumableStop, LeaseError, FailedError):
        raise
    except AcsrError as error:
        if attempts.before.shards and _is_gone(settings.input):
            told = f"the input is gone, and the output keeps what was purified of it: {error}"
            raise FailedError(told) from error
        raise


def _look_again(settings: RepurifyNightlySettings, attempts: Attempts) -> Snapshot:
    """Return the snapshot of the morning, or that of the evening where it cannot be read."""
    if attempts.before is None:
        return Snapshot()
    try:
        with connected(settings.connection):
            return Ledger(attempts.output).snapshot()
    except Exception as error:  # as above
        logger.warning("what the night changed cannot be told: %s", error)
        if attempts.outcome == "done":
            attempts.end(error)
        return attempts.before


def _pause(seconds: float, stop: StopRequest, error: Exception) -> bool:
    """Wait before another attempt; False where the job is asked to stop meanwhile."""
    logger.warning("%s; trying again in %g s", error, seconds)
    ends = time.monotonic() + seconds
    while not stop.is_made and time.monotonic() < ends:
        time.sleep(min(1.0, max(0.0, ends - time.monotonic())))
    return not stop.is_made


def _is_gone(location: str | None) -> bool:
    """Return whether an input is not there, or holds nothing that could be purified."""
    if location is None:
        return False
    try:
        list_corpus(location)
    except CorpusError:
        return True
    return False


def _judge(settings: RepurifyNightlySettings, after: Snapshot, attempts: Attempts) -> None:
    """Make a night that ended into a failed one where shards could not be read and that matters."""
    refused = after.refused
    if attempts.outcome != "done" or not refused:
        return
    uri, why = next(iter(refused.items()))
    none_left = all(entry.uri in refused for entry in after.shards.values())
    if none_left or settings.strict:
        which = "no shard" if none_left else f"{len(refused)} shards"
        error = FailedError(f"{which} of the input can{'' if none_left else 'not'} be read: {uri}: {why}")
        attempts.end(error)


def _corpus(snapshot: Snapshot) -> dict[str, Any]:
    sums = total(snapshot.receipts())
    return {
        "shards": len(snapshot.shards),
        "images": sums["rows"],
        "statuses": sums["statuses"],
        "quarantined": sums["quarantined"],
    }
