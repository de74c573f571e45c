"""Pictures on the page: before and after with their difference, and examples of the clusters."""

from collections.abc import Mapping, Sequence

import numpy as np

from acsr_ray.corpus.images import Pixels, encode_png
from acsr_ray.evaluation.markup import Markup, element, image, joined, visible
from acsr_ray.evaluation.panels import magnified_difference
from acsr_ray.reporting.naming import ClusterNames
from acsr_ray.reporting.pictures import Picture
from acsr_ray.reporting.wording import counted, number

FACTORS = (32, 16, 8, 4, 2, 1)
"""Of the difference, largest first."""
LONGEST_KEY = 80
WIDEST, STRIP = 176, 64
"""Pixels of the page that an image of an example, and one of a cluster's strip, may take."""
WHY = {
    "largest": (
        "Largest change",
        "What purification changed most. What is taken away should look like noise, not like things.",
    ),
    "farthest": (
        "Farthest from every cluster",
        "Least like what the bundle was trained on: the dictionary that was chosen may not fit them.",
    ),
    "smallest": ("Smallest change", "What purification changed least."),
    "typical": (
        "Typical of their cluster",
        "From the middle of the changes of each cluster: what most images became.",
    ),
}


def examples(groups: Mapping[str, Sequence[Picture]], names: ClusterNames) -> Markup:
    """Return before-and-after pictures by why they were chosen; one factor for the differences of a group."""
    parts = []
    for why, own in groups.items():
        heading, words = WHY[why]
        factor = common_factor(own)
        cards = (_example(picture, factor, names) for picture in own)
        parts += [element("h3", heading), element("p", words, class_="note")]
        parts.append(element("div", *cards, class_="examples"))
    return joined(*parts)


def common_factor(pictures: Sequence[Picture]) -> int:
    """Return the largest factor that leaves nearly all of the usual picture's differences within range."""
    changes = [
        np.quantile(np.abs(picture.after.astype(np.int16) - picture.before.astype(np.int16)), 0.99)
        for picture in pictures
        if picture.before is not None
    ]
    if not changes:
        return 1
    # The median, so that one picture that became another does not hide what the others lost.
    usual = float(np.median(changes))
    return next((factor for factor in FACTORS if usual * factor <= 127), 1)


def montage(strips: Mapping[str, Sequence[Picture]], usage: Mapping[str, int]) -> Markup:
    """Return a strip of purified images per cluster."""
    figures = []
    for label, pictures in strips.items():
        shown = (
            _pixels(picture.after[:STRIP, :STRIP], f"purified image of {label}", STRIP)
            for picture in pictures
        )
        caption = f"{label}: {counted(usage.get(label, 0), 'image')}"
        figures.append(
            element("figure", element("figcaption", caption), element("div", *shown, class_="strip"))
        )
    return element("div", *figures, class_="montage")


def _example(picture: Picture, factor: int, names: ClusterNames) -> Markup:
    row, before, times = picture.row, picture.before, f"difference \N{MULTIPLICATION SIGN} {factor}"
    key = visible(row.path or f"row {row.number}", LONGEST_KEY)
    purified = _cell(_pixels(picture.after, f"purified {key}", WIDEST), "purified")
    cells: tuple[Markup, ...]
    if before is None:
        why = element("div", f"No original: {picture.missing or 'it was not read'}.", class_="absent")
        cells = (_cell(why, "original"), purified)
    else:
        difference = magnified_difference(picture.after, before, factor)
        cells = (
            _cell(_pixels(before, f"original of {key}", WIDEST), "original"),
            purified,
            _cell(_pixels(difference, f"change of {key}", WIDEST), times),
        )
    return element(
        "figure",
        element("div", *cells, class_="three"),
        element("figcaption", *_caption(picture, names)),
        class_="example",
    )


def _cell(shown: Markup, words: str) -> Markup:
    return element("div", shown, element("span", words))


def _caption(picture: Picture, names: ClusterNames) -> list[str]:
    row = picture.row
    height, width = picture.after.shape[:2]
    size = f"{picture.width} \N{MULTIPLICATION SIGN} {picture.height} pixels"
    if picture.is_part:
        size += f", the middle {width} \N{MULTIPLICATION SIGN} {height} shown"
    cluster = "none" if row.key is None else names.label(row.key)
    numbers = f"distance {number(row.distance)}, residual {number(row.residual)}"
    lines: list[str] = [element("b", cluster), element("br"), numbers]
    if row.reason:
        lines.append(f", {row.reason}")
    lines += [element("br"), element("code", visible(row.path or "no name", LONGEST_KEY))]
    where = f"row {row.number:,} of {visible(row.place.relative, LONGEST_KEY)}, {size}"
    return [*lines, element("br"), element("span", where, class_="note")]


def _pixels(pixels: Pixels, alt: str, widest: int) -> Markup:
    """Return an image magnified by a whole number, so that every pixel has the same size."""
    height, width = pixels.shape[:2]
    scale = max(1, widest // max(height, width))
    return image(encode_png(pixels), alt, class_="pixels", width=scale * width, height=scale * height)
