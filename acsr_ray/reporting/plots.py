"""The charts of a run's page, and the sentences that say what they show."""

import numpy as np

from acsr_ray.evaluation.markup import Markup, element, joined
from acsr_ray.reporting.charts import Bar, bars, estimate, histogram, line
from acsr_ray.reporting.contents import Contents, Measure
from acsr_ray.reporting.planned import compare, planned_images, same_images
from acsr_ray.reporting.record import RunRecord
from acsr_ray.reporting.wording import counted, duration, number, percent

MOST_BARS = 48
MOST_NAMED = 40
RATE_STEPS = 60
TIME = "Stages work side by side, so that their seconds, summed over all workers, are more than the run's."
MEASURES = (
    "Residual: relative l2 change of an image, the norm of what was taken away over the norm of the image. "
    "Distance: Mahalanobis distance of the image's latent to the cluster that was chosen."
)


def over_time(record: RunRecord) -> Markup:
    """Return throughput over the run and the seconds of its stages."""
    parts = []
    points = [(0.0, 0.0), *record.timeline]
    if len(record.timeline) > 1 and points[-1][0] > 0:
        parts.append(_rate(points))
        done = f"{number(points[-1][1])} images after {duration(points[-1][0])}."
        parts.append(line("Images done", _stairs(points), sentence=done, label="images"))
    if record.stage_seconds:
        parts.append(_stages(record))
    return element("div", *parts, class_="charts") if parts else Markup()


def _stairs(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points with the level before each: images are published a unit at a time."""
    before = [0.0, *(images for _, images in points)]
    return [
        at
        for level, (time, images) in zip(before, points, strict=False)
        for at in ((time, level), (time, images))
    ]


def _rate(points: list[tuple[float, float]]) -> Markup:
    times, done = np.array(points, np.float64).T
    steps = min(RATE_STEPS, max(2, len(points) - 1))
    edges = np.linspace(0, times[-1], steps + 1)
    rates = np.maximum(0, np.diff(np.interp(edges, times, done))) / np.diff(edges)
    # Level within each step, so that the area is the number of images.
    drawn = [
        (float(time), float(rate))
        for rate, start, end in zip(rates, edges, edges[1:], strict=False)
        for time in (start, end)
    ]
    mean = float(done[-1] / times[-1])
    sentence = (
        f"{number(mean)} images per second on average (dashed), {number(float(rates.max()))} at most, "
        f"in steps of {duration(float(edges[1]))}."
    )
    return line("Throughput", drawn, sentence=sentence, label="images per second", mean=mean)


def _stages(record: RunRecord) -> Markup:
    whole = sum(record.stage_seconds.values())
    slowest = max(record.stage_seconds, key=lambda name: record.stage_seconds[name])
    rows = [
        Bar(name, seconds, f"{duration(seconds)}, {percent(seconds, whole)}" if whole else duration(seconds))
        for name, seconds in record.stage_seconds.items()
    ]
    share = percent(record.stage_seconds[slowest], whole)
    sentence = f"Workers' seconds by stage, {duration(whole)} in all; most in {slowest}, {share}."
    return bars("Seconds per stage", rows, sentence)


QUANTITIES = {
    "seconds": ("Time", ""),
    "images_per_s": ("Images per second", " images per second"),
    "cpu_hours": ("CPU-hours", " hours of CPUs"),
    "gpu_hours": ("GPU-hours", " hours of GPUs"),
    "quarantined": ("Quarantined", " images in quarantine"),
}
"""Title and unit of what a plan estimates; memory, in MiB, has its own names."""


def planned(record: RunRecord) -> Markup:
    """Return the plan's estimates beside what came."""
    comparisons = compare(record)
    images = planned_images(record.plan)
    if not comparisons and images is not None and record.images and not same_images(record):
        words = f"planned for {number(images)} images, and this run did {number(record.images)}"
        return element("p", f"The last plan was for another run, and is not compared: it was {words}.")
    if not comparisons:
        return element("p", "There is a plan, but nothing of it that could be compared with this run.")
    charts = []
    for one in comparisons:
        title, unit = QUANTITIES.get(one.quantity, (one.quantity.capitalize(), " MiB"))
        shown = duration if one.quantity == "seconds" else number
        sentence = (
            f"Planned {shown(one.mean)}{unit}, between {shown(one.low)} and {shown(one.high)}; it was "
            f"{shown(one.actual)}: {number(one.ratio)} times the plan, "
            f"{'inside' if one.is_inside else 'outside'} the range."
        )
        charts.append(estimate(title, one.low, one.mean, one.high, one.actual, shown, sentence))
    grid = element("div", *charts, class_="charts")
    earlier = record.earlier.runs
    if not earlier:
        return grid
    words = f"{counted(earlier, 'run')} of this plan came to no end before: what they did is in the sums."
    return joined(element("p", words), grid)


def measures(contents: Contents) -> Markup:
    """Return the histograms of residual and distance."""
    drawn = [
        _measure("Residual", contents.residual, "relative l2 change"),
        _measure("Distance to the cluster", contents.distance, "Mahalanobis distance"),
    ]
    there = [chart for chart in drawn if chart]
    if not there:
        return element("p", "No image was purified.")
    return element("div", *there, class_="charts")


def _measure(title: str, measure: Measure, label: str) -> Markup:
    bins = measure.bins
    if not bins.total:
        return Markup()
    middle, high = bins.quantile(0.5), bins.quantile(0.95)
    steps = np.diff(bins.edges)
    uneven = " Bins are not of one width." if steps.max() > 1.01 * steps.min() else ""
    sentence = (
        f"{counted(bins.total, 'image')}: half below {number(middle)}, 95 % below {number(high)}. The last "
        f"bin holds what is beyond.{uneven} Counted over {measure.source}."
    )
    return histogram(title, bins.edges, bins.counts, label=label, sentence=sentence)


def clusters(contents: Contents) -> Markup:
    """Return how often each cluster was chosen; those never chosen are drawn too, or named."""
    usage = contents.usage
    if not usage:
        return element("p", "No cluster was chosen.")
    whole = sum(use.images for use in usage)
    unused = [use.label for use in usage if not use.images]
    shown = usage if len(usage) <= MOST_BARS else sorted(usage, key=lambda use: -use.images)[:MOST_BARS]
    rows = [Bar(use.label, use.images, f"{use.images:,}, {percent(use.images, whole)}") for use in shown]
    never = f"Never chosen: {len(unused)} (dashed)." if unused else "Each was chosen."
    if not contents.names.clusters:
        never = "The bundle is not at hand, so clusters never chosen are not known."
    sentence = (
        f"{counted(len(usage), 'cluster')}, {counted(whole, 'image')}. {never} "
        f"Counted over {contents.usage_source}."
    )
    parts = [element("div", *_columns(rows, sentence), class_="charts")]
    if len(usage) > len(shown):
        rest = sum(use.images for use in usage) - sum(use.images for use in shown)
        words = f"The {len(shown)} most used; {counted(rest, 'image')} in {len(usage) - len(shown):,} others."
        parts.append(element("p", words))
        if unused:
            more = f" and {len(unused) - MOST_NAMED:,} more" if len(unused) > MOST_NAMED else ""
            parts.append(element("p", f"Never chosen: {', '.join(unused[:MOST_NAMED])}{more}."))
    return joined(*parts)


def _columns(rows: list[Bar], sentence: str) -> list[Markup]:
    """Return the bars as one chart, or as two of one scale side by side where they are many."""
    if len(rows) <= MOST_BARS // 4:
        return [bars("Images per cluster", rows, sentence)]
    half = (len(rows) + 1) // 2
    most = max(row.value for row in rows)
    return [
        bars("Images per cluster", rows[:half], sentence, most),
        bars("Images per cluster, the others", rows[half:], "On the same scale.", most),
    ]
