"""A self-contained HTML page: sections of text, warnings, tables, figures and before-and-after panels.

Nothing is loaded from elsewhere and nothing runs, so the page can be mailed and opened offline.
"""

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass

from acsr_ray.corpus.images import Pixels, encode_png
from acsr_ray.evaluation.sanity import SanityWarning
from acsr_ray.evaluation.tables import Table

STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:72rem;padding:0 1rem}"
    "table{border-collapse:collapse}td,th{border:1px solid #bbb;padding:.3rem .7rem;text-align:right}"
    "td:first-child,th:first-child{text-align:left}caption{text-align:left;padding:.3rem 0}"
    "img{max-width:100%}img.panel{image-rendering:pixelated}figure{margin:1rem 0}"
    ".scroll{overflow-x:auto}.warnings{border-left:4px solid #d55e00;background:#fdf1e9;padding:.3rem 1rem}"
)


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
    body = "".join(map(_section, sections))
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{STYLE}</style><h1>{html.escape(title)}</h1>{body}</html>\n"
    )


def _section(section: Section) -> str:
    heading = f"<h2>{html.escape(section.heading)}</h2>" if section.heading else ""
    paragraphs = "".join(f"<p>{html.escape(text)}</p>" for text in section.paragraphs)
    tables = "".join(map(_table, section.tables))
    figures = "".join(_image(figure.caption, figure.png, "figure") for figure in section.figures)
    panels = "".join(_image(panel.caption, encode_png(panel.pixels), "panel") for panel in section.panels)
    return f"<section>{heading}{paragraphs}{_warnings(section.warnings)}{tables}{figures}{panels}</section>"


def _warnings(warnings: Sequence[SanityWarning]) -> str:
    if not warnings:
        return ""
    items = "".join(
        f"<li><b>{html.escape(warning.name)}</b>: {html.escape(warning.message)}</li>" for warning in warnings
    )
    return f'<div class="warnings" role="note"><ul>{items}</ul></div>'


def _table(table: Table) -> str:
    title = f"<b>{html.escape(table.title)}</b>" if table.title else ""
    words = f"{title} {html.escape(table.caption)}".strip()
    caption = f"<caption>{words}</caption>" if words else ""
    body = "".join(_line(row, "td") for row in table.rows)
    return f'<div class="scroll"><table>{caption}{_line(table.header, "th")}{body}</table></div>'


def _line(cells: Sequence[str], tag: str) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"


def _image(caption: str, png: bytes, kind: str) -> str:
    text = html.escape(caption)
    caption_line = f"<figcaption>{text}</figcaption>" if text else ""
    data = base64.b64encode(png).decode()
    return (
        f'<figure>{caption_line}<img class="{kind}" alt="{text}" src="data:image/png;base64,{data}"></figure>'
    )
