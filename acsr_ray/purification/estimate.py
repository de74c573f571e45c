"""From a timed sample to a whole corpus on a given cluster: seconds, hours of CPUs and GPUs, with error bars.

The bars come from two sources. The sample's own spread is seen by drawing its units and batches again
(bootstrap). What the model leaves out, other programs on the machines above all, is `MODEL_SPREAD`, a
guess that `tests/distributed/test_plan.py` is there to check.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from acsr_ray.corpus.headers import Size
from acsr_ray.models.classifier import ENCODER_MICRO_BATCH
from acsr_ray.purification.sizing import ChunkTiming, Sample, UnitTiming, Work

DRAWS = 400
"""Bootstrap samples."""
NORMAL_95 = 1.96
MODEL_SPREAD = 0.09
"""Standard deviation of log(actual / planned) that the sample cannot tell."""

RAY_UNIT_S = 0.03
"""CPU seconds that Ray's processes and the driver take per unit: three calls, and tables on their way."""
RAY_SHARE = 0.12
"""Of one CPU that they take all the time: looking for work, heartbeats, the driver's watch."""
PIPELINE_S = 2.0
"""From the driver's first call of Ray Data to its first actor."""
HASHED_BYTES_PER_S = 5e8
"""At which the driver reads and hashes local shards whose content no store tells."""
OVERLAP = 0.5
"""How much of the shorter of encoder and reconstruction a GPU hides behind the longer; 0: nothing."""


@dataclass(frozen=True)
class Costs:
    """Seconds of the clock per image in each stage, and bytes per image of the output."""

    read: float
    decode: float
    encode: float
    select: float
    purify: float
    write: float
    output_bytes: float

    @property
    def model(self) -> float:
        """Of encoder, selection and reconstruction together."""
        return self.encode + self.select + self.purify


@dataclass(frozen=True)
class Layout:
    """Where the stages run: pools and the machine below them."""

    device: str
    cpus: float
    gpus: float
    purify_actors: int
    encode_actors: int
    """0 where purifiers encode too."""
    codec_actors: int
    """Of each of the two pools, that of reading and decoding and that of writing."""
    threads: int = 1


@dataclass(frozen=True)
class Load:
    """What is to be done."""

    images: int
    units: int
    waves: int
    hashed_bytes: int
    """To be read by the driver beforehand."""
    listing_s: float
    """What listing and reading footers took."""
    start_s: float
    """From no Ray to one that answers."""
    pools_s: float
    """From the first actor asked for to the last one that is ready; once per wave."""


@dataclass(frozen=True)
class Range:
    """A value with a 95 % interval."""

    low: float
    mean: float
    high: float

    def as_json(self, digits: int = 3) -> dict[str, float]:
        """Return it rounded to so many significant digits."""
        return {name: _rounded(value, digits) for name, value in asdict(self).items()}


def costs_of(sample: Sample, work: Work) -> Costs:
    """Return the costs per image of a corpus that is like the sample's units.

    Raises:
        ValueError: the sample has no image.
    """
    units, chunks = sample.units, sample.chunks
    if not units or not sample.images:
        raise ValueError("the sample has no image")
    rows = sum(unit.rows for unit in units)
    decoded = sum(unit.sampled for unit in units)
    composition = [unit.sizes for unit in units]
    sized = sum(sum(sizes.values()) for sizes in composition)
    # Rows without a readable header are quarantined: they cost neither encoder nor network.
    good = 1 - sum(unit.quarantined for unit in units) / decoded
    encode = purify = select = 0.0
    if chunks and sized:
        seen = [(chunk.size, chunk.rows) for chunk in chunks]
        all_sizes = [item for sizes in composition for item in sizes.items()]
        encode = _rate(sum(c.encode_s for c in chunks), seen, all_sizes, work.encoder_images) / sized * good
        purify = _rate(sum(c.purify_s for c in chunks), seen, all_sizes, work.solver_pixels) / sized * good
        # Selection sees all sizes of a unit together, in whole calls but for the last one.
        micro = ENCODER_MICRO_BATCH[work.device]
        calls = sum(-(-c.rows // micro) for c in chunks)
        select = sum(c.select_s for c in chunks) / (calls * micro) * good
    written = max(1, sample.written_rows)
    return Costs(
        sum(unit.read_s for unit in units) / rows,
        sum(unit.decode_s for unit in units) / decoded,
        encode,
        select,
        purify,
        sample.written_s / written,
        sample.written_bytes / written,
    )


def _rate(
    seconds: float,
    seen: Sequence[tuple[Size, int]],
    expected: Sequence[tuple[Size, int]],
    work: Any,  # noqa: ANN401  (a method of `Work`)
) -> float:
    """Return the seconds that the expected images of each size take, by the work that seen ones were."""
    done = sum(work(size, rows) for size, rows in seen)
    return seconds * sum(work(size, rows) for size, rows in expected) / done


def resampled(sample: Sample, generator: np.random.Generator) -> Sample:
    """Draw the sample's units and batches again, with replacement."""

    def again(items: Sequence[Any]) -> tuple[Any, ...]:
        return tuple(items[at] for at in generator.integers(0, len(items), len(items))) if items else ()

    units: tuple[UnitTiming, ...] = again(sample.units)
    chunks: tuple[ChunkTiming, ...] = again(sample.chunks)
    return Sample(units, chunks, sample.written_rows, sample.written_s, sample.written_bytes)


def images_per_second(costs: Costs, layout: Layout, unit_rows: float) -> float:
    """Return the rate of the pipeline at work: that of its narrowest place.

    Args:
        costs: per image.
        layout: pools and machine.
        unit_rows: rows per unit.
    """
    ray_s = RAY_UNIT_S / unit_rows
    codec = max(costs.read + costs.decode, costs.write)
    places = [layout.codec_actors / codec if codec else math.inf]
    on_cpus = costs.read + costs.decode + costs.write + ray_s
    if layout.device == "cpu":
        places.append(layout.purify_actors / costs.model if costs.model else math.inf)
        on_cpus += costs.model * layout.threads
    else:
        longer, shorter = sorted((costs.encode, costs.purify), reverse=True)
        gpu = longer + (1 - OVERLAP) * shorter
        places.append(layout.gpus / gpu if gpu else math.inf)
        places.append(1 / costs.select if costs.select else math.inf)
        # Each actor keeps a core busy that feeds its card and waits for it.
        on_cpus += costs.model
    free = max(0.25, layout.cpus - RAY_SHARE)
    places.append(free / on_cpus)
    return min(places)


def total_seconds(costs: Costs, layout: Layout, load: Load) -> float:
    """Return the seconds of a run, from its start to its last snapshot."""
    seconds = load.listing_s + load.hashed_bytes / HASHED_BYTES_PER_S
    if not load.units:
        return seconds
    unit_rows = load.images / load.units
    work = load.images / images_per_second(costs, layout, unit_rows)
    # The last round of units may leave actors idle.
    rounds = math.ceil(load.units / layout.purify_actors) * unit_rows * costs.model
    # The first unit is decoded, and the last one written, while nothing else can be done.
    ends = unit_rows * (costs.read + costs.decode + costs.write)
    starts = load.start_s + load.waves * (PIPELINE_S + load.pools_s)
    return seconds + starts + max(work, rounds) + load.waves * ends


def estimate(sample: Sample, work: Work, layout: Layout, load: Load) -> dict[str, Range]:
    """Estimate a run: `seconds`, `images_per_s`, `cpu_hours`, `gpu_hours`, `output_bytes`, `quarantined`.

    Args:
        sample: timed.
        work: of the stages that it was timed in.
        layout: of the job.
        load: of the job.

    Raises:
        ValueError: the sample has no image.
    """
    generator = np.random.default_rng(0)
    centre = costs_of(sample, work)
    seconds = total_seconds(centre, layout, load)
    drawn = []
    for _ in range(DRAWS if load.units else 0):
        costs = costs_of(resampled(sample, generator), work)
        drawn.append((total_seconds(costs, layout, load), costs.output_bytes))
    time_range = _with_spread(seconds, [total for total, _ in drawn])
    if layout.device == "cpu" and sample.cpu_s:
        # Others that take part of the machine now may have gone when the job runs.
        alone = total_seconds(_scaled(centre, min(1.0, sample.cpu_s / sample.clock_s)), layout, load)
        time_range = replace(time_range, low=time_range.low * alone / seconds)
    bytes_range = _with_spread(centre.output_bytes * load.images, [b * load.images for _, b in drawn])
    refused = sum(unit.quarantined for unit in sample.units)
    low, share, high = wilson(refused, sample.images)
    hours = {name: value / 3600 for name, value in asdict(time_range).items()}
    rates = {
        "low": load.images / time_range.high,
        "mean": load.images / time_range.mean,
        "high": load.images / time_range.low,
    }
    gpus = 0.0 if layout.device == "cpu" else layout.gpus
    return {
        "seconds": time_range,
        "images_per_s": Range(**rates),
        "cpu_hours": Range(**{name: value * layout.cpus for name, value in hours.items()}),
        "gpu_hours": Range(**{name: value * gpus for name, value in hours.items()}),
        "output_bytes": bytes_range,
        "quarantined": Range(low * load.images, share * load.images, high * load.images),
    }


def _scaled(costs: Costs, factor: float) -> Costs:
    times = {name: value * factor for name, value in asdict(costs).items() if name != "output_bytes"}
    return replace(costs, **times)


def _with_spread(centre: float, drawn: Sequence[float]) -> Range:
    """Return a range around the centre, of the draws' spread and the model's."""
    if centre <= 0:
        return Range(centre, centre, centre)
    spread = float(np.std(np.log(drawn))) if len(drawn) > 1 else 0.0
    factor = math.exp(NORMAL_95 * math.hypot(spread, MODEL_SPREAD))
    return Range(centre / factor, centre, centre * factor)


def wilson(count: int, of: int) -> tuple[float, float, float]:
    """Return Wilson's 95 % interval of a share, and the share in its middle."""
    if not of:
        return 0.0, 0.0, 1.0
    share, square = count / of, NORMAL_95**2
    middle = (share + square / (2 * of)) / (1 + square / of)
    half = NORMAL_95 / (1 + square / of) * math.sqrt(share * (1 - share) / of + square / (4 * of * of))
    return max(0.0, middle - half), share, min(1.0, middle + half)


def on_gpu(sample: Sample, speedup: float) -> Sample:
    """Return what a sample timed on CPUs would be on a GPU so many times as fast as a core.

    Only encoder and reconstruction go there; the work counted stays that of the CPU's smaller calls.
    """
    chunks = tuple(
        replace(chunk, encode_s=chunk.encode_s / speedup, purify_s=chunk.purify_s / speedup)
        for chunk in sample.chunks
    )
    return replace(sample, chunks=chunks)


def size_strata(sample: Sample) -> dict[str, int]:
    """Return how many images of the sample's units are of each range of sizes, in megapixels."""
    edges = (0.0025, 0.01, 0.05, 0.25, 1.0, 4.0, 16.0)
    counts: Counter[str] = Counter()
    for unit in sample.units:
        for (height, width), count in unit.sizes.items():
            pixels = height * width / 1e6
            counts[next((f"<= {edge:g}" for edge in edges if pixels <= edge), f"> {edges[-1]:g}")] += count
    order = [*(f"<= {edge:g}" for edge in edges), f"> {edges[-1]:g}"]
    return {name: counts[name] for name in order if counts[name]}


def _rounded(value: float, digits: int) -> float:
    if not value or not math.isfinite(value):
        return value
    return round(value, digits - 1 - math.floor(math.log10(abs(value))))
