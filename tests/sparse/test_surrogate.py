"""The surrogate of dictionary learning: its gradient, its lags, what it forgets, its minimum."""

import numpy as np
import pytest
import torch

from acsr_ray.sparse.descent import Entries, PatchDictionary
from acsr_ray.sparse.prox import project_atoms
from acsr_ray.sparse.surrogate import Surrogate, strongest_patches


def _random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _codes(count, atoms, size, spikes, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = []
    for _ in range(count):
        maps = torch.zeros(atoms, *size, dtype=torch.float64)
        where = torch.randperm(maps.numel(), generator=generator)[:spikes]
        maps.view(-1)[where] = torch.randn(spikes, generator=generator, dtype=torch.float64)
        codes.append(Entries.of_maps(maps.numpy()))
    return codes


def _fidelity(atoms, images, codes):
    """Return the fidelity and its gradient in the atoms, by shifts."""
    atoms = atoms.clone().requires_grad_()
    total = 0
    for image, entries in zip(images, codes, strict=True):
        whole = torch.zeros_like(image)
        for (row, column, atom), value in zip(entries.places.tolist(), entries.values.tolist(), strict=True):
            padded = torch.zeros_like(image)
            padded[:, : atoms.shape[2], : atoms.shape[3]] = atoms[atom]
            whole = whole + value * padded.roll((row, column), (1, 2))
        total = total + 0.5 * (whole - image).square().sum()
    (gradient,) = torch.autograd.grad(total, atoms)
    return total.item(), gradient


def _slope(surrogate, atoms):
    """Return the surrogate's gradient by its definition, lag by lag."""
    side = surrogate.side
    slope = -torch.from_numpy(surrogate.patches).permute(0, 3, 1, 2)
    for p in range(side):
        for q in range(side):
            for i in range(side):
                for j in range(side):
                    lag = torch.from_numpy(surrogate.products[:, :, p - i, q - j].copy())
                    slope[:, :, p, q] += lag @ atoms[:, :, i, j]
    return slope


@pytest.mark.parametrize("size", [(9, 12), (4, 5), (3, 3)])
def test_its_gradient_is_that_of_the_fidelity(size):
    atoms, images = _random(4, 2, 3, 3, seed=1), _random(3, 2, *size, seed=2)
    codes = _codes(3, 4, size, spikes=15, seed=3)
    surrogate = Surrogate(atoms)
    surrogate.add(images, codes)
    _, expected = _fidelity(atoms, images, codes)
    torch.testing.assert_close(_slope(surrogate, atoms), expected)


def test_what_is_forgotten_counts_less():
    atoms, images, codes = _random(4, 3, 3, 3), _random(2, 3, 8, 8, seed=4), _codes(2, 4, (8, 8), 9, seed=5)
    both, last = Surrogate(atoms), Surrogate(atoms)
    both.add(images[:1], codes[:1])
    both.forget(0.25)
    both.add(images[1:], codes[1:])
    last.add(images[1:], codes[1:])
    first = Surrogate(atoms)
    first.add(images[:1], codes[:1])
    np.testing.assert_allclose(both.products, 0.25 * first.products + last.products)
    np.testing.assert_allclose(both.patches, 0.25 * first.patches + last.patches)


def test_minimising_approaches_the_planted_atoms():
    planted = project_atoms(_random(4, 3, 5, 5, seed=6))
    codes = _codes(6, 4, (20, 18), spikes=20, seed=7)
    dictionary = PatchDictionary(planted)
    images = torch.stack([dictionary.unwrapped(dictionary.synthesise(own, (20, 18))) for own in codes])
    surrogate = Surrogate(planted)
    surrogate.add(images, codes)
    mask = torch.ones(4, 1, 5, 5, dtype=torch.bool)
    start = project_atoms(_random(4, 3, 5, 5, seed=8))
    found = surrogate.minimise(start, mask, steps=300)
    torch.testing.assert_close(found, planted, rtol=0, atol=1e-6)
    few = surrogate.minimise(start, mask, steps=2)
    assert (
        _fidelity(found, images, codes)[0]
        < _fidelity(few, images, codes)[0]
        < _fidelity(start, images, codes)[0]
    )


def test_unused_atoms_stay_as_they_are():
    atoms = project_atoms(_random(4, 3, 3, 3))
    codes = [
        Entries(own.places[own.places[:, 2] != 2], own.values[own.places[:, 2] != 2])
        for own in _codes(1, 4, (9, 9), 60, 9)
    ]
    surrogate = Surrogate(atoms)
    surrogate.add(_random(1, 3, 9, 9, seed=10), codes)
    assert (surrogate.usage > 0).tolist() == [True, True, False, True]
    moved = surrogate.minimise(atoms, torch.ones(4, 1, 3, 3, dtype=torch.bool), steps=5)
    assert torch.equal(moved[2], atoms[2])
    assert not torch.allclose(moved[0], atoms[0], atol=1e-2)
    surrogate.drop([0])
    assert surrogate.usage[0] == 0
    assert not surrogate.products[0].any()
    assert not surrogate.products[:, 0].any()
    assert not surrogate.patches[0].any()


def test_the_strongest_patches_do_not_overlap():
    residuals = 0.1 * _random(2, 3, 12, 15, seed=11)
    residuals[1, :, 4:8, 8:12] += 5
    residuals[0, :, 8:12, 0:4] += 3
    first, second, third = strongest_patches(residuals, 3, 4)
    assert torch.equal(first, residuals[1, :, 4:8, 8:12])
    assert torch.equal(second, residuals[0, :, 8:12, 0:4])
    assert third.abs().max() < 1
    assert len(strongest_patches(residuals, 99, 4)) == 2 * 3 * 3
