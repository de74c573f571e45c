"""Before-and-after pictures: rows of images as one PNG, and a self-contained HTML report."""

import base64
import html
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from acsr_ray.corpus.images import Pixels, encode_png

GAP, LABEL_WIDTH = 4, 110


def draw_panel(rows: Sequence[tuple[str, Pixels]], scale: int = 2) -> Pixels:
    """Draw labelled rows of images.

    Args:
        rows: (label, pixels (N, H, W, 3) uint8) of each row, all of one size.
        scale: integer magnification without smoothing.

    Returns:
        (height, width, 3) uint8.
    """
    count, side_h, side_w = rows[0][1].shape[:3]
    cell_h, cell_w = side_h * scale + GAP, side_w * scale + GAP
    panel = Image.new("RGB", (LABEL_WIDTH + count * cell_w, len(rows) * cell_h + GAP), "white")
    draw = ImageDraw.Draw(panel)
    for line, (label, images) in enumerate(rows):
        top = GAP + line * cell_h
        draw.text((6, top + cell_h // 2 - 8), label, fill="black")
        for column, pixels in enumerate(images):
            size = (side_w * scale, side_h * scale)
            cell = Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST)
            panel.paste(cell, (LABEL_WIDTH + column * cell_w, top))
    return np.asarray(panel)


def magnified_difference(after: Pixels, before: Pixels, factor: int = 5) -> Pixels:
    """Return grey + factor * (after - before), to make small changes visible."""
    difference = after.astype(np.int32) - before.astype(np.int32)
    return np.clip(128 + factor * difference, 0, 255).astype(np.uint8)


def html_report(
    title: str,
    lead: str,
    header: Sequence[str],
    table: Sequence[Sequence[str]],
    panels: Sequence[tuple[str, Pixels]],
) -> str:
    """Return one offline HTML page with a table and pictures; nothing is loaded from elsewhere."""

    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    pictures = "".join(
        f'<h2>{html.escape(caption)}</h2><img alt="{html.escape(caption)}" '
        f'src="data:image/png;base64,{base64.b64encode(encode_png(panel)).decode()}">'
        for caption, panel in panels
    )
    body = "".join(line(row, "td") for row in table)
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        "<style>body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:72rem;padding:0 1rem}"
        "table{border-collapse:collapse}td,th{border:1px solid #bbb;padding:.3rem .7rem;text-align:right}"
        "td:first-child,th:first-child{text-align:left}img{max-width:100%;image-rendering:pixelated}"
        f"</style><h1>{html.escape(title)}</h1><p>{html.escape(lead)}</p>"
        f"<table>{line(header, 'th')}{body}</table>{pictures}</html>\n"
    )
