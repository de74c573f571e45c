"""The arithmetic from a timed sample to a cluster's hours, on samples whose answer is known."""

import math
from dataclasses import replace

import pytest

from acsr_ray.purification import estimate as module
from acsr_ray.purification.estimate import (
    Costs,
    Layout,
    Load,
    costs_of,
    estimate,
    images_per_second,
    on_gpu,
    size_strata,
    total_seconds,
    wilson,
)
from acsr_ray.purification.sizing import ChunkTiming, Sample, UnitTiming, Work

SMALL, LARGE = (16, 16), (64, 64)
WORK = Work("cpu", 64, "unrolled")
LAYOUT = Layout("cpu", cpus=4, gpus=0, purify_actors=4, encode_actors=0, codec_actors=4)
LOAD = Load(images=10_240, units=40, waves=1, hashed_bytes=0, listing_s=0, start_s=0, pools_s=0)


def unit(rows=256, sizes=None, sampled=64, quarantined=0) -> UnitTiming:
    sizes = {SMALL: rows} if sizes is None else sizes
    return UnitTiming(rows, 0.256, sampled, 0.064, quarantined, 1000 * rows, sizes)


def chunk(size=SMALL, rows=64, scale=1.0) -> ChunkTiming:
    return ChunkTiming(size, rows, 0.064 * scale, 0.0064 * scale, 0.128 * scale)


def sample(units=None, chunks=None) -> Sample:
    return Sample(tuple(units or [unit()] * 4), tuple(chunks or [chunk()] * 4), 100, 0.05, 40_000)


def test_costs_of_images_of_one_size():
    costs = costs_of(sample(), WORK)
    assert costs == pytest.approx(Costs(0.001, 0.001, 0.001, 0.0001, 0.002, 0.0005, 400))
    assert costs.model == pytest.approx(0.0031)


def test_images_of_many_sizes_cost_whole_calls():
    # The sample saw batches of 64; the corpus has one image of each size per unit.
    alone = {(16, 16 + n): 1 for n in range(256)}
    costs = costs_of(sample(units=[unit(sizes=alone)]), WORK)
    assert costs.encode == pytest.approx(0.001 * 32)
    pixels = sum(WORK.solver_pixels(size, 1) for size in alone) / 256
    assert costs.purify == pytest.approx(0.002 * pixels / 256)


def test_a_sample_with_fewer_large_images_than_the_units_have():
    seen = [chunk(SMALL), chunk(LARGE, 64, scale=16.0)]
    units = [unit(sizes={SMALL: 192, LARGE: 64})]
    costs = costs_of(sample(units, seen), WORK)
    # Time per pixel is the same, so a mean image costs as many pixels as it has: 0.75 + 0.25 * 16.
    assert costs.purify == pytest.approx(0.002 * 4.75)


def test_quarantined_images_cost_neither_encoder_nor_network():
    costs = costs_of(sample(units=[unit(quarantined=16)]), WORK)
    assert costs.encode == pytest.approx(0.00075)
    all_bad = replace(sample(units=[unit(quarantined=64, sizes={})]), chunks=())
    assert costs_of(all_bad, WORK).model == 0
    with pytest.raises(ValueError, match="no image"):
        costs_of(Sample(), WORK)


def test_cpus_that_are_shared_by_all_stages():
    costs = costs_of(sample(), WORK)
    on_cpus = 0.001 + 0.001 + 0.0031 + 0.0005 + module.RAY_UNIT_S / 256
    rate = images_per_second(costs, LAYOUT, 256)
    assert rate == pytest.approx((4 - module.RAY_SHARE) / on_cpus)
    # Twice the threads take twice the CPUs; fewer purifiers, or slow readers, leave CPUs idle.
    assert images_per_second(costs, replace(LAYOUT, threads=2), 256) < rate
    assert images_per_second(costs, replace(LAYOUT, purify_actors=1), 256) == pytest.approx(1 / 0.0031)
    slow = replace(costs, read=0.05)
    assert images_per_second(slow, replace(LAYOUT, cpus=400), 256) == pytest.approx(4 / 0.051)


def test_gpus_are_the_narrowest_place_or_their_feeding_is():
    costs = costs_of(on_gpu(sample(), 20), WORK)
    assert costs.purify == pytest.approx(0.0001)
    assert costs.decode == pytest.approx(0.001)
    gpu = Layout("cuda", cpus=64, gpus=2, purify_actors=2, encode_actors=2, codec_actors=16)
    shared = 0.0001 + (1 - module.OVERLAP) * 0.00005
    assert images_per_second(replace(costs, select=1e-6), gpu, 256) == pytest.approx(
        min(2 / shared, 16 / 0.002)
    )
    assert images_per_second(costs, replace(gpu, codec_actors=1), 256) == pytest.approx(500)


def test_the_seconds_of_a_run_are_its_parts():
    costs = costs_of(sample(), WORK)
    work = LOAD.images / images_per_second(costs, LAYOUT, 256)
    ends = 256 * (costs.read + costs.decode + costs.write)
    base = total_seconds(costs, LAYOUT, LOAD)
    assert base == pytest.approx(work + ends + module.PIPELINE_S)
    more = replace(LOAD, listing_s=3, start_s=5, pools_s=7, hashed_bytes=int(module.HASHED_BYTES_PER_S))
    assert total_seconds(costs, LAYOUT, more) == pytest.approx(base + 3 + 5 + 7 + 1)
    # Another wave is another start of all actors.
    waves = total_seconds(costs, LAYOUT, replace(more, waves=2))
    assert waves == pytest.approx(base + 16 + 7 + module.PIPELINE_S + ends)
    assert total_seconds(costs, LAYOUT, replace(more, images=0, units=0, waves=0)) == pytest.approx(4)


def test_a_last_round_that_leaves_actors_idle():
    costs = replace(costs_of(sample(), WORK), read=0, decode=0, write=0)
    idle = replace(LAYOUT, cpus=100)
    five = replace(LOAD, units=5, images=5 * 256)
    assert total_seconds(costs, idle, five) == pytest.approx(module.PIPELINE_S + 2 * 256 * costs.model)


def test_the_bars_hold_the_mean_and_grow_with_the_spread():
    even = estimate(sample(), WORK, LAYOUT, LOAD)
    for value in even.values():
        assert value.low <= value.mean <= value.high
    assert even["seconds"].mean == pytest.approx(total_seconds(costs_of(sample(), WORK), LAYOUT, LOAD))
    assert even["seconds"].high / even["seconds"].mean == pytest.approx(
        math.exp(1.96 * module.MODEL_SPREAD), rel=1e-3
    )
    uneven = [chunk(scale=scale) for scale in (0.1, 0.4, 0.5, 3.0)]
    wide = estimate(sample(chunks=uneven), WORK, LAYOUT, LOAD)
    assert wide["seconds"].mean == pytest.approx(even["seconds"].mean)
    assert wide["seconds"].high > 1.1 * even["seconds"].high
    assert wide == estimate(sample(chunks=uneven), WORK, LAYOUT, LOAD)


def test_a_busy_machine_may_be_idle_when_the_job_runs():
    quiet = replace(sample(), clock_s=10.0, cpu_s=10.0)
    busy = replace(quiet, clock_s=30.0)
    before, after = (estimate(each, WORK, LAYOUT, LOAD)["seconds"] for each in (quiet, busy))
    assert (after.mean, after.high) == (before.mean, before.high)
    assert 0.3 < after.low / before.low < 0.5
    gpu = Layout("cuda", cpus=64, gpus=2, purify_actors=2, encode_actors=2, codec_actors=16)
    # There, a process waits for its card.
    assert estimate(busy, WORK, gpu, LOAD) == estimate(quiet, WORK, gpu, LOAD)


def test_hours_and_rates_follow_from_the_seconds():
    found = estimate(sample(), WORK, LAYOUT, LOAD)
    seconds = found["seconds"]
    assert found["cpu_hours"].mean == pytest.approx(4 * seconds.mean / 3600)
    assert found["gpu_hours"].high == 0
    assert found["images_per_s"].low == pytest.approx(LOAD.images / seconds.high)
    assert found["output_bytes"].mean == pytest.approx(400 * LOAD.images)
    gpu = Layout("cuda", cpus=64, gpus=2, purify_actors=2, encode_actors=2, codec_actors=16)
    hours = estimate(sample(), Work("cuda", 64, "unrolled"), gpu, LOAD)
    assert hours["gpu_hours"].mean == pytest.approx(2 * hours["seconds"].mean / 3600)


def test_quarantined_images_have_an_interval_even_where_none_was_seen():
    none = estimate(sample(), WORK, LAYOUT, LOAD)["quarantined"]
    assert (none.low, none.mean) == (0, 0)
    assert none.high == pytest.approx(LOAD.images * 0.0148, rel=0.02)
    some = estimate(sample(units=[unit(quarantined=16)] * 4), WORK, LAYOUT, LOAD)["quarantined"]
    assert some.mean == LOAD.images / 4
    low, share, high = wilson(64, 256)
    assert (some.low, some.high) == pytest.approx((low * LOAD.images, high * LOAD.images))
    assert share == 0.25
    assert wilson(0, 0) == (0.0, 0.0, 1.0)


def test_sizes_by_strata():
    found = size_strata(sample(units=[unit(sizes={SMALL: 3, LARGE: 2, (5000, 4000): 1})]))
    assert found == {"<= 0.0025": 3, "<= 0.01": 2, "> 16": 1}
