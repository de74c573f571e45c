"""A self-contained HTML page: sections of text, warnings, tables, figures and before-and-after panels.

Nothing is loaded from elsewhere and nothing runs, so the page can be mailed and opened offline.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from acsr_ray.corpus.images import Pixels, encode_png
from acsr_ray.evaluation.markup import Markup, element, image, joined, page
from acsr_ray.evaluation.sanity import SanityWarning
from acsr_ray.evaluation.tables import Table


@dataclass(frozen=True)
class Picture:
    """A figure, already PNG."""

    caption: str
    png: bytes


@dataclass(frozen=True)
class Panel:
    """Rows of images, drawn by `panels.draw_panel`; magnified without smoothing."""

    caption: str
    pixels: Pixels
    """(height, width, 3) uint8."""


@dataclass(frozen=True)
class Section:
    """A part of the page; what is empty is left out. Parts appear in the order of the fields."""

    heading: str = ""
    paragraphs: tuple[str, ...] = ()
    warnings: tuple[SanityWarning, ...] = ()
    tables: tuple[Table, ...] = ()
    figures: tuple[Picture, ...] = ()
    panels: tuple[Panel, ...] = ()


def html_report(title: str, sections: Sequence[Section]) -> str:
    """Return the page; all text is escaped."""
    return page(title, element("h1", title), *map(_section, sections))


def _section(section: Section) -> Markup:
    heading = (element("h2", section.heading),) if section.heading else ()
    return element(
        "section",
        *heading,
        *(element("p", text) for text in section.paragraphs),
        warning_box([(warning.name, warning.message) for warning in section.warnings]),
        *map(table_markup, section.tables),
        *(_figure(figure.caption, figure.png, "figure") for figure in section.figures),
        *(_figure(panel.caption, encode_png(panel.pixels), "panel") for panel in section.panels),
    )


def warning_box(warnings: Sequence[tuple[str, str]]) -> Markup:
    """Return a box of (name, message), nothing where there are none."""
    if not warnings:
        return Markup()
    items = (element("li", element("b", name), f": {message}") for name, message in warnings)
    return element("div", element("ul", *items), class_="warnings", role="note")


def table_markup(table: Table, kind: str | None = None) -> Markup:
    """Return a table that scrolls on its own where the page is narrow.

    Args:
        table: what it holds.
        kind: `words` for columns of text, which are set to the left.
    """
    title = element("b", table.title) if table.title else Markup()
    words = joined(title, " " if table.title and table.caption else "", table.caption)
    caption = (element("caption", words),) if words else ()
    lines = (_line(table.header, "th"), *(_line(row, "td") for row in table.rows))
    return element("div", element("table", *caption, *lines, class_=kind), class_="scroll")


def _line(cells: Sequence[str], tag: str) -> Markup:
    return element("tr", *(element(tag, cell) for cell in cells))


def _figure(caption: str, png: bytes, kind: str) -> Markup:
    line = (element("figcaption", caption),) if caption else ()
    return element("figure", *line, image(png, caption, class_=kind))
