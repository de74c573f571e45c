"""Purify a corpus: the settings, the output's ledger and lease, a night's work, and the pipeline for it."""

import json
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any

import pyarrow as pa

from acsr_ray.artifacts import MANIFEST, json_digest
from acsr_ray.config import FailedError
from acsr_ray.corpus.changes import check_there, list_corpus
from acsr_ray.corpus.delta import begin_delta
from acsr_ray.corpus.lease import Lease
from acsr_ray.corpus.ledger import Ledger
from acsr_ray.corpus.night import Night, NightSettings
from acsr_ray.corpus.observing import ObservedRun, read_plan
from acsr_ray.corpus.retry_request import OrdinaryRun, RetryRequest
from acsr_ray.corpus.run_record import RunAbout, RunTally
from acsr_ray.corpus.sources import CorpusError, ImageFolder
from acsr_ray.corpus.stopping import stop_request
from acsr_ray.corpus.units import Unit, check_source
from acsr_ray.distributed.metrics import RunMetrics
from acsr_ray.distributed.pipeline import Pipelines
from acsr_ray.distributed.purify_settings import (
    PurifyCorpusSettings,
    binding_settings,
    deciding_settings,
    output_location,
)
from acsr_ray.distributed.wave import check_room
from acsr_ray.filesystems import connected
from acsr_ray.purification.bundle import (
    find_bundle,
    load_bundle,
)
from acsr_ray.reporting.job import report_after_run

logger = logging.getLogger(__name__)

SHOWN_FAILURES = 5
TOLD = {"batch_size", "device", "wave_units", "stage_timeout_s", "on_failure", "ray", "doubt", "target"}
"""Settings that a run's record tells beside those that decide its output; none may hold a secret."""


def purify_corpus(settings: PurifyCorpusSettings, retry: RetryRequest | None = None) -> dict[str, Any]:
    """Purify a corpus and return the closing summary.

    Args:
        settings: of the job.
        retry: do units again that were done, and nothing that is new.

    Raises:
        CorpusError: input or output that cannot be used, or another run holds the output.
        ArtifactError: a bundle that is absent or was changed.
        FailedError: units that could not be done; the others were.
        ResumableStop: a clean stop before the end, on request or because storage failed.
    """
    if not settings.input or not settings.output:
        raise CorpusError("--input and --output are needed (`purify --demo` needs neither)")
    with connected(settings.connection):
        return _purify_corpus(settings, settings.input, settings.output, retry)


def _purify_corpus(
    settings: PurifyCorpusSettings, location: str, output: str, retry: RetryRequest | None
) -> dict[str, Any]:
    ledger = Ledger(output_location(output, location))
    deciding = deciding_settings(settings)
    bound = binding_settings(settings, deciding)
    load_bundle(settings.bundle).config.with_reconstruction(settings.reconstruction)
    manifest = json.loads((find_bundle(settings.bundle) / MANIFEST).read_bytes())
    order = retry or OrdinaryRun(manifest, anew=settings.anew)
    order.check(ledger, bound)
    check_there(location)
    asked = NightSettings(
        settings.plan,
        json_digest(deciding),
        settings.limit,
        settings.wave_units,
        settings.max_removed_share,
    )
    started = time.perf_counter()
    tally = RunTally(RunMetrics())
    with (
        stop_request() as stop,
        Lease(ledger.storage) as lease,
        Pipelines(settings, stop, tally) as pipelines,
    ):
        check_room(ledger.storage, settings.min_free_bytes)
        ledger.storage.check_conditional()
        # Again, and listed only now: another run may have ended since.
        order.check(ledger, bound)
        about = about_run(settings, bound, ledger, lease)
        observed = ObservedRun(about, tally, ledger.storage, is_ours=lambda: not lease.is_lost)
        summary: dict[str, Any] = {}
        with _reported(ledger, observed, settings.report, summary), observed:
            source = list_corpus(location)
            check_source(source, location, settings.image_column)
            stop.check()
            asked = order.begin(ledger, asked, bound, deciding)
            if settings.delta:
                begin_delta(ledger.storage, None if isinstance(source, ImageFolder) else source[0])

            def purify_units(units: list[Unit], parked: frozenset[str]) -> Iterator[pa.Table]:
                writer = {
                    "output": ledger.output,
                    "fingerprint": asked.fingerprint,
                    "image_column": settings.image_column,
                    "keep_original": settings.keep_original,
                    "parked": parked,
                    "lease": lease.number,
                }
                return pipelines.run(units, writer, ledger.storage)

            night = Night(asked, ledger, lease, stop, purify_units, tally)
            night.run(source)
            order.finish(ledger)
            summary |= night.summary(time.perf_counter() - started)
            _check_failed(night.failed, summary)
            _check_left_out(ledger, summary)
    return summary


@contextmanager
def _reported(
    ledger: Ledger, observed: ObservedRun, is_wanted: bool, summary: dict[str, Any]
) -> Iterator[None]:
    """Write the report of a run that did something, well or not; one that was stopped has no time for it.

    The summary gets its place, also where an error holds it already.
    """
    try:
        yield
    finally:
        record = observed.record
        did = ("images", "new_shards_total", "changed_shards_total", "removed_shards_total")
        if is_wanted and any(map(record.get, did)) and record["outcome"] in ("done", "failed"):
            page = report_after_run(ledger, record["run"])
            if page is not None:
                summary["report"] = page


def about_run(
    settings: PurifyCorpusSettings, bound: Mapping[str, Any], ledger: Ledger, lease: Lease
) -> RunAbout:
    """Return what the record of a run that begins now says of it."""
    how = settings.model_dump(mode="json", include=TOLD)
    return RunAbout.now(
        lease.number,
        input=bound["input"],
        output=ledger.output,
        bundle=settings.bundle,
        settings={**bound, **how},
        plan=read_plan(ledger.storage),
    )


def _check_failed(failed: Mapping[str, str], summary: Mapping[str, Any]) -> None:
    """Raise `FailedError` if units failed."""
    if failed:
        shown = "; ".join(f"{name}: {why}" for name, why in islice(failed.items(), SHOWN_FAILURES))
        raise _failed(f"{len(failed)} units failed, the others are done: {shown}", summary)


def _check_left_out(ledger: Ledger, summary: Mapping[str, Any]) -> None:
    """Raise `FailedError` if shards are purified and not in the Delta table."""
    left_out = ledger.delta.left_out if ledger.delta else {}
    if left_out:
        shown = "; ".join(f"{name}: {why}" for name, why in islice(left_out.items(), SHOWN_FAILURES))
        told = f"all is purified, but {len(left_out)} shards are not in the Delta table: {shown}"
        raise _failed(told, summary)


def _failed(message: str, summary: Mapping[str, Any]) -> FailedError:
    error = FailedError(message)
    error.summary = summary
    return error
