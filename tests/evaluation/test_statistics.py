"""Paired tests, intervals, risk-coverage and macro scores."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from acsr_ray.evaluation.intervals import wilson_share
from acsr_ray.evaluation.statistics import (
    macro_scores,
    mcnemar,
    paired_difference,
    risk_coverage,
)

COUNTS = st.tuples(*[st.integers(0, 60)] * 4).filter(sum)


def outcomes(both, only_first, only_second, neither):
    first = np.repeat([True, True, False, False], [both, only_first, only_second, neither])
    second = np.repeat([True, False, True, False], [both, only_first, only_second, neither])
    return first, second


@settings(deadline=None, max_examples=50)
@given(counts=COUNTS)
def test_mcnemar_counts_and_the_exact_binomial_tail(counts):
    result = mcnemar(*outcomes(*counts))
    assert (result.both, result.only_first, result.only_second, result.neither) == counts
    discordant, fewer = counts[1] + counts[2], min(counts[1:3])
    tail = sum(math.comb(discordant, k) for k in range(fewer + 1)) / 2**discordant
    assert result.p_value == pytest.approx(min(1.0, 2 * tail), rel=1e-9)


def test_mcnemar_without_discordant_images():
    assert mcnemar(*outcomes(5, 0, 0, 3)).p_value == 1


def test_mcnemar_of_a_clear_winner():
    # 20 of 20 discordant images: 2 * 2^-20.
    assert mcnemar(*outcomes(50, 20, 0, 30)).p_value == pytest.approx(2 / 2**20)


@settings(deadline=None, max_examples=50)
@given(counts=COUNTS)
def test_the_interval_holds_the_difference_and_mirrors(counts):
    first, second = outcomes(*counts)
    ahead, behind = paired_difference(first, second), paired_difference(second, first)
    assert ahead.value == pytest.approx(first.mean() - second.mean(), abs=1e-12)
    assert -1 <= ahead.low <= ahead.value + 1e-12
    assert ahead.value - 1e-12 <= ahead.high <= 1
    assert ahead.count == sum(counts)
    assert (behind.value, behind.low, behind.high) == pytest.approx((-ahead.value, -ahead.high, -ahead.low))


@pytest.mark.parametrize(
    ("probabilities", "count"),
    [
        ((0.6, 0.1, 0.05, 0.25), 200),
        ((0.9, 0.06, 0.02, 0.02), 100),
        ((0.1, 0.5, 0.1, 0.3), 60),
        ((0.0, 0.97, 0.0, 0.03), 80),
    ],
)
def test_the_interval_covers_the_truth_in_95_of_100_samples(probabilities, count):
    draws = np.random.default_rng(0).multinomial(count, probabilities, 1500)
    truth = probabilities[1] - probabilities[2]
    intervals = [paired_difference(*outcomes(*draw)) for draw in draws]
    coverage = np.mean([interval.low <= truth <= interval.high for interval in intervals])
    assert 0.93 <= coverage <= 0.99


def test_pairing_narrows_the_interval():
    paired = paired_difference(*outcomes(450, 40, 10, 500))
    mixed = paired_difference(*outcomes(225, 265, 235, 275))
    assert paired.value == pytest.approx(mixed.value)
    assert paired.high - paired.low < 0.6 * (mixed.high - mixed.low)
    assert paired.low > 0 > mixed.low


def test_independent_outcomes_have_the_interval_of_independent_shares():
    # phi is 0 for a table of independent outcomes: 30 * 20 == 60 * 10.
    interval = paired_difference(*outcomes(30, 60, 10, 20))
    one, two = wilson_share(90, 120), wilson_share(40, 120)
    assert interval.low == pytest.approx(
        interval.value - math.hypot(one.value - one.low, two.high - two.value)
    )
    assert interval.high == pytest.approx(
        interval.value + math.hypot(one.high - one.value, two.value - two.low)
    )


def test_difference_in_percentage_points():
    assert str(paired_difference(*outcomes(80, 15, 5, 100))).startswith("+5.0 [+")


@pytest.mark.parametrize("compare", [mcnemar, paired_difference])
@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ([True, False], [True], "same images"),
        ([1, 0], [True, False], "must be \\(N,\\) bool"),
        (np.zeros(0, bool), np.zeros(0, bool), "N >= 1"),
        (np.zeros((2, 2), bool), np.zeros((2, 2), bool), "must be"),
    ],
)
def test_outcomes_that_cannot_be_compared(compare, first, second, message):
    with pytest.raises(ValueError, match=message):
        compare(first, second)


def test_risk_coverage_of_a_known_order():
    curve = risk_coverage(np.array([True, False, True, False]), np.array([0.9, 0.2, 0.7, 0.8]))
    # By confidence: right, wrong, right, wrong.
    assert curve.coverage.tolist() == [0.25, 0.5, 0.75, 1]
    assert curve.risk.tolist() == pytest.approx([0, 1 / 2, 1 / 3, 1 / 2])
    assert curve.aurc == pytest.approx((0 + 1 / 2 + 1 / 3 + 1 / 2) / 4)


@settings(deadline=None, max_examples=40)
@given(
    data=st.lists(st.tuples(st.booleans(), st.integers(0, 5)), min_size=1, max_size=40),
    seed=st.integers(0, 9),
)
def test_risk_coverage_ignores_the_order_of_rows_and_the_scale(data, seed):
    correct = np.array([hit for hit, _ in data])
    confidence = np.array([float(score) for _, score in data])
    curve = risk_coverage(correct, confidence)
    assert curve.risk[-1] == pytest.approx(1 - correct.mean())
    assert (curve.risk >= -1e-12).all()
    order = np.random.default_rng(seed).permutation(len(data))
    shuffled = risk_coverage(correct[order], np.exp(confidence[order]) - 7)
    np.testing.assert_allclose(shuffled.risk, curve.risk, atol=1e-12)


def test_a_weight_is_a_number_of_images():
    correct = np.array([True, False, True, False, True])
    confidence, times = np.array([0.9, 0.8, 0.8, 0.3, 0.1]), np.array([1, 2, 3, 1, 2])
    weighted = risk_coverage(correct, confidence, times)
    repeated = risk_coverage(correct.repeat(times), confidence.repeat(times))
    last = times.cumsum() - 1
    np.testing.assert_allclose(weighted.coverage, repeated.coverage[last])
    np.testing.assert_allclose(weighted.risk, repeated.risk[last])
    assert weighted.aurc == pytest.approx(np.average(weighted.risk, weights=times))


@pytest.mark.parametrize("weights", [np.ones(3), np.array([1, 0.0]), np.array([1, np.inf])])
def test_weights_that_are_none_are_refused(weights):
    with pytest.raises(ValueError, match="2 positive weights"):
        risk_coverage(np.array([True, False]), np.zeros(2), weights)


def test_equal_confidences_carry_no_information():
    curve = risk_coverage(np.array([True] * 3 + [False]), np.zeros(4))
    assert curve.risk.tolist() == pytest.approx([0.25] * 4)


def test_a_better_order_has_a_smaller_area():
    correct = np.array([True] * 6 + [False] * 4)
    good, bad = (risk_coverage(correct, sign * np.arange(10, 0, -1)).aurc for sign in (1, -1))
    assert good < 0.4 < bad


@pytest.mark.parametrize("confidence", [np.zeros(3), np.array([1, np.nan])])
def test_confidences_that_cannot_be_ordered(confidence):
    with pytest.raises(ValueError, match="2 finite confidences"):
        risk_coverage(np.array([True, False]), confidence)


def test_macro_scores_of_a_perfect_classifier():
    scores = macro_scores([0, 1, 2, 1], np.eye(3)[[0, 1, 2, 1]])
    assert (scores.auc, scores.f1, scores.absent) == (1, 1, ())


def test_macro_scores_against_the_definitions():
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 4, 300)
    table = generator.normal(size=(300, 4)) + 1.5 * np.eye(4)[labels]
    scores = macro_scores(labels, table)
    f1 = []
    for label in range(4):
        true, taken = labels == label, table.argmax(1) == label
        f1.append(2 * (true & taken).sum() / (true.sum() + taken.sum()))
    assert scores.f1 == pytest.approx(np.mean(f1))
    probabilities = np.exp(table) / np.exp(table).sum(1, keepdims=True)
    softmaxed = macro_scores(labels, probabilities)
    expected = roc_auc_score(labels, probabilities, multi_class="ovr", average="macro")
    assert softmaxed.auc == pytest.approx(expected)


def test_classes_without_an_image_are_left_out_and_listed():
    labels, table = (
        np.array([0, 0, 2, 2]),
        np.array([[3, 0, 1, 0], [0, 4, 1, 0], [0, 0, 5, 0], [0, 0, 5, 0.0]]),
    )
    scores = macro_scores(labels, table)
    assert scores.absent == (1, 3)
    # Class 0: one of two found, nothing else taken for it; class 2: both found.
    assert scores.f1 == pytest.approx((2 / 3 + 1) / 2)
    assert scores.auc == pytest.approx((_auc(labels == 0, table[:, 0]) + 1) / 2)


def _auc(positive, score):
    pairs = [(a > b) + 0.5 * (a == b) for a in score[positive] for b in score[~positive]]
    return np.mean(pairs)


def test_one_class_has_no_auc():
    scores = macro_scores([1, 1], np.array([[0, 1.0], [0, 1.0]]))
    assert (scores.auc, scores.f1, scores.absent) == (None, 1, (0,))


@pytest.mark.parametrize(
    ("labels", "table", "message"),
    [
        ([0, 1], np.zeros((3, 2)), "need labels"),
        ([], np.zeros((0, 2)), "need labels"),
        ([0, 2], np.zeros((2, 2)), "labels must be in 0..1"),
        ([0, -1], np.zeros((2, 2)), "labels must be in 0..1"),
        ([0, 1], np.full((2, 2), np.nan), "finite"),
    ],
)
def test_scores_that_cannot_be_judged(labels, table, message):
    with pytest.raises(ValueError, match=message):
        macro_scores(labels, table)
