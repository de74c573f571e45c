"""Square Attack (Andriushchenko et al. 2020): random search with squares, from model outputs alone.

Every image has its own windows, signs and best point; only the window's side is shared, a function of the
number of queries. Images that are misclassified leave the batch.
"""

import math

import torch
from torch import Tensor

from acsr_ray.attacks.apgd import margin
from acsr_ray.attacks.draws import Draws
from acsr_ray.attacks.gradient import Model
from acsr_ray.attacks.subset import subset_model
from acsr_ray.attacks.threat import FLOOR, ThreatModel, norms

FIRST_SHARE = 0.8
"""Share of the image that the first windows cover."""
HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
"""Queries, of 10 000, after which the covered share is halved (the paper's section 4)."""
TILES = 5


def square(
    model: Model,
    images: Tensor,
    labels: Tensor,
    *,
    threat: ThreatModel,
    queries: int,
    draws: Draws,
) -> Tensor:
    """Lower the margin by accepting random square changes that help.

    Args:
        model: images to logits; asked for rows of the batch (`subset_model`) as images finish.
        images: (N, 3, H, W) in [0, 1].
        labels: (N,) int64.
        threat: linf or an l2 kind.
        queries: model calls per image.
        draws: random numbers of the images.

    Returns:
        The point of lowest margin of each image; images misclassified from the start come back unchanged.
    """
    best = images.clone()
    lowest = _margins(model, images, labels)
    rows = (lowest > 0).nonzero()[:, 0]
    for query in range(queries):
        if not len(rows):
            break
        own = draws.rows(rows)
        if threat.norm == "linf":
            points = _propose_linf(best[rows], images[rows], threat, query, queries, own)
        else:
            points = _propose_l2(best[rows], images[rows], threat, query, queries, own)
        margins = _margins(subset_model(model, rows), points, labels[rows])
        # The start is taken as it comes; the image itself is no member of the search.
        better = (margins < lowest[rows]) | (query == 0)
        best[rows[better]] = points[better]
        lowest[rows[better]] = margins[better]
        rows = rows[lowest[rows] > 0]
    return best


def covered_share(query: int, queries: int) -> float:
    """Return the share of the image a window covers at a query."""
    place = query * 10_000 // queries
    return FIRST_SHARE / 2 ** sum(place > halving for halving in HALVINGS)


def _margins(model: Model, images: Tensor, labels: Tensor) -> Tensor:
    """Return the margins (N,), pushed below zero where the model says another class (ties included)."""
    with torch.no_grad():
        logits = model(images)
        margins = margin(logits, labels)
    return torch.where(logits.argmax(1) == labels, margins.clamp(min=FLOOR), margins.clamp(max=-FLOOR))


def _propose_linf(
    best: Tensor, images: Tensor, threat: ThreatModel, query: int, queries: int, draws: Draws
) -> Tensor:
    """Set one square, or at first vertical stripes, to a corner of the cube."""
    channels, height, width = images.shape[1:]
    radius = threat.radius(images)
    if not query:
        stripes = draws.signs((channels, 1, width), 0).to(images)
        return (images + radius * stripes).clamp(0, 1)
    side = round(math.sqrt(covered_share(query, queries) * height * width))
    side = min(max(side, 1), height, width)
    window, _, _ = _window(images, side, draws.uniform((2,), 2 * query))
    colour = draws.signs((channels, 1, 1), 2 * query + 1).to(images)
    return torch.where(window, (images + radius * colour).clamp(0, 1), best)


def _propose_l2(
    best: Tensor, images: Tensor, threat: ThreatModel, query: int, queries: int, draws: Draws
) -> Tensor:
    """Move the norm of two windows into one of them, shaped by a bump with a negative twin (Algorithm 3)."""
    channels, height, width = images.shape[1:]
    radius = threat.radius(images)
    if not query:
        return _scaled(images, _tiled(images, draws.signs((channels, TILES, TILES), 0)), radius)
    side = max(round(math.sqrt(covered_share(query, queries) * height * width)), 3) | 1
    side = min(side, height, width)
    numbers = draws.uniform((5,), 2 * query)
    signs = draws.signs((channels, 1, 1), 2 * query + 1).to(images)
    inside, top, left = _window(images, side, numbers[:, :2])
    other, _, _ = _window(images, side, numbers[:, 2:4])
    delta = best - images
    unused = (radius.square() - delta.square().sum((1, 2, 3), keepdim=True)).clamp(min=0)
    freed = (delta * (inside | other)).square().sum((2, 3), keepdim=True)
    local = delta * inside
    mixed = signs * _placed(images, side, top, left, numbers[:, 4] < 0.5) * inside
    mixed = mixed + local / local.square().sum((2, 3), keepdim=True).sqrt().clamp(min=FLOOR)
    length = mixed.square().sum((2, 3), keepdim=True).sqrt().clamp(min=FLOOR)
    mixed = mixed / length * (freed + unused / channels).sqrt()
    return _scaled(images, torch.where(inside, mixed, delta * ~other), radius)


def _scaled(images: Tensor, delta: Tensor, radius: Tensor) -> Tensor:
    return (images + delta * radius / norms(delta)).clamp(0, 1)


def _window(images: Tensor, side: int, numbers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return a window's mask (N, 1, H, W), and its top and left (N,)."""
    height, width = images.shape[2:]
    numbers = numbers.to(images.device)
    top = (numbers[:, 0] * (height - side + 1)).long()
    left = (numbers[:, 1] * (width - side + 1)).long()
    down = torch.arange(height, device=images.device) - top[:, None]
    right = torch.arange(width, device=images.device) - left[:, None]
    in_rows = ((down >= 0) & (down < side))[:, None, :, None]
    in_columns = ((right >= 0) & (right < side))[:, None, None, :]
    return in_rows & in_columns, top, left


def _placed(images: Tensor, side: int, top: Tensor, left: Tensor, turned: Tensor) -> Tensor:
    """Return the double bump (N, 1, H, W) at each image's window, turned by 90 degrees where asked.

    Outside the window its edges go on; the caller masks them.
    """
    height, width = images.shape[2:]
    bump = double_bump(side).to(images)
    down = (torch.arange(height, device=images.device) - top[:, None]).clamp(0, side - 1)
    right = (torch.arange(width, device=images.device) - left[:, None]).clamp(0, side - 1)
    upright = bump[down[:, :, None], right[:, None, :]]
    lying = bump.T[down[:, :, None], right[:, None, :]]
    return torch.where(turned.to(images.device).view(-1, 1, 1), lying, upright)[:, None]


def _tiled(images: Tensor, signs: Tensor) -> Tensor:
    """Return the start (N, C, H, W): a grid of double bumps with random signs."""
    height, width = images.shape[2:]
    side = max(min(height, width) // TILES, 1)
    count = [min(size // side, TILES) for size in (height, width)]
    tiles = double_bump(side).to(images).repeat(count[0], count[1])
    coloured = signs.to(images)[:, :, : count[0], : count[1]]
    grown = coloured.repeat_interleave(side, 2).repeat_interleave(side, 3)
    start = torch.zeros_like(images)
    start[:, :, : count[0] * side, : count[1] * side] = tiles * grown
    return start


def double_bump(side: int) -> Tensor:
    """Return (side, side) of unit l2 norm: a pyramid above, its negative below (the paper's Eq. 2)."""
    upper = side // 2
    bump = torch.cat([_pyramid(upper, side), -_pyramid(side - upper, side)])
    return bump / bump.norm()


def _pyramid(height: int, width: int) -> Tensor:
    """Return a bump (height, width): the sum of 1 / (k + 1)^2 over the rings k outside a pixel's own."""
    down = (torch.arange(height) - height // 2).abs()
    right = (torch.arange(width) - width // 2).abs()
    ring = torch.maximum(down[:, None], right[None, :])
    weights = 1 / (torch.arange(max(height, width) // 2 + 1) + 1.0).square()
    outside = weights.flip(0).cumsum(0).flip(0)
    return outside[ring]
