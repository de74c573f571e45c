"""Planned against actual, and what is worth a notice."""

import json

import pytest

from acsr_ray.corpus.snapshot import Snapshot
from acsr_ray.reporting.notices import notices
from acsr_ray.reporting.planned import compare, same_images
from acsr_ray.reporting.record import Resources, RunRecord, load_record
from acsr_ray.storage import DiskStorage

PLAN = {
    "images_to_do": 1000,
    "estimate": {
        "seconds": {"low": 80, "mean": 100, "high": 120},
        "images_per_s": {"low": 8, "mean": 10, "high": 12},
    },
}


def test_rate_and_seconds_are_compared():
    rate, seconds = compare(RunRecord(images=1000, elapsed_s=110, plan=PLAN))
    assert (rate.quantity, rate.actual, rate.is_inside) == (
        "images_per_s",
        pytest.approx(9.09, abs=0.01),
        True,
    )
    assert (seconds.quantity, seconds.ratio, seconds.is_inside) == ("seconds", pytest.approx(1.1), True)


def test_hours_memory_and_quarantine_are_compared():
    estimate = {
        name: {"low": mean / 2, "mean": mean, "high": 2 * mean}
        for name, mean in (("cpu_hours", 0.5), ("gpu_hours", 0.1), ("quarantined", 40))
    }
    estimate["memory_mib"] = {"worker": {"low": 500, "mean": 600, "high": 700}, "driver": "unknown"}
    record = RunRecord(
        images=1000,
        elapsed_s=360,
        plan={"images_to_do": 1000, "estimate": estimate},
        resources={"cpus": 4, "gpus": 2},
        memory_mib={"worker": 650.5, "driver": 300},
        statuses={"purified": 995, "quarantined": 5},
    )
    found = {one.quantity: (one.actual, one.is_inside) for one in compare(record)}
    assert found == {
        "cpu_hours": (pytest.approx(0.4), True),
        "gpu_hours": (pytest.approx(0.2), True),
        "quarantined": (5, False),
        "memory of a worker": (650.5, True),
    }
    # A record of before tells neither.
    told = record.model_copy(update={"resources": Resources(), "memory_mib": {}})
    assert [one.quantity for one in compare(told)] == ["quarantined"]


def test_runs_that_were_cut_short_count_with_the_one_that_ended(tmp_path):
    """The first had another plan; the last found the plan done."""
    storage = DiskStorage(tmp_path)
    plan = {**PLAN, "planned_at": "2026-11-27T00:00:00Z"}

    def put(run, images, outcome, planned_at=plan["planned_at"]):
        content = {
            "images": images,
            "outcome": outcome,
            "elapsed_s": 50,
            "resources": {"cpus": 2, "gpus": 0},
            "statuses": {"purified": images - 1, "quarantined": 1},
            "memory_mib": {"driver": images},
            "plan": {**plan, "planned_at": planned_at},
        }
        storage.write(f"_acsr/runs/{run}/record.json", json.dumps(content).encode())

    put("20261126T000000Z-000001", 500, "stopped", "2026-11-26T00:00:00Z")
    put("20261127T000000Z-000002", 300, "running")
    put("20261127T010000Z-000003", 100, "stopped")
    put("20261127T020000Z-000004", 600, "done")
    put("20261128T020000Z-000005", 7, "done")
    record = load_record(storage, Snapshot(), "20261127T020000Z-000004")
    assert record.earlier.model_dump() == {
        "runs": 2,
        "images": 400,
        "elapsed_s": 100,
        "cpu_s": 200,
        "gpu_s": 0,
        "quarantined": 2,
        "memory_mib": {"driver": 300},
    }
    rate, seconds = compare(record)
    assert (seconds.actual, rate.actual) == (150, pytest.approx(1000 / 150))
    # What the plan was for is done: the next night is not part of it.
    last = load_record(storage, Snapshot(), "20261128T020000Z-000005")
    assert last.earlier.runs == 0
    assert compare(last) == []


@pytest.mark.parametrize("images", [12, 980, 1020])
def test_a_plan_for_other_images_is_not_compared(images):
    record = RunRecord(outcome="done", images=images, elapsed_s=600, plan=PLAN)
    assert not same_images(record)
    assert compare(record) == []
    assert list(notices(record)) == []


def test_a_range_that_was_missed():
    rate, seconds = compare(RunRecord(images=1000, elapsed_s=130, plan=PLAN))
    assert (rate.is_inside, seconds.is_inside) == (False, False)


@pytest.mark.parametrize(
    "plan",
    [
        None,
        {},
        {"images_to_do": 1000, "estimate": None},
        {"images_to_do": 1000, "estimate": {"images_per_s": "fast"}},
        {"images_to_do": 1000, "estimate": {"images_per_s": {"low": 1, "mean": None, "high": 2}}},
        {"images_to_do": 1000, "estimate": {"images_per_s": {"low": 1, "mean": float("nan"), "high": 2}}},
        {"images_to_do": 1000, "estimate": {"images_per_s": {"low": 3, "mean": 2, "high": 1}}},
        {"images_to_do": 1000, "estimate": {"images_per_s": {"low": 0, "mean": 0, "high": 0}}},
    ],
)
def test_what_is_no_plan_is_not_compared(plan):
    assert compare(RunRecord(images=1000, elapsed_s=100, plan=plan)) == []


def test_a_run_that_did_nothing_is_not_compared():
    assert compare(RunRecord(images=0, elapsed_s=100, plan=PLAN)) == []


def test_a_good_run_has_no_notice():
    record = RunRecord(
        outcome="done",
        images=1000,
        elapsed_s=100,
        plan=PLAN,
        retries=0,
        statuses={"purified": 995, "quarantined": 5},
    )
    assert list(notices(record)) == []


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"outcome": "stopped", "detail": "asked to"}, "asked to. The same command goes on"),
        ({"outcome": "failed"}, "mend the cause"),
        ({"failed_units": {"a": "x"}}, "1 unit failed"),
        ({"refused_shards": {"a": "x", "b": "y"}}, "2 shards were refused"),
        ({"statuses": {"purified": 95, "quarantined": 5}}, "5.0 % of the images"),
        ({"corpus": {"statuses": {"purified": 95, "quarantined": 5}}}, "5.0 % of the images"),
        ({"removed_shards": 3}, "3 shards left the input"),
        ({"removed_shards": ["a"], "removed_shards_total": 1}, "1 shard left the input"),
        ({"retries": 2}, "2 units were tried again"),
        ({"images": 1000, "elapsed_s": 1000, "plan": PLAN}, "0.1 times the planned rate"),
        (
            {"unreadable": {"images": "no number"}, "origin": "record.json"},
            "record.json: images cannot be read",
        ),
    ],
)
def test_what_needs_a_look_is_told_once(changes, told):
    found = [f"{what}: {do}" for what, do in notices(RunRecord(**{"outcome": "done", **changes}))]
    assert len(found) == 1
    assert told in found[0]
