"""A run's metrics for Prometheus, by `ray.util.metrics`: only the driver reports them.

Ray exports each under its name with `ray_` in front, at the metrics port of the driver's node, within about
ten seconds, and takes them away with the driver. Labels have few values: statuses, reasons, stages; Ray adds
the session and the driver's id.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import ray
from ray.util.client import ray as client
from ray.util.metrics import Counter, Gauge, Histogram

from acsr_ray.corpus.facts import UnitFacts

PREFIX = "ray_"
"""What Ray puts in front of every name."""
SECONDS = [0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0]
"""Upper bounds of the buckets of seconds; the default stage timeout is 900."""


@dataclass(frozen=True)
class Described:
    """What a metric is."""

    kind: Literal["counter", "gauge", "histogram"]
    help: str
    tags: tuple[str, ...] = ()


METRICS: Mapping[str, Described] = {
    "acsr_images_total": Described("counter", "Images that were published, by status.", ("status",)),
    "acsr_reasons_total": Described("counter", "Images with a reason, by acsr_reason.", ("reason",)),
    "acsr_units_total": Described("counter", "Units that were published."),
    "acsr_stage_seconds": Described("histogram", "Seconds of a stage on one unit.", ("stage",)),
    # Ray's histograms sum up the middles of buckets; this one is exact.
    "acsr_stage_busy_seconds_total": Described("counter", "Seconds that a stage worked.", ("stage",)),
    "acsr_retries_total": Described("counter", "Units tried again, after a failure or a lost worker."),
    "acsr_failed_units_total": Described("counter", "Units that were given up."),
    "acsr_refused_shards_total": Described("counter", "Shards of the input that cannot be read."),
    "acsr_running": Described("gauge", "1 while a run works, 0 when it has ended."),
    "acsr_images_planned": Described("gauge", "Images of the units known so far, done ones included."),
    "acsr_images_per_second": Described("gauge", "Images per second over the last minute."),
    "acsr_eta_seconds": Described("gauge", "Seconds left at the present rate, -1 where that is not known."),
    "acsr_batch_fill": Described("gauge", "Share of the batches of encoder and solver that rows fill."),
    "acsr_quarantine_rate": Described("gauge", "Share of the run's images that are quarantined."),
    "acsr_last_unit_age_seconds": Described("gauge", "Seconds since the last unit was published."),
}
"""By name; dashboard and alerts are checked against it."""

TOTALS = {
    "acsr_retries_total": "retries",
    "acsr_failed_units_total": "failed_units",
    "acsr_refused_shards_total": "refused_shards",
}
"""Counters that follow a number of the progress."""
GAUGES = {
    "acsr_images_planned": "images_planned",
    "acsr_images_per_second": "images_per_s",
    "acsr_eta_seconds": "eta_s",
    "acsr_batch_fill": "batch_fill",
    "acsr_quarantine_rate": "quarantine_rate",
    "acsr_last_unit_age_seconds": "last_unit_s_ago",
}
"""Gauges that are a number of the progress."""


class RunMetrics:
    """Reports a run's units and progress, from the time that Ray is there; a `Listener`."""

    def __init__(self) -> None:
        self._told = dict.fromkeys(TOTALS, 0)

    def unit(self, facts: UnitFacts) -> None:
        """Report a unit that was published."""
        if not _can_report():
            return
        counter("acsr_units_total").inc()
        for name, tag, counts in (
            ("acsr_images_total", "status", facts.statuses),
            ("acsr_reasons_total", "reason", facts.reasons),
            ("acsr_stage_busy_seconds_total", "stage", facts.seconds),
        ):
            for value, count in counts.items():
                if count > 0:
                    counter(name).inc(count, {tag: value})
        for stage, seconds in facts.seconds.items():
            _histogram("acsr_stage_seconds").observe(seconds, {"stage": stage})

    def tick(self, progress: Mapping[str, Any]) -> None:
        """Report the progress."""
        if not _can_report():
            return
        for name, key in TOTALS.items():
            more = progress[key] - self._told[name]
            if more > 0:
                counter(name).inc(more)
                self._told[name] = progress[key]
        for name, key in GAUGES.items():
            value = progress[key]
            if value is not None or name == "acsr_eta_seconds":
                gauge(name).set(-1.0 if value is None else value)
        gauge("acsr_running").set(float(progress["outcome"] == "running"))


def _can_report() -> bool:
    # What is reported before Ray is there is lost, and a Ray client's process has no way to report.
    return ray.is_initialized() and not client.is_connected()


@cache
def counter(name: str) -> Counter:
    """Return a counter of `METRICS`, the same one for all runs of a process."""
    return Counter(name, METRICS[name].help, METRICS[name].tags)


@cache
def gauge(name: str) -> Gauge:
    """Return a gauge of `METRICS`, the same one for all runs of a process."""
    return Gauge(name, METRICS[name].help, METRICS[name].tags)


@cache
def _histogram(name: str) -> Histogram:
    return Histogram(name, METRICS[name].help, SECONDS, METRICS[name].tags)
