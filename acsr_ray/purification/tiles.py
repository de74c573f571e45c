"""Cut large images into overlapping tiles of one shape, and put the tiles' middles together again.

Sparse codes reach a few atom supports far, so a tile's result is kept only where it is at least `halo`
pixels from a cut. Memory of the solver then depends on the tile, not on the image.
"""

from collections.abc import Callable
from functools import partial

from torch import Tensor

from acsr_ray.sparse.cbpdn import Cbpdn

HALO_SUPPORTS = 4
"""Pixels dropped at every cut of sparse codes, in supports of an atom."""
KEPT = 256
"""Side in pixels of what a tile of sparse codes keeps."""


def halo_of(support: int) -> int:
    """Return the pixels dropped at every cut for atoms of `support` pixels."""
    return HALO_SUPPORTS * support


def tile_of(support: int) -> int:
    """Return the side of a tile in pixels, halo included."""
    return KEPT + 2 * halo_of(support)


def code_tiles(
    solver: Cbpdn, highpass: Tensor, strength: Tensor | None = None, index: Tensor | None = None
) -> Tensor:
    """Return the sparse reconstruction of high bands of any size (N, C, H, W); see `Cbpdn.reconstruct`."""
    support = max(solver.atoms.shape[-2:])
    code = partial(solver.reconstruct, strength=strength, index=index)
    return map_tiles(code, highpass, tile_of(support), halo_of(support))


def map_tiles(function: Callable[[Tensor], Tensor], images: Tensor, tile: int, halo: int) -> Tensor:
    """Apply an image-to-image function that keeps height and width, tile by tile.

    Args:
        function: (N, C, h, w) -> (N, C', h, w).
        images: (N, C, H, W); passed whole when no side exceeds `tile`.
        tile: side of a tile, halo included.
        halo: pixels discarded at each cut.
    """
    height, width = images.shape[-2:]
    if height <= tile and width <= tile:
        return function(images)
    result: Tensor | None = None
    for top, first_row, last_row in _spans(height, tile, halo):
        for left, first_column, last_column in _spans(width, tile, halo):
            part = function(images[..., top : top + tile, left : left + tile])
            if result is None:
                result = part.new_empty((*part.shape[:-2], height, width))
            result[..., first_row:last_row, first_column:last_column] = part[
                ..., first_row - top : last_row - top, first_column - left : last_column - left
            ]
    assert result is not None
    return result


def _spans(length: int, tile: int, halo: int) -> list[tuple[int, int, int]]:
    """Return (start of the tile, first kept, one past the last kept) covering 0..length."""
    spans, kept = [], 0
    while kept < length:
        start = max(0, min(kept - halo, length - tile))
        end = min(start + tile, length)
        last = length if end == length else end - halo
        spans.append((start, kept, last))
        kept = last
    return spans
