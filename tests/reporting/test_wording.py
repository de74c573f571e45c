"""Numbers as people read them: nothing is rounded to what it is not."""

import math

import pytest

from acsr_ray.reporting.wording import clock, counted, duration, number, percent

DASH = "\N{EN DASH}"


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (12345, "12,345"), (1234.6, "1,235"), (0.012345, "0.0123"), (3e-7, "3.0e-07"), (None, DASH)],
)
def test_numbers(value, text):
    assert number(value) == text
    assert number(math.nan) == number(math.inf) == DASH


@pytest.mark.parametrize(
    ("part", "whole", "text"),
    [
        (0, 5, "0.00 %"),
        (5, 5, "100.0 %"),
        (1, 3, "33.3 %"),
        (1, 10**6, "< 0.01 %"),
        (10**6 - 1, 10**6, "> 99.99 %"),
        (1, 0, DASH),
    ],
)
def test_shares(part, whole, text):
    assert percent(part, whole) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.1234, "0.123 s"),
        (59.99, "60 s"),
        (60, "1 min"),
        (84, "1 min 24 s"),
        (3600, "1 h"),
        (7325, "2 h 2 min"),
        (90000, "1 d 1 h"),
        (None, DASH),
    ],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_clocks_and_counts():
    assert [clock(seconds) for seconds in (0, 40, 80, 7500)] == ["0 s", "40 s", "1:20 min", "2:05 h"]
    assert counted(1, "image") == "1 image"
    assert counted(1200, "image") == "1,200 images"
    assert counted(2, "unit was", "units were") == "2 units were"
