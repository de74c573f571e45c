"""Panels of images."""

import numpy as np
import pytest

from acsr_ray.evaluation.panels import GAP, LABEL_WIDTH, draw_panel, magnified_difference


def _pixels(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)


@pytest.mark.parametrize("scale", [1, 2, 3])
def test_panel_shows_every_image_where_it_belongs(scale):
    rows = [("before", _pixels(4, 6, 5)), ("after", _pixels(4, 6, 5, seed=1))]
    panel = draw_panel(rows, scale)
    cell_h, cell_w = 6 * scale, 5 * scale
    assert panel.shape == (2 * (cell_h + GAP) + GAP, LABEL_WIDTH + 4 * (cell_w + GAP), 3)
    assert panel.dtype == np.uint8
    for line, (_, images) in enumerate(rows):
        top = GAP + line * (cell_h + GAP)
        for column, image in enumerate(images):
            left = LABEL_WIDTH + column * (cell_w + GAP)
            cell = panel[top : top + cell_h, left : left + cell_w]
            np.testing.assert_array_equal(cell, image.repeat(scale, 0).repeat(scale, 1))


def test_panel_is_labelled():
    images = _pixels(1, 16, 16)
    labelled, blank = (draw_panel([(label, images)])[:, :LABEL_WIDTH] for label in ("after", ""))
    assert (blank == 255).all()
    assert (labelled < 128).any()


def test_difference_is_magnified_around_grey():
    before = np.full((1, 2, 2, 3), 100, np.uint8)
    after = before.copy()
    after[0, 0, 0], after[0, 0, 1], after[0, 1, 0] = (103, 90, 100), (255, 0, 101), (99, 100, 100)
    got = magnified_difference(after, before, factor=5)
    expected = [[[143, 78, 128], [255, 0, 133]], [[123, 128, 128], [128, 128, 128]]]
    np.testing.assert_array_equal(got[0], expected)
    assert got.dtype == np.uint8
