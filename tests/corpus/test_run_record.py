"""Sums of a run, its rate and time left, its record: right, and no larger for a larger run."""

import json
import random
import threading
from dataclasses import replace
from itertools import pairwise

import pytest

from acsr_ray.corpus.differences import ShardChanges
from acsr_ray.corpus.facts import UnitFacts
from acsr_ray.corpus.run_record import (
    MOST_NAMED,
    MOST_POINTS,
    MOST_UNITS,
    RunAbout,
    RunTally,
    Timeline,
)

ABOUT = RunAbout("20260101T000000Z-000001", "2026-01-01T00:00:00Z", "in", "out", "tiny", {"limit": None})
KEYS = {
    "memory_mib",
    "resources",
    "schema_version",
    "run",
    "started_at",
    "elapsed_s",
    "outcome",
    "detail",
    "input",
    "output",
    "bundle",
    "settings",
    "images",
    "units",
    "statuses",
    "reasons",
    "clusters",
    "residual",
    "distance",
    "stage_seconds",
    "timeline",
    "retries",
    "batch_fill",
    "refused_shards",
    "refused_shards_total",
    "failed_units",
    "failed_units_total",
    "new_shards",
    "new_shards_total",
    "changed_shards",
    "changed_shards_total",
    "removed_shards",
    "removed_shards_total",
    "unit_names",
    "corpus",
    "plan",
}


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def facts(purified, quarantined=0):
    statuses = {"purified": purified, "quarantined": quarantined}
    return UnitFacts({key: value for key, value in statuses.items() if value}, {"empty": quarantined})


def test_a_record_has_the_documented_keys_and_is_json():
    tally = RunTally()
    tally.done("a.parquet", facts(3, 1))
    record = tally.record(ABOUT, "done", "", {"rows": 9, "statuses": {"purified": 9}, "quarantined": {}})
    assert record.keys() == KEYS
    assert json.loads(json.dumps(record, allow_nan=False))["images"] == 4
    assert record["corpus"] == {"images": 9, "statuses": {"purified": 9}, "quarantined": {}}
    for name in ("residual", "distance"):
        assert len(record[name]["edges"]) == len(record[name]["counts"]) + 1
    empty = RunTally().record(ABOUT, "running", "", None)
    assert empty["images"] == 0
    assert (empty["batch_fill"], empty["plan"], empty["corpus"]) == (None, None, None)
    assert empty["timeline"][0] == (0.0, 0)


def test_a_record_tells_the_cluster_and_the_largest_worker():
    tally = RunTally()
    for peak in (300.0, 900.5, 400.0):
        tally.done(f"{peak}.parquet", replace(facts(1), peak_mib=peak))
    tally.resources(2, 0)
    tally.resources(8, 4)
    record = tally.record(ABOUT, "done", "", None)
    assert record["resources"] == {"cpus": 8, "gpus": 4}
    assert record["memory_mib"]["worker"] == 900.5
    # This process has numpy and Arrow in it, and is no cluster.
    assert 50 < record["memory_mib"]["driver"] < 2**15


def test_names_of_runs_sort_by_time_and_differ():
    one, two = (RunAbout.now(lease, input="", output="", bundle="", settings={}) for lease in (7, 8))
    assert one.run < two.run
    assert one.run.endswith("Z-000007")
    assert one.started_at[:4] == one.run[:4]


def test_what_is_added_is_told(clock):
    tally = RunTally(clock=clock)
    for number in range(5):
        clock.now += 2.0
        tally.done(
            f"u{number}", UnitFacts({"purified": 10}, {}, {"0/1": 10}, (10,), (4, 6), {"A": 0.5}, 10, 16)
        )
    tally.spent(UnitFacts(seconds={"A": 1.0, "B": 0.25}))
    tally.again()
    tally.fallen(2)
    tally.fallen(1)
    tally.refuse("s3://b/x", "not_parquet")
    tally.fail("u9", "as told")
    gone = tuple(f"part-{number:04}" for number in range(1200))
    changes = ShardChanges(new=("a",), removed=gone)
    record = tally.record(ABOUT, "failed", "why", None, changes)
    assert (record["images"], record["units"], record["clusters"]) == (50, 5, {"0/1": 50})
    assert record["stage_seconds"] == {"A": 3.5, "B": 0.25}
    assert record["residual"]["counts"] == [50]
    assert record["distance"]["counts"] == [20, 30]
    assert (record["retries"], record["batch_fill"]) == (3, 0.625)
    assert (record["new_shards"], record["new_shards_total"], record["changed_shards"]) == (["a"], 1, [])
    assert (record["removed_shards"], record["removed_shards_total"]) == (list(gone[:1000]), 1200)
    assert record["refused_shards"] == {"s3://b/x": "not_parquet"}
    assert record["failed_units"] == {"u9": "as told"}
    assert record["timeline"] == [(0.0, 0), *((2.0 * n, 10 * n) for n in range(1, 6)), (10.0, 50)]
    assert record["unit_names"] == [f"u{number}" for number in range(5)]
    assert (record["outcome"], record["detail"], record["elapsed_s"]) == ("failed", "why", 10.0)


def test_progress_rate_and_time_left(clock):
    tally = RunTally(clock=clock)
    assert tally.progress("r", "running")["eta_s"] is None
    tally.shards(4)
    tally.opened()
    tally.opened()
    tally.plan(1000)
    for _ in range(100):  # 100 s at 5 images a second
        clock.now += 1.0
        tally.done("u", facts(4, 1))
    progress = tally.progress("r", "running")
    assert (progress["images_done"], progress["images_planned"], progress["units_done"]) == (500, 1000, 100)
    assert progress["images_per_s"] == pytest.approx(5.0)
    # Two of four shards are known; as many images again are in the others.
    assert progress["images_expected"] == 2000
    assert progress["eta_s"] == pytest.approx(1500 / 5)
    assert (progress["quarantined"], progress["quarantine_rate"]) == (100, 0.2)
    for _ in range(120):  # then at 50 a second: the rate is that of the last minute
        clock.now += 1.0
        tally.done("u", facts(50))
    assert tally.progress("r", "running")["images_per_s"] == pytest.approx(50.0)
    clock.now += 60.0
    assert tally.progress("r", "running")["images_per_s"] == pytest.approx(25.0, rel=0.05)
    assert tally.progress("r", "running")["last_unit_s_ago"] == 60.0


def test_the_rate_of_slow_units_is_not_zero(clock):
    tally = RunTally(clock=clock)
    tally.plan(10_000)
    for _ in range(20):
        clock.now += 200.0
        tally.done("u", facts(100))
    assert tally.progress("r", "running")["images_per_s"] == pytest.approx(0.5)


def test_a_limit_bounds_what_is_expected():
    tally = RunTally()
    tally.shards(100, limit=150)
    tally.opened()
    tally.plan(100)
    assert tally.progress("r", "running")["images_expected"] == 150


def test_a_run_that_has_nothing_to_do():
    tally = RunTally()
    tally.shards(0)
    progress = tally.progress("r", "done")
    assert (progress["images_planned"], progress["images_expected"], progress["eta_s"]) == (0, 0, None)
    json.dumps(progress, allow_nan=False)


def test_a_timeline_of_any_length_has_few_points_evenly():
    timeline = Timeline()
    for number in range(1, 20_001):
        timeline.add(0.1 * number, number)
    points = timeline.until(2000.0, 20_000)
    assert MOST_POINTS / 4 < len(points) <= MOST_POINTS
    assert points[0] == (0.0, 0)
    assert points[-1] == (2000.0, 20_000)
    assert all(images == pytest.approx(10 * seconds, abs=1) for seconds, images in points)
    gaps = [after[0] - before[0] for before, after in pairwise(points[:-1])]
    assert max(gaps) < 3 * min(gaps)


def test_a_record_does_not_grow_with_the_run():
    sizes = []
    for units in (2_000, 12_000):
        tally, generator = RunTally(), random.Random(0)
        for number in range(units):
            tally.done(
                f"unit-{number:08d}", UnitFacts({"purified": 256}, {}, {f"0/{generator.randrange(20)}": 256})
            )
            tally.refuse(f"shard-{number:08d}", "not_parquet")
            tally.fail(f"unit-{number:08d}", "as told")
        record = tally.record(ABOUT, "done", "", None)
        assert record["refused_shards_total"] == record["failed_units_total"] == units
        assert len(record["refused_shards"]) == MOST_NAMED
        assert MOST_UNITS / 2 <= len(record["unit_names"]) <= MOST_UNITS
        sizes.append(len(json.dumps(record)))
    assert sizes[1] < 1.1 * sizes[0]


def test_many_threads_lose_nothing():
    tally = RunTally()

    def work():
        for _ in range(500):
            tally.done("u", facts(1))
            tally.record(ABOUT, "running", "", None)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert tally.record(ABOUT, "done", "", None)["images"] == 2000


def test_listeners_hear_of_every_unit():
    class Ear:
        def __init__(self):
            self.heard = []

        def unit(self, facts):
            self.heard.append(facts.images)

        def tick(self, progress):
            raise AssertionError

    ear = Ear()
    tally = RunTally(ear)
    tally.done("a", facts(2))
    tally.done("b", facts(3))
    assert ear.heard == [2, 3]
