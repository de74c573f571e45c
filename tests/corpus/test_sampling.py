"""The sample of a corpus: always the same, spread out, of as many rows as asked for, from few units."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from acsr_ray.corpus.sampling import ROWS_PER_UNIT, Draw, draw_sample, size_counts
from acsr_ray.corpus.units import Unit


def units(*rows: int) -> list[Unit]:
    return [Unit(f"s{at}", f"s{at}", 0, count - 1, "c") for at, count in enumerate(rows)]


def taken(draws: list[Draw]) -> int:
    return sum(len(draw.rows) for draw in draws)


@settings(deadline=None)
@given(st.lists(st.integers(1, 300), max_size=60), st.integers(1, 300))
def test_rows_are_there_once_and_as_many_as_asked_for(rows, images):
    draws = draw_sample(units(*rows), images)
    assert draws == draw_sample(units(*rows), images)
    seen = [(draw.unit.uri, row) for draw in draws for row in draw.rows]
    assert len(seen) == len(set(seen))
    assert all(0 <= row < draw.unit.num_rows for draw in draws for row in draw.rows)
    wanted = min(images, sum(rows))
    # A unit gives its rows together, so there may be a few more.
    assert wanted <= len(seen) < wanted + max([1, *(len(draw.rows) for draw in draws)])


def test_many_units_give_a_few_rows_each_and_from_everywhere():
    draws = draw_sample(units(*[256] * 1000), 256)
    assert len(draws) == 256 // ROWS_PER_UNIT
    positions = sorted(int(draw.unit.uri[1:]) for draw in draws)
    assert np.diff(positions).max() <= 64
    assert positions[0] < 64
    assert positions[-1] > 935
    # Also the first half of it is from everywhere, because a sample may have to stop early.
    first = [int(draw.unit.uri[1:]) for draw in draws[: len(draws) // 2]]
    assert min(first) < 300
    assert max(first) > 700


def test_large_units_are_taken_by_their_rows():
    draws = draw_sample(units(10, 990), 64)
    assert taken(draws) == 64
    assert all(draw.unit.num_rows == 990 for draw in draws)


def test_a_unit_gives_rows_from_all_of_it():
    (draw,) = draw_sample(units(256), 16)
    assert len(draw.rows) == 16
    assert draw.rows[0] < 16
    assert draw.rows[-1] > 239


def test_large_images_that_are_units_of_their_own():
    draws = draw_sample(units(*[1] * 5000), 256)
    assert taken(draws) == 256


def test_nothing_to_draw_from():
    assert draw_sample([], 10) == []


def test_sizes_are_counted_by_headers(encoded):
    cells = [encoded(np.zeros((4, 6, 3), np.uint8)), encoded(np.zeros((4, 6, 3), np.uint8), "BMP")]
    assert size_counts([*cells, None, b"", b"rubbish"]) == {(4, 6): 2}


@pytest.mark.parametrize("images", [1, 2, 3])
def test_few_images(images):
    assert images <= taken(draw_sample(units(5, 5, 5), images)) <= 3
