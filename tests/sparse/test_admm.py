"""Calls of ADMM: groups of images with a dictionary each, as GPUs take them, give what single ones do."""

import pytest
import torch

from acsr_ray.sparse import admm
from acsr_ray.sparse.admm import Admm
from acsr_ray.sparse.prox import project_atoms

CHOSEN = [2, 0, 2, 2, 1, 0, 2, 2, 2, 0, 0]


def random(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def solver():
    dictionaries = torch.stack([project_atoms(random(5, 3, 4, 4, seed=k)) for k in range(3)])
    return Admm(dictionaries, rho=2.0, relaxation=1.8, iterations=6)


@pytest.fixture
def in_groups(monkeypatch):
    monkeypatch.setitem(admm.GROUPS, "cpu", (3, 2))


@pytest.mark.parametrize("warm", [False, True])
def test_groups_give_what_each_dictionary_alone_gives(solver, in_groups, warm):
    signal, lmbda = random(len(CHOSEN), 3, 9, 8, seed=9), torch.linspace(0.05, 0.3, len(CHOSEN)).double()
    start = random(len(CHOSEN), 5, 9, 8, seed=4) if warm else None
    together = solver.solve(signal, lmbda, CHOSEN, start)
    for k in range(3):
        rows = torch.tensor([row for row, own in enumerate(CHOSEN) if own == k])
        alone = Admm(solver.dictionaries[k : k + 1], 2.0, 1.8, 6)
        first = None if start is None else start[rows]
        expected = alone.solve(signal[rows], lmbda[rows], [0] * len(rows), first)
        for ours, theirs in zip(together, expected, strict=True):
            torch.testing.assert_close(ours[rows], theirs, rtol=0, atol=1e-12)


def test_neighbours_change_no_bit_in_groups(solver, in_groups):
    signal, lmbda = random(len(CHOSEN), 3, 9, 8, seed=9).float(), torch.full((len(CHOSEN),), 0.1)
    whole = solver.solve(signal, lmbda, CHOSEN)
    for rows in ([4], [1, 3], [10, 2, 6, 0, 7]):
        part = solver.solve(signal[rows], lmbda[rows], [CHOSEN[row] for row in rows])
        for ours, theirs in zip(part, whole, strict=True):
            assert torch.equal(ours, theirs[rows])


def test_a_call_holds_so_many_groups_and_images(solver):
    assert solver.micro_batch((32, 32), "cuda") == (16, 8)
    assert solver.micro_batch((128, 128), "cuda") == (4, 8)
    assert solver.micro_batch((224, 224), "cuda") == (1, 1)
    assert solver.micro_batch((32, 32), "cpu") == (1, 2)
    assert Admm(solver.dictionaries[:1], 2.0, 1.8, 6).micro_batch((32, 32), "cuda") == (1, 256)
