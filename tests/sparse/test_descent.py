"""Coordinate descent: the optimum of sporco and ADMM, KKT, safe screening, gradients, neighbours, threads."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from acsr_ray.sparse import descent
from acsr_ray.sparse.cbpdn import Cbpdn, CbpdnConfig
from acsr_ray.sparse.descent import Entries, PatchDictionary
from acsr_ray.sparse.prox import project_atoms

EXACT = CbpdnConfig(lmbda=0.3, solver="descent", tolerance=1e-10, rounds=10_000)


def _random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _atoms(num_atoms=4, channels=3, support=(4, 3), seed=0):
    return project_atoms(_random(num_atoms, channels, *support, seed=seed))


def _matrix(atoms, size):
    """Return D (C H W, M H W) written out: column (m, i, j) is atom m put at (i, j), wrapped around."""
    count, channels, height, width = atoms.shape
    columns = []
    for m in range(count):
        for i in range(size[0]):
            for j in range(size[1]):
                image = atoms.new_zeros(channels, *size)
                image[:, :height, :width] = atoms[m]
                columns.append(image.roll((i, j), (1, 2)).flatten())
    return torch.stack(columns, 1)


@pytest.mark.parametrize(("size", "support"), [((12, 17), (4, 3)), ((13, 11), (5, 5)), ((5, 8), (5, 5))])
def test_the_optimum_is_sporcos(size, support):
    cbpdn = pytest.importorskip("sporco.admm.cbpdn")
    atoms, images = _atoms(5, 3, support, seed=1), _random(2, 3, *size, seed=2)
    for n in range(2):
        options = {"MaxMainIter": 3000, "RelStopTol": 1e-12, "rho": 5.0, "AutoRho": {"Enabled": False}}
        theirs = cbpdn.ConvBPDN(
            atoms.permute(2, 3, 1, 0).numpy(),
            images[n].permute(1, 2, 0).numpy(),
            EXACT.lmbda,
            cbpdn.ConvBPDN.Options(options),
            dimK=0,
        )
        theirs.solve()
        expected = torch.from_numpy(theirs.reconstruct().reshape(*size, 3)).permute(2, 0, 1)
        result = Cbpdn(atoms, EXACT).solve(images[n : n + 1])
        assert (result.reconstruction[0] - expected).norm() / expected.norm() < 1e-7
        maps = torch.from_numpy(theirs.getcoef().reshape(*size, 5)).permute(2, 0, 1)
        size_of_maps = EXACT.lmbda * maps.abs().sum()
        objective = 0.5 * (expected - images[n]).square().sum() + size_of_maps
        assert result.objective.item() == pytest.approx(objective.item(), rel=1e-8)


@settings(deadline=None, max_examples=20)
@given(
    height=st.integers(1, 11),
    width=st.integers(1, 11),
    support=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    channels=st.integers(1, 3),
    lmbda=st.floats(0.05, 3.0),
    seed=st.integers(0, 99),
)
def test_optimality_conditions_hold(height, width, support, channels, lmbda, seed):
    atoms = _random(3, channels, *support, seed=seed) + 0.1
    image = _random(1, channels, height, width, seed=seed + 1)
    config = EXACT.model_copy(update={"lmbda": lmbda, "tolerance": 1e-6})
    result = Cbpdn(atoms, config).solve(image)
    size = result.maps.shape[2:]
    assert size == (max(height, support[0]), max(width, support[1]))
    whole = F.pad(image, (0, size[1] - width, 0, size[0] - height))
    columns, maps = _matrix(atoms, size), result.maps.flatten()
    residual = whole.flatten() - columns @ maps
    slope, on = columns.T @ residual, maps != 0
    assert (slope[~on].abs() <= lmbda * (1 + 1e-5)).all()
    torch.testing.assert_close(slope[on], lmbda * maps[on].sign(), rtol=0, atol=1e-5 * lmbda)
    fidelity = 0.5 * residual.square().sum()
    torch.testing.assert_close(result.objective[0], fidelity + lmbda * maps.abs().sum())
    rebuilt = (columns @ maps).view(whole.shape)[..., :height, :width]
    torch.testing.assert_close(result.reconstruction, rebuilt)


@pytest.mark.parametrize("tolerance", [0.3, 0.05])
def test_the_tolerance_bounds_the_violation(tolerance):
    """Screening leaves most pixels out of most searches; had it missed a violator, it would be found here."""
    atoms, images = _atoms(6, 3, (4, 4), seed=3), _random(3, 3, 24, 20, seed=4)
    config = EXACT.model_copy(update={"tolerance": tolerance})
    result = Cbpdn(atoms, config).solve(images)
    columns = _matrix(atoms, (24, 20))
    slope = (images - result.reconstruction).flatten(1) @ columns
    violation = slope.abs().max(1).values / config.lmbda - 1
    assert (violation <= tolerance * (1 + 1e-9)).all()
    assert violation.max() > 1e-3


def test_most_pixels_are_left_out_of_late_searches(monkeypatch):
    searched = []
    correlate = PatchDictionary.correlate

    def watch(self, image, pixels, *rest):
        searched.append(len(pixels))
        return correlate(self, image, pixels, *rest)

    monkeypatch.setattr(PatchDictionary, "correlate", watch)
    image = _random(1, 3, 30, 30, seed=5)
    image[..., 15:] *= 0.02
    Cbpdn(_atoms(seed=6), EXACT).solve(image)
    assert searched[0] == 900
    assert searched[-1] < 450
    assert sum(searched) < 0.6 * 900 * len(searched)


def test_it_agrees_with_admm():
    atoms, images = _atoms(6, 3, (5, 4), seed=7), _random(2, 3, 17, 12, seed=8)
    ours = Cbpdn(atoms, EXACT).solve(images)
    theirs = Cbpdn(atoms, CbpdnConfig(lmbda=0.3, solver="admm", iterations=3000, rho=2.0)).solve(images)
    torch.testing.assert_close(ours.reconstruction, theirs.reconstruction, rtol=0, atol=1e-6)
    torch.testing.assert_close(ours.objective, theirs.objective, rtol=1e-8, atol=0)


def test_auto_descends_on_cpus():
    atoms, images = _atoms(), _random(2, 3, 9, 9, seed=9)
    auto, own, admm = (
        Cbpdn(atoms, CbpdnConfig(solver=solver)).reconstruct(images) for solver in ("auto", "descent", "admm")
    )
    assert torch.equal(auto, own)
    assert not torch.equal(auto, admm)


def test_descent_is_refused_elsewhere():
    solver = Cbpdn(_atoms(), CbpdnConfig(solver="descent"))
    with pytest.raises(ValueError, match="on CPUs only"):
        solver.reconstruct(torch.empty(1, 3, 8, 8, device="meta"))


def test_no_round_raises_the_objective():
    atoms, images = _atoms(6, 3, (4, 4)), _random(2, 3, 16, 16, seed=10)
    objectives = torch.stack(
        [
            Cbpdn(atoms, EXACT.model_copy(update={"rounds": rounds})).solve(images).objective
            for rounds in (1, 2, 3, 5, 10, 1000)
        ]
    )
    assert (objectives.diff(dim=0) <= 1e-12).all()
    assert (objectives[0] > objectives[-1] * 1.0001).all()


@settings(deadline=None, max_examples=15)
@given(threads=st.integers(1, 3), position=st.integers(0, 4), side=st.integers(3, 40), seed=st.integers(0, 9))
def test_a_result_depends_on_nothing_but_its_image(threads, position, side, seed):
    atoms = _atoms(8, 3, (8, 8)).float()
    solver = Cbpdn(torch.stack([atoms, -atoms.flip(0), atoms.roll(1, 2)]), CbpdnConfig(lmbda=0.2))
    images = 0.3 * _random(5, 3, side, side + 1, seed=seed).float()
    index = torch.tensor([0, 1, 2, 1, 0])
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        together = solver.solve(images, index=index)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    one = slice(position, position + 1)
    alone = solver.solve(images[one], index=index[one])
    assert torch.equal(together.maps[one], alone.maps)
    assert torch.equal(together.reconstruction[one], alone.reconstruction)
    assert torch.equal(together.reconstruction, solver.reconstruct(images, index=index))


@pytest.mark.parametrize("solver", ["admm", "descent"])
def test_each_image_is_coded_with_its_dictionary(solver):
    config = CbpdnConfig(lmbda=0.2, solver=solver, iterations=20)
    dictionaries = torch.stack([_atoms(seed=seed) for seed in range(3)])
    images, index = _random(5, 3, 11, 9, seed=11), torch.tensor([2, 0, 2, 1, 0])
    strength = torch.tensor([0.5, 1.0, 2.0, 1.0, 0.7], dtype=torch.float64)
    mixed = Cbpdn(dictionaries, config).solve(images, strength, index=index)
    for n, k in enumerate(index.tolist()):
        own = Cbpdn(dictionaries[k], config).solve(images[n : n + 1], strength[n : n + 1])
        # A product with one dictionary and one with a dictionary per image may be summed in other orders.
        torch.testing.assert_close(mixed.maps[n], own.maps[0], rtol=0, atol=1e-12)
        torch.testing.assert_close(mixed.reconstruction[n], own.reconstruction[0], rtol=0, atol=1e-12)
    other = Cbpdn(dictionaries, config).solve(images, strength, index=index.roll(1))
    assert (other.reconstruction - mixed.reconstruction).abs().max() > 1e-2


@pytest.mark.parametrize("solver", ["admm", "descent"])
def test_a_warm_start_at_the_optimum_stays_there(solver):
    atoms, images = _atoms(), _random(2, 3, 12, 12, seed=12)
    settings = {"lmbda": 0.3, "solver": solver, "rho": 2.0}
    few = CbpdnConfig(**settings, iterations=2, rounds=1, tolerance=0.01)
    optimum = Cbpdn(atoms, EXACT).solve(images)
    cold, warm = (Cbpdn(atoms, few).solve(images, start=start) for start in (None, optimum.maps))
    torch.testing.assert_close(warm.objective, optimum.objective, rtol=1e-6, atol=0)
    assert (cold.objective > 1.01 * optimum.objective).all()
    coded = Cbpdn(atoms, few).code(images, [Entries.of_maps(maps) for maps in optimum.maps.numpy()])
    torch.testing.assert_close(coded.objective, warm.objective, rtol=1e-10, atol=0)


@pytest.mark.parametrize("solver", ["admm", "descent"])
def test_entries_are_the_maps(solver):
    atoms, images = _atoms(), _random(2, 3, 10, 12, seed=13)
    config = CbpdnConfig(lmbda=0.3, solver=solver)
    coded, solved = Cbpdn(atoms, config).code(images), Cbpdn(atoms, config).solve(images)
    for entries, maps in zip(coded.entries, solved.maps, strict=True):
        assert torch.equal(entries.maps(maps.shape), maps)
        order = entries.places[:, 0] * 12 + entries.places[:, 1]
        assert (np.diff(order) >= 0).all()
    torch.testing.assert_close(coded.reconstruction, solved.reconstruction)
    torch.testing.assert_close(coded.objective, solved.objective)


@pytest.mark.parametrize("solver", ["admm", "descent"])
@pytest.mark.parametrize("size", [(9, 12), (3, 5)])
def test_padding_is_mirrored_and_cut_off(solver, size):
    atoms, images = _atoms(), _random(2, 3, *size, seed=14)
    config = CbpdnConfig(lmbda=0.3, solver=solver)
    padded = np.pad(images.numpy(), ((0, 0), (0, 0), (7, 7), (7, 7)), mode="symmetric")
    expected = Cbpdn(atoms, config).solve(torch.from_numpy(padded))
    result = Cbpdn(atoms, config.model_copy(update={"padding": 7})).solve(images)
    torch.testing.assert_close(result.reconstruction, expected.reconstruction[..., 7:-7, 7:-7])
    assert torch.equal(result.maps, expected.maps)
    assert result.maps.shape[2:] == (size[0] + 14, size[1] + 14)


def test_padding_keeps_one_edge_from_showing_at_the_other():
    atoms, images = _atoms(8, 3, (6, 6)), _random(1, 3, 16, 80, seed=15)
    moved = images.clone()
    moved[..., :3] += 2
    config = CbpdnConfig(lmbda=0.3, tolerance=1e-6, rounds=1000)
    change = []
    for padding in (0, 30):
        solver = Cbpdn(atoms, config.model_copy(update={"padding": padding}))
        difference = solver.reconstruct(moved) - solver.reconstruct(images)
        change.append(difference[..., -2:].abs().max().item())
    assert change[0] > 0.1
    assert change[1] < 0.05 * change[0]


def test_gradients_are_right():
    atoms = project_atoms(_random(4, 2, 3, 2))
    solver = Cbpdn(atoms, EXACT.model_copy(update={"tolerance": 1e-12}))
    images = _random(2, 2, 7, 6, seed=14).requires_grad_()
    assert (solver.solve(images).maps != 0).sum() > 50
    assert torch.autograd.gradcheck(solver.reconstruct, (images,), atol=1e-5)
    assert torch.autograd.gradcheck(lambda x: solver.solve(x).maps, (images,), atol=1e-5)
    assert torch.autograd.gradcheck(lambda x: solver.solve(x).objective, (images,), atol=1e-5)
    strength = torch.tensor([0.7, 1.6], dtype=torch.float64, requires_grad=True)
    plain = images.detach()
    assert torch.autograd.gradcheck(lambda t: solver.reconstruct(plain, t), (strength,), atol=1e-5)


@pytest.mark.parametrize("lmbda", [1e3, 0.3])
def test_gradients_of_images_without_codes(lmbda):
    images = torch.zeros(1, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    result = Cbpdn(_atoms(), EXACT.model_copy(update={"lmbda": lmbda})).solve(images)
    assert result.objective.item() == 0
    result.reconstruction.sum().backward()
    assert torch.equal(images.grad, torch.zeros_like(images))


def test_float32_follows_float64():
    atoms, images = _atoms(8, 3, (8, 8)), 0.3 * _random(2, 3, 20, 20, seed=16)
    config = CbpdnConfig(lmbda=0.1, tolerance=1e-4, rounds=1000)
    double = Cbpdn(atoms, config).solve(images)
    single = Cbpdn(atoms, config).solve(images.float())
    assert single.maps.dtype == single.objective.dtype == torch.float32
    torch.testing.assert_close(single.objective.double(), double.objective, rtol=1e-5, atol=0)
    torch.testing.assert_close(single.reconstruction.double(), double.reconstruction, rtol=0, atol=2e-3)


def test_planted_maps_are_recovered():
    atoms, generator = _atoms(4, 3, (4, 4), seed=10), torch.Generator().manual_seed(11)
    planted = torch.zeros(2, 4, 16, 15, dtype=torch.float64)
    for maps in planted:
        where = torch.randperm(maps.numel(), generator=generator)[:12]
        maps.view(-1)[where] = 1 + torch.rand(12, generator=generator, dtype=torch.float64)
    images = (_matrix(atoms, (16, 15)) @ planted.flatten(1).T).T.view(2, 3, 16, 15)
    result = Cbpdn(atoms, EXACT.model_copy(update={"lmbda": 0.01})).solve(images)
    assert (result.maps - planted).abs().max() < 0.05
    assert torch.equal(result.maps.abs() > 0.5, planted != 0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_shows(bad):
    images = _random(3, 3, 9, 9, seed=17)
    healthy = Cbpdn(_atoms(), EXACT).reconstruct(images)
    images[1, 0, 4, 4] = bad
    result = Cbpdn(_atoms(), EXACT).reconstruct(images)
    assert not torch.isfinite(result[1]).all()
    assert torch.equal(result[[0, 2]], healthy[[0, 2]])


def test_a_dictionary_with_an_atom_of_zeros():
    atoms = torch.cat([_atoms(), torch.zeros(1, 3, 4, 3, dtype=torch.float64)])
    images = _random(1, 3, 9, 9, seed=18)
    result = Cbpdn(atoms, EXACT).solve(images)
    expected = Cbpdn(atoms[:-1], EXACT).solve(images)
    torch.testing.assert_close(result.maps[:, :-1], expected.maps)
    assert torch.equal(result.maps[:, -1], torch.zeros_like(result.maps[:, -1]))


def test_an_image_of_many_blocks(monkeypatch):
    images = _random(1, 3, 18, 15, seed=19)
    whole = Cbpdn(_atoms(), EXACT).solve(images)
    monkeypatch.setattr(descent, "BLOCK", 32)
    parts = Cbpdn(_atoms(), EXACT).solve(images)
    torch.testing.assert_close(parts.maps, whole.maps, rtol=0, atol=1e-8)


def test_machine_code_is_kept_for_the_next_process(tmp_path):
    """Two fresh processes: the second finds every loop that the first compiled."""
    script = (
        "import torch; from acsr_ray.sparse.cbpdn import Cbpdn, CbpdnConfig;"
        "from acsr_ray.sparse.patch_loops import patch_loops;"
        "x = torch.rand(1, 3, 9, 9, requires_grad=True);"
        "Cbpdn(torch.rand(2, 3, 4, 4), CbpdnConfig(lmbda=.01)).reconstruct(x).sum().backward();"
        "loops = patch_loops(4, 12, 3);"
        "print(sum(sum(f.stats.cache_hits.values()) for f in vars(loops).values()))"
    )
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    hits = [
        subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
        ).stdout.strip()
        for _ in range(2)
    ]
    assert hits == ["0", "4"]


def test_a_strength_that_is_no_number_shows():
    images, strength = _random(2, 3, 9, 9, seed=20), torch.tensor([1.0, float("nan")], dtype=torch.float64)
    result = Cbpdn(_atoms(), EXACT).reconstruct(images, strength)
    assert torch.isfinite(result[0]).all()
    assert not torch.isfinite(result[1]).all()


@pytest.mark.parametrize("solver", ["admm", "descent"])
def test_no_images_and_no_such_dictionary_are_refused(solver):
    coder = Cbpdn(torch.stack([_atoms(), _atoms(seed=1)]), CbpdnConfig(solver=solver))
    with pytest.raises(ValueError, match="highpass must be"):
        coder.reconstruct(torch.zeros(0, 3, 9, 9))
    for wrong in (2, -1):
        with pytest.raises(IndexError, match=r"in 0\.\.1"):
            coder.reconstruct(torch.zeros(1, 3, 9, 9), index=torch.tensor([wrong]))


def test_a_warm_start_with_many_dictionaries():
    atoms, images, index = (
        torch.stack([_atoms(), _atoms(seed=1)]),
        _random(3, 3, 9, 9),
        torch.tensor([1, 0, 1]),
    )
    for solver in ("admm", "descent"):
        coder = Cbpdn(atoms, CbpdnConfig(lmbda=0.3, solver=solver, iterations=300, rounds=100))
        first = coder.code(images, index=index)
        again = coder.code(images, first.entries, index=index)
        torch.testing.assert_close(again.objective, first.objective, rtol=1e-3, atol=0)
        plain = coder.solve(images, index=index)
        torch.testing.assert_close(first.reconstruction, plain.reconstruction)
