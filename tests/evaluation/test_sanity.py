"""Each check fires on its sign of a broken evaluation, and stays silent within the intervals."""

import pytest

from acsr_ray.evaluation.intervals import wilson_share
from acsr_ray.evaluation.sanity import (
    check_black_box,
    check_budgets,
    check_noise,
    check_one_step,
    check_purified_clean,
)


def share(percent, count=1000):
    return wilson_share(round(percent * count / 100), count)


def names(warnings):
    return [warning.name for warning in warnings]


@pytest.mark.parametrize(
    ("clean", "noise", "count", "fires"),
    [
        (90, 90, 1000, False),
        (90, 95, 1000, False),
        (90, 88.5, 1000, False),
        (90, 70, 1000, True),
        # The same drop of 8 points is luck on 50 images and a fact on 5,000.
        (90, 82, 50, False),
        (90, 82, 5000, True),
        # Beyond the interval, but within the harmless point.
        (90, 89.2, 1_000_000, False),
    ],
)
def test_noise_must_be_harmless(clean, noise, count, fires):
    found = check_noise("vgg16/none", share(clean, count), share(noise, count))
    assert names(found) == (["noise"] if fires else [])
    assert all("vgg16/none" in warning.message for warning in found)


@pytest.mark.parametrize(
    ("accuracies", "expected"),
    [
        ([90, 60, 30, 0], []),
        ([90, 60, 62, 0], []),
        ([90, 60, 75, 0], ["budget"]),
        # Three rises, each within the interval of the one before.
        ([50, 52, 54, 56, 58, 0], ["budget", "budget"]),
        ([90, 60, 30, 12], ["huge_budget"]),
        ([90, 60, 30, 1], []),
        ([90, 20, 50, 50], ["budget", "budget", "huge_budget"]),
    ],
)
def test_more_budget_must_do_more(accuracies, expected):
    points = [(float(budget), share(value)) for budget, value in enumerate(accuracies)]
    huge = float(len(points) - 1)
    assert names(check_budgets("pgd", points, huge=huge)) == expected
    assert names(check_budgets("pgd", points[::-1], huge=huge)) == expected


@pytest.mark.parametrize("points", [[], [(1.0, share(0))]])
def test_a_huge_budget_must_have_been_tried(points):
    found = check_budgets("cell", points, huge=2.0)
    assert names(found) == ["huge_budget"]
    assert "no budget of 2 or more" in found[0].message


@pytest.mark.parametrize(
    ("stronger", "weaker", "fires"), [(10, 40, False), (40, 42, False), (42, 40, False), (40, 10, True)]
)
def test_who_knows_more_must_do_more(stronger, weaker, fires):
    white_box, black_box = share(stronger), share(weaker)
    assert names(check_black_box("cell", white_box, black_box)) == (["black_box"] if fires else [])
    found = check_one_step("cell", one_step=black_box, iterative=white_box)
    assert names(found) == (["one_step"] if fires else [])


def test_every_defended_number_needs_its_clean_one():
    defended = [("vgg", "acsr"), ("vgg", "jpeg"), ("vgg", "acsr"), ("resnet", "acsr")]
    assert check_purified_clean(defended, {("vgg", "acsr"), ("vgg", "jpeg"), ("resnet", "acsr")}) == []
    found = check_purified_clean(defended, [("vgg", "acsr")])
    assert names(found) == ["purified_clean"] * 2
    assert "resnet, acsr" in found[0].message
    assert "vgg, jpeg" in found[1].message
