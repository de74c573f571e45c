"""Soft threshold and projection of atoms against brute force."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from acsr_ray.sparse.prox import project_atoms, soft_threshold

GRID = np.linspace(-6, 6, 12001)


@settings(deadline=None, max_examples=25)
@given(x=st.floats(-5, 5), threshold=st.floats(0, 4))
def test_soft_threshold_is_the_minimiser(x, threshold):
    cost = 0.5 * (GRID - x) ** 2 + threshold * np.abs(GRID)
    brute_force = GRID[cost.argmin()]
    got = soft_threshold(torch.tensor(x, dtype=torch.float64), threshold).item()
    assert abs(got - brute_force) <= 1e-3
    assert 0.5 * (got - x) ** 2 + threshold * abs(got) <= cost.min() + 1e-12


def test_soft_threshold_gives_exact_zeros():
    x = torch.tensor([-0.3, -0.1, 0.0, 0.1, 0.3])
    assert torch.equal(soft_threshold(x, 0.3), torch.zeros(5))


def _random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("shape", [(), (1,), (6,), (5, 1), (4, 1, 1), (4, 5, 6)])
def test_tensor_thresholds_broadcast(shape):
    x, thresholds = 2 * _random(4, 5, 6), _random(*shape, seed=1).abs()
    got = soft_threshold(x, thresholds)
    each = zip(x.flatten(), thresholds.expand(4, 5, 6).flatten(), strict=True)
    expected = torch.stack([soft_threshold(value, threshold.item()) for value, threshold in each])
    assert torch.equal(got, expected.view(4, 5, 6))
    assert 0 < (got == 0).double().mean() < 1


@pytest.mark.parametrize("threshold", [0.0, 0.3, 1.0, 100.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_tensor_threshold_gives_the_bits_of_a_number(threshold, dtype):
    x = 2 * _random(50).to(dtype)
    assert torch.equal(soft_threshold(x, torch.tensor(threshold, dtype=dtype)), soft_threshold(x, threshold))


def test_gradient_flows_to_values_and_thresholds():
    x, thresholds = 2 * _random(3, 4), _random(4, seed=1).abs() + 0.1
    assert torch.autograd.gradcheck(soft_threshold, (x.requires_grad_(), thresholds.requires_grad_()))
    by_value, by_threshold = torch.autograd.grad(soft_threshold(x, thresholds).sum(), (x, thresholds))
    kept = x.abs() > thresholds
    assert 0 < kept.double().mean() < 1
    assert torch.equal(by_value, kept.double())
    assert torch.equal(by_threshold, -(kept * x.sign()).sum(0))
    # One of both alone.
    fixed = thresholds.detach()
    assert torch.equal(torch.autograd.grad(soft_threshold(x, fixed).sum(), x)[0], by_value)
    alone = torch.autograd.grad(soft_threshold(x.detach(), thresholds).sum(), thresholds)[0]
    assert torch.equal(alone, by_threshold)


def _random_atoms(seed, shape=(5, 3, 4, 6)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("shape", [(5, 3, 4, 6), (1, 1, 2, 2), (3, 2, 1, 5)])
def test_projected_atoms_have_unit_norm_and_no_mean(shape):
    atoms = project_atoms(3 * _random_atoms(0, shape) + 2)
    torch.testing.assert_close(atoms.flatten(1).norm(dim=1), torch.ones(shape[0], dtype=torch.float64))
    assert atoms.mean((2, 3)).abs().max() < 1e-14


def test_projection_of_atoms_is_idempotent():
    atoms = project_atoms(_random_atoms(1))
    torch.testing.assert_close(project_atoms(atoms), atoms, rtol=0, atol=1e-14)


def test_projection_is_the_nearest_feasible_point():
    atoms = _random_atoms(2, (1, 2, 3, 3)) + 0.5
    nearest = (atoms - project_atoms(atoms)).norm()
    others = project_atoms(_random_atoms(3, (4000, 2, 3, 3)))
    near = project_atoms(project_atoms(atoms) + 0.1 * _random_atoms(4, (1000, 2, 3, 3)))
    assert (torch.cat((others, near)) - atoms).flatten(1).norm(dim=1).min() >= nearest - 1e-12


def test_constant_atom_stays_zero():
    atoms = torch.ones(2, 3, 4, 4) * torch.tensor([0.25, 0.5, -2.0]).view(1, 3, 1, 1)
    assert torch.equal(project_atoms(atoms), torch.zeros(2, 3, 4, 4))


@pytest.mark.parametrize("value", [0.1, 0.3, 0.7])
def test_constant_float32_atom_whose_mean_is_rounded_stays_zero(value):
    assert torch.equal(project_atoms(torch.full((1, 3, 8, 8), value)), torch.zeros(1, 3, 8, 8))
