"""Wilson intervals against scipy."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from acsr_ray.evaluation.intervals import score_share, wilson_share


@pytest.mark.parametrize(("successes", "count"), [(0, 1), (1, 1), (0, 50), (50, 50), (7, 10), (912, 1000)])
def test_known_intervals(successes, count):
    share = wilson_share(successes, count)
    expected = binomtest(successes, count).proportion_ci(0.95, method="wilson")
    assert share.value == successes / count
    assert share.low == pytest.approx(expected.low, abs=1e-7)
    assert share.high == pytest.approx(expected.high, abs=1e-7)
    assert share.count == count


@settings(deadline=None, max_examples=25)
@given(count=st.integers(1, 100_000), fraction=st.floats(0, 1))
def test_interval_holds_the_share_and_stays_in_the_unit_range(count, fraction):
    share = wilson_share(round(fraction * count), count)
    assert 0 <= share.low <= share.high <= 1
    assert share.low - 1e-12 <= share.value <= share.high + 1e-12
    assert share.high - share.low > 0


@settings(deadline=None, max_examples=25)
@given(count=st.integers(1, 5000), fraction=st.floats(0, 1))
def test_failures_mirror_successes(count, fraction):
    successes = round(fraction * count)
    share, mirrored = wilson_share(successes, count), wilson_share(count - successes, count)
    assert share.low == pytest.approx(1 - mirrored.high, abs=1e-12)
    assert share.high == pytest.approx(1 - mirrored.low, abs=1e-12)


def test_more_trials_narrow_the_interval():
    widths = [share.high - share.low for share in (wilson_share(n // 2, n) for n in (10, 100, 1000, 10000))]
    assert all(later < 0.5 * earlier for earlier, later in pairwise(widths))


def test_percent():
    # 95 % score interval of 456 of 500.
    assert str(wilson_share(456, 500)) == "91.2 [88.4, 93.4]"


@pytest.mark.parametrize(("successes", "count"), [(0, 0), (-1, 5), (6, 5), (1, -1)])
def test_impossible_counts_are_refused(successes, count):
    with pytest.raises(ValueError, match="need 0 <= successes"):
        wilson_share(successes, count)


def test_the_interval_of_a_mean_is_that_of_as_many_trials():
    assert score_share(7 / 10, 10) == wilson_share(7, 10)
    between = score_share(0.705, 1000)
    assert wilson_share(700, 1000).low < between.low < wilson_share(710, 1000).low


@pytest.mark.parametrize(("value", "count"), [(0.5, 0), (-0.1, 5), (1.1, 5), (float("nan"), 5)])
def test_means_that_are_no_share_are_refused(value, count):
    with pytest.raises(ValueError, match="need 0 <= value"):
        score_share(value, count)
