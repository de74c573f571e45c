"""Charts as inline SVG: histograms, bars, a line over time, an estimate with its error bar.

Drawn in a common width that is readable on a phone without being magnified much on a screen. Colours come
from the page's style; each chart says in a sentence what it shows, which is also its label for those who
cannot see it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from acsr_ray.evaluation.markup import Markup, element, visible
from acsr_ray.reporting.wording import clock, number

WIDTH = 460
LEFT, RIGHT, TOP, BOTTOM = 46, 22, 8, 40
LABEL_WIDTH, ROW, LETTER = 150, 19, 6.6
LONGEST_LABEL = 24
MOST_TICKS = 6
TIME_STEPS = (1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200, 14400, 21600, 43200, 86400)
"""Seconds between the marks of a time axis."""

Format = Callable[[float], str]


@dataclass(frozen=True)
class Bar:
    """One horizontal bar."""

    label: str
    value: float
    text: str
    """The value as it is shown."""


def figure(title: str, sentence: str, height: float, *drawn: Markup) -> Markup:
    """Return a drawing under its title, with a sentence that says what it shows."""
    svg = element(
        "svg",
        element("title", title),
        *drawn,
        viewBox=f"0 0 {WIDTH} {height:g}",
        role="img",
        aria_label=sentence,
    )
    # The sentence is the drawing's label already.
    words = element("p", sentence, aria_hidden="true")
    return element("figure", element("figcaption", title), svg, words, class_="chart")


def histogram(
    title: str, edges: Sequence[float], counts: Sequence[int], *, label: str, sentence: str, height: int = 200
) -> Markup:
    """Draw counts per bin; bins of unequal width are drawn equally wide between their edges.

    Args:
        title: above the drawing.
        edges: one more than counts, ascending.
        counts: of each bin; the outer bins may hold what lies beyond.
        label: of the axis below.
        sentence: what it shows.
        height: of the drawing.
    """
    first, last = _occupied(counts)
    edges, counts = edges[first : last + 2], counts[first : last + 1]
    bottom, most = height - BOTTOM, max([1, *counts])
    step = (WIDTH - LEFT - RIGHT) / len(counts)
    drawn = _grid(most, bottom)
    for position, count in enumerate(counts):
        hint = element("title", f"{number(edges[position])} to {number(edges[position + 1])}: {count:,}")
        # What is there at all is seen.
        tall = max((bottom - TOP) * count / most, 1.5) if count else 0.0
        drawn.append(_rectangle(hint, "bar", LEFT + position * step + 0.5, bottom - tall, step - 1, tall))
    drawn.append(element("line", class_="axis", x1=LEFT, x2=WIDTH - RIGHT, y1=bottom, y2=bottom))
    for value, place in _edge_ticks(edges):
        drawn.append(_text(number(value), LEFT + place * step, bottom + 16, "middle quiet"))
    drawn.append(_text(label, (LEFT + WIDTH - RIGHT) / 2, height - 6, "middle"))
    return figure(title, sentence, height, *drawn)


def _edge_ticks(edges: Sequence[float]) -> list[tuple[float, float]]:
    """Return (value, place in bins) of marks below a histogram: round values where bins are of one width."""
    widths = [high - low for low, high in pairwise(edges)]
    if max(widths) > 1.01 * min(widths):
        every = max(1, math.ceil(len(edges) / MOST_TICKS))
        return [(edges[place], float(place)) for place in range(0, len(edges), every)]
    step = _step(edges[-1] - edges[0], MOST_TICKS)
    first, last = math.ceil(edges[0] / step - 1e-9), math.floor(edges[-1] / step + 1e-9)
    return [(step * mark, (step * mark - edges[0]) / widths[0]) for mark in range(first, last + 1)]


def bars(title: str, rows: Sequence[Bar], sentence: str, most: float = 0.0) -> Markup:
    """Draw a horizontal bar per row; a row of zero is an empty, dashed box.

    Args:
        title: above the drawing.
        rows: from top to bottom.
        sentence: what it shows.
        most: value of the longest bar; that of the rows unless given.
    """
    most = most or max((row.value for row in rows), default=0.0) or 1.0
    # The values stand at the ends of the bars.
    room = WIDTH - LABEL_WIDTH - 10 - LETTER * max((len(row.text) for row in rows), default=0)
    drawn: list[Markup] = []
    for position, row in enumerate(rows):
        top = position * ROW
        hint = element("title", f"{row.label}: {row.text}")
        # Cut in the middle: what tells the clusters of one class apart stands at the end.
        label = visible(row.label, LONGEST_LABEL)
        drawn.append(element("text", hint, label, x=LABEL_WIDTH - 6, y=top + 14, class_="end"))
        width = max(1.5, room * row.value / most) if row.value > 0 else 14.0
        kind = "bar" if row.value > 0 else "unused"
        drawn.append(_rectangle(hint, kind, LABEL_WIDTH, top + 3, width, ROW - 6))
        drawn.append(_text(row.text, LABEL_WIDTH + width + 6, top + 14, "quiet"))
    return figure(title, sentence, len(rows) * ROW + 4, *drawn)


def line(
    title: str,
    points: Sequence[tuple[float, float]],
    *,
    sentence: str,
    label: str,
    mean: float | None = None,
    height: int = 200,
) -> Markup:
    """Draw a quantity over the seconds of a run, from zero up.

    Args:
        title: above the drawing.
        points: (seconds, value), ascending.
        sentence: what it shows.
        label: of the value, above the axis.
        mean: a dashed line across.
        height: of the drawing.
    """
    top, bottom = TOP + 16, height - BOTTOM
    end = points[-1][0] or 1.0
    most = max([value for _, value in points] + [mean or 0.0]) or 1.0
    per_second, per_value = (WIDTH - LEFT - RIGHT) / end, (bottom - top) / most
    places = [(LEFT + seconds * per_second, bottom - value * per_value) for seconds, value in points]
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
    drawn = [_text(label, 0, 12, "quiet"), *_grid(most, bottom, top)]
    floor = f"M{places[0][0]:.1f} {bottom}L{path}L{places[-1][0]:.1f} {bottom}Z"
    drawn += [element("path", class_="area", d=floor), element("path", class_="curve", d=f"M{path}")]
    if mean is not None:
        y = bottom - mean * per_value
        drawn.append(element("line", class_="mean", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y))
    drawn.append(element("line", class_="axis", x1=LEFT, x2=WIDTH - RIGHT, y1=bottom, y2=bottom))
    step = next((step for step in TIME_STEPS if step >= end / MOST_TICKS), _step(end, MOST_TICKS))
    for mark in range(int(end / step) + 1):
        tick = step * mark
        drawn.append(_text(clock(tick), LEFT + tick * per_second, bottom + 16, "middle quiet"))
    drawn.append(_text("time since the start", (LEFT + WIDTH - RIGHT) / 2, height - 6, "middle"))
    return figure(title, sentence, height, *drawn)


def estimate(
    title: str, low: float, mean: float, high: float, actual: float, shown: Format, sentence: str
) -> Markup:
    """Draw a planned range with its mean, and what came, on one axis from zero."""
    end = 1.12 * max(low, mean, high, actual) or 1.0
    scale = (WIDTH - 2 * RIGHT) / end
    at_low, at_mean, at_high, at_actual = (RIGHT + value * scale for value in (low, mean, high, actual))
    drawn = [
        element("line", class_="axis", x1=RIGHT, x2=WIDTH - RIGHT, y1=70, y2=70),
        element("line", class_="whisker", x1=at_low, x2=at_high, y1=34, y2=34),
        *(element("line", class_="whisker", x1=x, x2=x, y1=27, y2=41) for x in (at_low, at_high)),
        element("circle", element("title", f"planned {shown(mean)}"), class_="bar", cx=at_mean, cy=34, r=5),
        _text("planned", at_mean, 18, "middle quiet"),
        element(
            "path",
            element("title", f"actual {shown(actual)}"),
            class_="second",
            d=f"M{at_actual:.1f} 45l6 8l-6 8l-6 -8Z",
        ),
        _beside("actual", at_actual, 57),
    ]
    drawn += [_text(shown(tick), RIGHT + tick * scale, 86, "middle quiet") for tick in _ticks(end, 5) if tick]
    return figure(title, sentence, 92, *drawn)


def _beside(text: str, x: float, y: float) -> Markup:
    """Return a text to the right of a mark, or to the left where there is no room."""
    return _text(text, x + 12, y, "quiet") if x < WIDTH - 70 else _text(text, x - 12, y, "end quiet")


def _occupied(counts: Sequence[int]) -> tuple[int, int]:
    """Return the first and the last bin that hold something; all bins where none does."""
    held = [position for position, count in enumerate(counts) if count]
    return (held[0], held[-1]) if held else (0, len(counts) - 1)


def _ticks(end: float, most: int = MOST_TICKS) -> list[float]:
    """Return round numbers from 0 up to at most `end`."""
    step = _step(end, most)
    return [step * position for position in range(int(end / step + 1e-9) + 1)]


def _step(length: float, most: int) -> float:
    """Return a round distance of marks, of which at most so many fit in a length."""
    rough = length / most
    scale = 10.0 ** math.floor(math.log10(rough))
    return next(scale * factor for factor in (1, 2, 5, 10) if scale * factor >= rough)


def _grid(most: float, bottom: float, top: float = TOP) -> list[Markup]:
    drawn = []
    for tick in _ticks(most, 4):
        y = bottom - (bottom - top) * tick / most
        drawn.append(element("line", class_="rule", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y))
        drawn.append(_text(number(tick), LEFT - 6, y + 4, "end quiet"))
    return drawn


def _rectangle(hint: Markup, kind: str, x: float, y: float, width: float, height: float) -> Markup:
    return element("rect", hint, class_=kind, x=x, y=y, width=max(width, 1.0), height=height)


def _text(text: str, x: float, y: float, kind: str) -> Markup:
    return element("text", text, x=x, y=y, class_=kind)
