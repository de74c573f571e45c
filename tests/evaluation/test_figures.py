"""Figures: right data on the axes, readable files, the same bytes for the same data."""

import io
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from PIL import Image

from acsr_ray.evaluation import figures
from acsr_ray.evaluation.figures import (
    Reference,
    StrengthCurve,
    TradeOff,
    rank_figure,
    risk_coverage_figure,
    strength_figure,
    tradeoff_figure,
)
from acsr_ray.evaluation.intervals import wilson_share
from acsr_ray.evaluation.statistics import risk_coverage

pytest.importorskip("matplotlib")


def share(percent):
    return wilson_share(2 * percent, 200)


CURVES = [
    StrengthCurve("none", ((0.0, share(92)), (4.0, share(10)), (1.0, share(50)))),
    StrengthCurve("_a $x$ & <b> 50%", ((0.0, share(85)), (4.0, share(60)))),
]
TRADE = [
    TradeOff("acsr", ((share(90), share(40)), (share(85), share(60)))),
    TradeOff("jpeg", ((share(88), share(20)),)),
]
RANKS = ([share(70), share(66), share(50)], [24.0, 23.5, 21.0])
REFERENCES = [Reference("global", share(60), 22.0), Reference("random", share(55), 21.5)]
CONFIDENCES = {
    "bare": risk_coverage(np.arange(20) % 3 > 0, np.arange(20) % 7),
    "purified": risk_coverage(np.arange(20) % 5 > 0, np.arange(20)),
}

DRAW = {
    "strength": lambda **kw: strength_figure(CURVES, title="T", budget_label="l2, $ of 255", **kw),
    "tradeoff": lambda **kw: tradeoff_figure(TRADE, title="T", **kw),
    "risk": lambda **kw: risk_coverage_figure(CONFIDENCES, title="T", **kw),
    "rank": lambda **kw: rank_figure(*RANKS, REFERENCES, title="T", **kw),
}
LABELS = {
    "strength": ["none", "_a $x$ & <b> 50%", "l2, $ of 255", "accuracy, %"],
    "tradeoff": ["acsr", "jpeg", "clean accuracy, %", "attacked accuracy, %"],
    "risk": [f"{name} (AURC {curve.aurc:.3f})" for name, curve in CONFIDENCES.items()],
    "rank": ["global", "random", "PSNR, dB", "Mahalanobis rank of the cluster"],
}


@pytest.fixture
def finished(monkeypatch):
    """Catch the matplotlib figures, to look at what is on their axes."""
    seen = []
    finish = figures._finish

    def keep(figure, axes, title, svg):
        seen.append(axes)
        return finish(figure, axes, title, svg)

    monkeypatch.setattr(figures, "_finish", keep)
    return seen


@pytest.mark.parametrize("name", DRAW)
def test_files_are_readable_and_repeatable(name, tmp_path):
    first, second = (DRAW[name](svg=tmp_path / run / "figure.svg") for run in "ab")
    image = Image.open(io.BytesIO(first))
    assert image.format == "PNG"
    assert min(image.size) > 300
    assert len(np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0)) > 20
    assert first == second
    one, two = ((tmp_path / run / "figure.svg").read_bytes() for run in "ab")
    assert one == two
    assert ET.fromstring(one).tag.endswith("svg")


@pytest.mark.parametrize("name", DRAW)
def test_labels_are_shown_as_they_are(name, finished):
    DRAW[name]()
    shown = []
    for axes in finished[0]:
        legend = axes.get_legend()
        shown += [text.get_text() for text in legend.get_texts()] if legend else []
        shown += [axes.get_xlabel(), axes.get_ylabel()]
    assert {label.replace(r"\$", "$").strip() for label in shown} >= set(LABELS[name])


def test_strengths_are_drawn_in_order_with_their_bands(finished):
    DRAW["strength"]()
    axes = finished[0][0]
    assert axes.lines[0].get_xydata().tolist() == [[0, 92], [1, 50], [4, 10]]
    low, high = (100 * getattr(share(50), end) for end in ("low", "high"))
    band = axes.collections[0].get_paths()[0].vertices
    assert sorted({round(y, 6) for x, y in band if x == 1}) == pytest.approx([low, high])


def test_strengths_of_a_defence_are_joined_as_given(finished):
    DRAW["tradeoff"]()
    line = finished[0][0].containers[0].lines[0]
    assert line.get_xydata().tolist() == [[90, 40], [85, 60]]


def test_risk_is_in_percent(finished):
    DRAW["risk"]()
    line = finished[0][0].lines[1]
    curve = CONFIDENCES["purified"]
    np.testing.assert_allclose(line.get_xydata(), np.stack([100 * curve.coverage, 100 * curve.risk], 1))


def test_ranks_start_at_one_and_references_are_in_both_halves(finished):
    DRAW["rank"]()
    left, right = finished[0]
    assert left.containers[0].lines[0].get_xydata().tolist() == [[1, 70], [2, 66], [3, 50]]
    assert right.lines[0].get_xydata().tolist() == [[1, 24], [2, 23.5], [3, 21]]
    assert [set(line.get_ydata()) for line in right.lines[1:]] == [{22.0}, {21.5}]
    heights = {round(float(line.get_ydata()[0]), 6) for line in left.lines if set(line.get_xdata()) == {0, 1}}
    assert heights == {60, 55}


def test_extreme_shares_can_be_drawn():
    ends = (wilson_share(0, 7), wilson_share(7, 7))
    assert tradeoff_figure([TradeOff("x", ((ends[0], ends[1]), (ends[1], ends[0])))], title="T")
    assert rank_figure(ends, [20.0, float("inf")], [], title="T")


def test_more_lines_than_colours():
    curves = [
        StrengthCurve(str(number), ((0.0, share(number)), (1.0, share(number)))) for number in range(12)
    ]
    assert strength_figure(curves, title="T", budget_label="b")


@pytest.mark.parametrize(("accuracy", "psnr"), [([], []), ([share(1)], []), ([share(1)], [1.0, 2.0])])
def test_ranks_need_both_numbers(accuracy, psnr):
    with pytest.raises(ValueError, match="one PSNR per accuracy"):
        rank_figure(accuracy, psnr, [], title="T")


def test_a_picture_does_not_depend_on_the_svg_beside_it(tmp_path):
    assert DRAW["tradeoff"]() == DRAW["tradeoff"](svg=tmp_path / "figure.svg")
