"""Charts: lengths are proportional to what they stand for, nothing leaves the drawing, labels are escaped."""

import math
import re
from xml.etree import ElementTree

import pytest

from acsr_ray.reporting.charts import LEFT, RIGHT, WIDTH, Bar, bars, estimate, histogram, line
from acsr_ray.reporting.wording import number


def parse(chart):
    """Return the drawing; a chart is well-formed XML apart from entities that HTML alone has."""
    return ElementTree.fromstring(chart).find("svg")


def rectangles(svg, kind="bar"):
    found = [shape for shape in svg.iter("rect") if shape.get("class") == kind]
    return [{key: float(shape.get(key)) for key in ("x", "y", "width", "height")} for shape in found]


def texts(svg):
    return [text.text or "".join(text.itertext()) for text in svg.iter("text")]


def test_a_histogram_is_proportional_and_drops_empty_ends():
    svg = parse(histogram("t", [0, 1, 2, 3, 4, 5], [0, 10, 0, 40, 0], label="x", sentence="s"))
    heights = [bar["height"] for bar in rectangles(svg)]
    assert heights[1] == 0
    assert heights[2] == pytest.approx(4 * heights[0], abs=0.1)
    assert len(heights) == 3
    shown = texts(svg)
    assert {"1", "2", "3", "4"} <= set(shown)
    assert "5" not in shown


def test_what_is_there_at_all_is_seen():
    svg = parse(histogram("t", [0, 1, 2], [1, 10**6], label="x", sentence="s"))
    assert rectangles(svg)[0]["height"] >= 1.5


def test_marks_of_equal_bins_are_round_and_those_of_others_are_edges():
    even = texts(parse(histogram("t", [0.0137 * n for n in range(11)], [1] * 10, label="x", sentence="s")))
    assert {"0", "0.05", "0.1"} <= set(even)
    uneven = texts(parse(histogram("t", [0, 0.1, 1, 13], [3, 2, 1], label="x", sentence="s")))
    assert {"0", "0.1", "1", "13"} <= set(uneven)


def test_bars_are_proportional_and_zero_is_drawn_differently():
    rows = [Bar("a", 30, "30"), Bar("b", 10, "10"), Bar("c", 0, "0")]
    svg = parse(bars("t", rows, "s"))
    widths = [bar["width"] for bar in rectangles(svg)]
    assert widths[0] == pytest.approx(3 * widths[1], abs=0.1)
    assert len(widths) == 2
    assert len(rectangles(svg, "unused")) == 1
    half = rectangles(parse(bars("t", rows, "s", most=60)))[0]["width"]
    assert half == pytest.approx(widths[0] / 2, abs=0.1)


def test_bars_with_long_values_stay_inside():
    svg = parse(bars("t", [Bar("a", 1, "12 h 13 min, 71.2 %"), Bar("b", 0.5, "x")], "s"))
    assert max(bar["x"] + bar["width"] for bar in rectangles(svg)) < WIDTH - 19 * 6


def test_a_line_goes_from_corner_to_corner():
    svg = parse(line("t", [(0, 0), (50, 5), (100, 10)], sentence="s", label="y", mean=5))
    path = next(shape.get("d") for shape in svg.iter("path") if shape.get("class") == "curve")
    places = [tuple(map(float, pair)) for pair in re.findall(r"([\d.]+) ([\d.]+)", path)]
    assert places[0][0] == LEFT
    assert places[-1][0] == WIDTH - RIGHT
    assert places[1][1] == pytest.approx((places[0][1] + places[-1][1]) / 2, abs=0.1)
    mean = next(shape for shape in svg.iter("line") if shape.get("class") == "mean")
    assert float(mean.get("y1")) == pytest.approx(places[1][1], abs=0.1)
    assert {"0 s", "20 s", "1:20 min"} <= set(texts(svg))


def test_an_estimate_has_all_on_one_scale():
    svg = parse(estimate("t", 60, 80, 100, 40, number, "s"))
    mean = float(next(svg.iter("circle")).get("cx"))
    actual = float(re.match(r"M([\d.]+)", next(svg.iter("path")).get("d"))[1])
    assert (mean - RIGHT) == pytest.approx(2 * (actual - RIGHT), abs=0.2)


@pytest.mark.parametrize(
    "chart",
    [
        histogram("t", [0.0, 1.0], [0], label="x", sentence="s"),
        bars("t", [], "s"),
        bars("t", [Bar("a", 0, "0")], "s"),
        line("t", [(0, 0), (0, 0)], sentence="s", label="y"),
        line("t", [(0, 0), (1e6, 1e9)], sentence="s", label="y"),
        estimate("t", 0, 0, 0, 0, number, "s"),
    ],
)
def test_nothing_is_drawn_outside_even_where_nothing_is(chart):
    svg = parse(chart)
    assert "nan" not in chart
    assert "inf" not in chart
    for shape in svg.iter("rect"):
        assert float(shape.get("x")) >= 0
        assert float(shape.get("x")) + float(shape.get("width")) <= WIDTH
    for text in svg.iter("text"):
        assert math.isfinite(float(text.get("x")))


def test_labels_are_escaped_and_told_to_those_who_cannot_see(hostile):
    chart = bars(hostile, [Bar(hostile, 1, hostile)], hostile)
    svg = parse(chart)
    assert "<script" not in chart
    assert svg.get("role") == "img"
    assert svg.get("aria-label").startswith('"><script>')
    assert svg.find("title").text == svg.get("aria-label")
