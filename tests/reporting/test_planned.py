"""Planned against actual, and what is worth a notice."""

import pytest

from acsr_ray.reporting.notices import notices
from acsr_ray.reporting.planned import compare, same_images
from acsr_ray.reporting.record import RunRecord

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
