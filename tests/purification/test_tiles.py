"""Tiles: put together they are the image, every call sees one shape, and seams do not show."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from acsr_ray.purification.tiles import halo_of, map_tiles, tile_of
from acsr_ray.sparse.cbpdn import Cbpdn, CbpdnConfig
from acsr_ray.sparse.prox import project_atoms
from acsr_ray.sparse.tikhonov import TikhonovConfig, tikhonov_split

TILE, HALO = tile_of(8), halo_of(8)


@settings(deadline=None, max_examples=25)
@given(
    height=st.integers(1, 90),
    width=st.integers(1, 90),
    tile=st.integers(5, 40),
    share=st.floats(0, 0.49),
)
def test_tiling_the_identity_is_the_identity(height, width, tile, share):
    halo = min(int(share * tile), (tile - 1) // 2)
    images = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(height * width))
    assert torch.equal(map_tiles(lambda part: part.clone(), images, tile, halo), images)


@settings(deadline=None, max_examples=25)
@given(height=st.integers(1, 70), width=st.integers(1, 70), halo=st.integers(2, 7))
def test_local_functions_do_not_see_the_cuts(height, width, halo):
    """A 5x5 sum reaches 2 pixels: with a halo of 2 or more the tiled result is the whole one."""
    images = torch.randint(0, 9, (1, 1, height, width), generator=torch.Generator().manual_seed(halo))
    blur = torch.nn.AvgPool2d(5, stride=1, padding=2, divisor_override=1)
    assert torch.equal(map_tiles(blur, images.double(), 20, halo), blur(images.double()))


@pytest.mark.parametrize("size", [(41, 41), (47, 90), (200, 61), (40, 41), (41, 40)])
def test_every_call_sees_the_same_shape(size):
    shapes = []

    def watch(part):
        shapes.append(tuple(part.shape))
        return part

    map_tiles(watch, torch.zeros(2, 3, *size), tile=40, halo=5)
    assert set(shapes) == {(2, 3, 40, 40)}
    assert len(shapes) > 1


@pytest.mark.parametrize("size", [(40, 40), (7, 40), (1, 1)])
def test_small_images_are_passed_whole(size):
    calls = []
    images = torch.rand(1, 3, *size)
    result = map_tiles(lambda part: calls.append(part) or part + 1, images, tile=40, halo=5)
    assert [tuple(call.shape[2:]) for call in calls] == [size]
    assert torch.equal(result, images + 1)


def test_sparse_coding_shows_no_seams(smooth_pixels):
    generator = torch.Generator().manual_seed(3)
    atoms = project_atoms(torch.randn(8, 3, 8, 8, generator=generator))
    solver = Cbpdn(atoms, CbpdnConfig(iterations=20))
    smooth = torch.from_numpy(smooth_pixels(1, TILE + 24, TILE + 40, seed=2)).permute(0, 3, 1, 2) / 255
    image = (smooth + 0.15 * torch.randn(smooth.shape, generator=generator)).clamp(0, 1)
    _, highpass = tikhonov_split(image, TikhonovConfig())
    whole = solver.reconstruct(highpass)
    assert whole.abs().max() > 50 / 255

    def worst(halo):
        """Return the largest difference, leaving out the image's own border, where convolution wraps."""
        difference = (map_tiles(solver.reconstruct, highpass, TILE, halo) - whole).abs()
        return difference[..., HALO:-HALO, HALO:-HALO].max().item() * 255

    # Measured: 0.2 levels with the halo, 20 and more without.
    assert worst(HALO) < 0.5
    assert worst(0) > 5
