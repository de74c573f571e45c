"""What the charts say in words: the figures behind them."""

import re
from itertools import pairwise

import pytest

from acsr_ray.reporting.plots import over_time, planned
from acsr_ray.reporting.record import RunRecord


def sentences(markup):
    return re.findall(r'aria-label="([^"]*)"', markup)


def test_throughput_is_of_the_time_that_passed():
    # Nothing for 10 s, then 5 images a second; told at odd moments.
    record = RunRecord(timeline=[(10, 0), (11, 5), (17, 35), (20, 50)], stage_seconds={"a": 30.0, "b": 10.0})
    rate, done, stages = sentences(over_time(record))
    assert rate == "2.5 images per second on average (dashed), 5 at most, in steps of 5 s."
    assert done == "50 images after 20 s."
    assert stages.endswith("40 s in all; most in a, 75.0 %.")


def test_published_images_go_up_in_steps():
    page = over_time(RunRecord(timeline=[(10, 20), (20, 40)]))
    path = re.findall(r'class="curve" d="M([^"]*)"', page)[-1]
    places = [tuple(map(float, place.split())) for place in path.split("L")]
    # Level until a unit is there, then straight up.
    assert all((x == u) or (y == v) for (x, y), (u, v) in pairwise(places))
    assert len({y for _, y in places}) == 3


@pytest.mark.parametrize("timeline", [(), [(5, 10)], [(0, 0), (0, 0)]])
def test_a_run_too_short_for_a_curve_has_none(timeline):
    assert over_time(RunRecord(timeline=timeline)) == ""


def test_a_plan_is_compared_with_a_run_of_its_images_alone():
    plan = {"images_to_do": 50, "estimate": {"images_per_s": {"low": 1, "mean": 2, "high": 3}}}
    page = planned(RunRecord(images=12, elapsed_s=10, plan=plan))
    assert "planned for 50 images, and this run did 12" in page
    assert not sentences(page)
    page = planned(RunRecord(images=50, elapsed_s=10, plan=plan))
    assert sentences(page) == [
        "Planned 2 images per second, between 1 and 3; it was 5: 2.5 times the plan, outside the range."
    ]
    assert "nothing of it that could be compared" in planned(RunRecord(plan={}))
