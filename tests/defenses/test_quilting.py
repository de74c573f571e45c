"""Quilting: the bank, the seam against brute force, and images that a bank can and cannot lay."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from acsr_ray.artifacts import ArtifactError
from acsr_ray.defenses.quilting import (
    PatchBankConfig,
    Quilting,
    collect_patches,
    left_of_seam,
    load_patch_bank,
    save_patch_bank,
)


def as_images(pixels):
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255


def own_bank(pixels, side=5):
    """Every patch of the images."""
    windows = np.lib.stride_tricks.sliding_window_view(pixels, (side, side), (1, 2))
    return torch.from_numpy(windows.transpose(0, 1, 2, 4, 5, 3).reshape(-1, side, side, 3).copy())


@pytest.mark.parametrize("seams", [True, False])
@pytest.mark.parametrize("overlap", [0, 2, 4])
def test_a_bank_of_the_images_own_patches_lays_it_exactly(smooth_pixels, overlap, seams):
    pixels = smooth_pixels(2, 12, 15, 0)
    quilt = Quilting(own_bank(pixels), neighbours=1, overlap=overlap, seams=seams)(as_images(pixels))
    assert torch.allclose(quilt, as_images(pixels), atol=1e-6)


def test_quilts_consist_of_the_banks_pixels(smooth_pixels):
    bank = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 5, 5, 3)
    images = as_images(smooth_pixels(3, 13, 13, 1))
    quilt = Quilting(bank, neighbours=1)(images)
    assert set(quilt.unique().tolist()) <= {0.0, 1.0}
    assert (quilt.mean((1, 2, 3)) - images.mean((1, 2, 3))).abs().max() < 0.5


def test_more_neighbours_lie_further_away_and_are_drawn(smooth_pixels):
    bank = torch.from_numpy(collect_patches(smooth_pixels(20, 32, 32, 2), PatchBankConfig(count=2000), 0))
    images = as_images(smooth_pixels(3, 16, 16, 3))
    nearest, drawn = Quilting(bank, 1)(images), Quilting(bank, 10)
    assert (nearest - images).square().mean() < (drawn(images) - images).square().mean()
    assert not torch.equal(drawn(images), drawn.with_seed(1)(images))
    assert torch.equal(nearest, Quilting(bank, 1).with_seed(1)(images))
    assert torch.equal(drawn(images)[1:], drawn(images[1:]))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 5), st.integers(1, 3), st.integers(0, 10**6))
def test_seam_is_the_cheapest_path(rows, columns, seed):
    cost = np.random.default_rng(seed).random((rows, columns))
    left = left_of_seam(cost)
    path = left.sum(1)
    assert (np.abs(np.diff(path)) <= 1).all()
    assert np.array_equal(left, np.arange(columns) < path[:, None])
    costs = [
        cost[np.arange(rows), list(other)].sum()
        for other in itertools.product(range(columns), repeat=rows)
        if all(abs(a - b) <= 1 for a, b in itertools.pairwise(other))
    ]
    assert np.isclose(cost[np.arange(rows), path].sum(), min(costs))


def test_seams_join_better_than_covering(smooth_pixels):
    """On a strip one patch high, where no seam runs along it, jumps are smaller with the cuts."""
    bank = torch.from_numpy(collect_patches(smooth_pixels(10, 32, 32, 4), PatchBankConfig(count=300), 0))
    images = as_images(smooth_pixels(20, 5, 45, 5))
    jumps = [
        (quilt[..., 1:] - quilt[..., :-1]).abs().mean()
        for quilt in (Quilting(bank, 10, 3, seams)(images) for seams in (True, False))
    ]
    assert jumps[0] < jumps[1]


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 14), st.integers(1, 14))
def test_any_size(height, width):
    bank = torch.zeros(3, 5, 5, 3, dtype=torch.uint8)
    assert torch.equal(Quilting(bank, 2)(torch.rand(1, 3, height, width)), torch.zeros(1, 3, height, width))


def test_bank_round_trip(tmp_path, smooth_pixels):
    pixels = smooth_pixels(4, 16, 12, 6)
    patches = collect_patches(pixels, PatchBankConfig(count=40, side=6), seed=1)
    assert patches.shape == (40, 6, 6, 3)
    assert np.array_equal(patches, collect_patches(pixels, PatchBankConfig(count=40, side=6), seed=1))
    every = {patch.tobytes() for patch in own_bank(pixels, 6).numpy()}
    assert all(patch.tobytes() in every for patch in patches)
    save_patch_bank(tmp_path, patches, {})
    assert np.array_equal(load_patch_bank(tmp_path).numpy(), patches)


def test_errors(tmp_path):
    bank = torch.zeros(3, 5, 5, 3, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"neighbours must be in 1\.\.3"):
        Quilting(bank, 4)
    with pytest.raises(ValueError, match="overlap"):
        Quilting(bank, 1, overlap=5)
    with pytest.raises(ValueError, match="sides >= 5"):
        collect_patches(np.zeros((2, 4, 9, 3), np.uint8), PatchBankConfig(), 0)
    with pytest.raises(ArtifactError, match="no patch_bank"):
        load_patch_bank(tmp_path)
