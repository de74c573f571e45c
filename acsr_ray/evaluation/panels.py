"""Before-and-after pictures: labelled rows of images as one."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from acsr_ray.corpus.images import Pixels

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
