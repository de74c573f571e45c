"""One dictionary for all images: the Purifier's own numbers, and the control dictionaries."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from acsr_ray.clustering.gaussians import Gaussians
from acsr_ray.evaluation.dictionary_defenses import DictionaryDefense, LowBand, dct_atoms, random_atoms
from acsr_ray.purification.bundle import load_bundle
from acsr_ray.purification.purifier import Purifier
from acsr_ray.purification.tiles import tile_of
from acsr_ray.sparse.cbpdn import CbpdnConfig
from acsr_ray.sparse.tikhonov import TikhonovConfig, tikhonov_split


@pytest.fixture(scope="module")
def bundle(tiny_bundle):
    return load_bundle(tiny_bundle)


@pytest.fixture(scope="module")
def batch(smooth_pixels):
    def make(count, height, width):
        pixels = torch.from_numpy(smooth_pixels(count, height, width, 2))
        return pixels.permute(0, 3, 1, 2).contiguous() / 255

    return make


@pytest.mark.parametrize("size", [(16, 16), (7, 30), (3, 3), (tile_of(8) + 8, 20)])
def test_equals_the_purifier_with_one_cluster(bundle, batch, size):
    arrays = {name: array[2:3] for name, array in bundle.gaussians.pack().items()}
    single = replace(bundle, gaussians=Gaussians.unpack(arrays), atoms=bundle.atoms[2:3])
    images = batch(3, *size)
    defense = DictionaryDefense(bundle.atoms[2], bundle.config.cbpdn, bundle.config.tikhonov)
    assert torch.equal(defense(images), Purifier(single)(images))


def test_low_band_is_the_split_and_the_limit_of_strong_sparsity(bundle, batch):
    images = batch(2, 16, 16)
    low = LowBand(TikhonovConfig())(images)
    assert torch.allclose(low, tikhonov_split(images, TikhonovConfig())[0].clamp(0, 1), atol=1e-6)
    strict = CbpdnConfig(lmbda=1e3, iterations=5)
    assert torch.allclose(
        DictionaryDefense(bundle.atoms[0], strict, TikhonovConfig())(images), low, atol=1e-6
    )


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 80), st.integers(2, 8))
def test_dct_atoms_are_orthonormal_and_have_no_mean(count, side):
    atoms = dct_atoms(count, side)
    assert atoms.shape == (min(count, 3 * (side**2 - 1)), 3, side, side)
    flat = atoms.double().flatten(1)
    assert torch.allclose(flat @ flat.T, torch.eye(len(flat), dtype=torch.float64), atol=1e-6)
    assert atoms.mean((2, 3)).abs().max() < 1e-6


def test_dct_atoms_start_with_the_slow_luma_waves():
    first = dct_atoms(2, 8)
    for atom in first:
        assert torch.allclose(atom, atom[:1].expand(3, -1, -1), atol=1e-6)
    assert {tuple((atom[0].std(dim) > 1e-3).any().item() for dim in (0, 1)) for atom in first} == {
        (True, False),
        (False, True),
    }
    # All of them, with the constants, are a basis of 8 x 8 colour patches.
    assert len(dct_atoms(10**6, 8)) == 3 * 63


def test_random_atoms_are_feasible_and_seeded():
    atoms = random_atoms((6, 3, 5, 5), 0)
    assert torch.allclose(atoms.flatten(1).norm(dim=1), torch.ones(6), atol=1e-5)
    assert atoms.mean((2, 3)).abs().max() < 1e-6
    assert torch.equal(atoms, random_atoms((6, 3, 5, 5), 0))
    assert not torch.equal(atoms, random_atoms((6, 3, 5, 5), 1))
