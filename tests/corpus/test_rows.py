"""Chosen rows at native size, and crops of one common side."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from acsr_ray.corpus.containers import CheckedParquet, ContainerError
from acsr_ray.corpus.images import DecodeLimits, ImageError
from acsr_ray.corpus.rows import crop_alike, read_cells, read_rows

LIMITS = DecodeLimits()


def test_rows_come_in_the_order_asked_for(tmp_path, smooth_pixels, encoded, hf_table, write_parquet):
    images = [smooth_pixels(1, 6 + n, 9, seed=n)[0] for n in range(6)]
    cells = [encoded(image) for image in images]
    first = str(write_parquet(tmp_path / "a.parquet", hf_table(cells[:3]), row_group_size=2))
    second = str(write_parquet(tmp_path / "b.parquet", hf_table(cells[3:])))
    wanted = [(second, 2), (first, 0), (second, 0), (first, 2), (first, 0)]
    got = read_rows(wanted, LIMITS)
    for image, expected in zip(got, (5, 0, 3, 2, 0), strict=True):
        assert np.array_equal(image, images[expected])
    assert read_rows([], LIMITS) == []


def test_a_row_that_cannot_be_decoded_is_an_error(tmp_path, hf_table, write_parquet):
    path = str(write_parquet(tmp_path / "a.parquet", hf_table([b"broken"])))
    with pytest.raises(ImageError, match="unsupported_format"):
        read_rows([(path, 0)], LIMITS)


@settings(deadline=None, max_examples=25)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), min_size=1, max_size=5),
    side=st.integers(1, 24),
    smallest=st.integers(1, 12),
    seed=st.integers(0, 100),
)
def test_crops_are_squares_cut_from_the_images(sizes, side, smallest, seed):
    images = [
        np.random.default_rng(number).integers(0, 256, (*size, 3)).astype(np.uint8)
        for number, size in enumerate(sizes)
    ]
    large = [image for image in images if min(image.shape[:2]) >= smallest]
    if not large:
        with pytest.raises(ValueError, match=f"at least {smallest}"):
            crop_alike(images, side, smallest, seed)
        return
    crops = crop_alike(images, side, smallest, seed)
    common = crops.shape[1]
    assert smallest <= common <= side or common == side
    # The largest side that at least half of the images have, and nothing that has it is left out.
    sides = sorted(min(image.shape[:2]) for image in large)
    assert common == min(side, int(np.median(sides)))
    large = [image for image in large if min(image.shape[:2]) >= common]
    assert 2 * len(large) >= len(sides)
    assert crops.shape == (len(large), common, common, 3)
    assert np.array_equal(crops, crop_alike(images, side, smallest, seed))
    for crop, image in zip(crops, large, strict=True):
        windows = np.lib.stride_tricks.sliding_window_view(image, (common, common, 3))
        assert (windows == crop).all((-1, -2, -3)).any()


def test_crop_positions_follow_the_seed(smooth_pixels):
    images = list(smooth_pixels(4, 40, 40, seed=0))
    assert not np.array_equal(crop_alike(images, 8, 1, seed=0), crop_alike(images, 8, 1, seed=1))


def test_cells_come_from_their_row_groups_alone(tmp_path, hf_table, write_parquet, monkeypatch):
    path = str(
        write_parquet(tmp_path / "a.parquet", hf_table([bytes([n]) for n in range(10)]), row_group_size=3)
    )
    groups = []
    original = CheckedParquet.read_row_group
    monkeypatch.setattr(
        CheckedParquet, "read_row_group", lambda self, at, **kw: groups.append(at) or original(self, at, **kw)
    )
    got = read_cells(path, [1, 2, 9], ("image", "absent"), 1e6)
    assert got.column_names == ["image"]
    assert [cell["bytes"] for cell in got["image"].to_pylist()] == [b"\x01", b"\x02", b"\x09"]
    assert groups == [0, 3]


def test_a_row_group_beyond_the_limit_is_not_read(tmp_path, hf_table, write_parquet):
    path = str(write_parquet(tmp_path / "a.parquet", hf_table([b"x" * 5000, b"y" * 10]), row_group_size=1))
    assert read_cells(path, [1], ("image",), 2000).num_rows == 1
    with pytest.raises(ContainerError, match="row group 0 is too large"):
        read_cells(path, [0], ("image",), 2000)
    with pytest.raises(ContainerError, match="has 2 rows, not row 2"):
        read_cells(path, [1, 2], ("image",), 2000)
