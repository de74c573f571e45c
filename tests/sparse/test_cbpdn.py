"""CBPDN against sporco, its optimality conditions and direct circular convolution."""

import pytest
import torch
import torch.nn.functional as F

from acsr_ray.sparse.cbpdn import Cbpdn, CbpdnConfig
from acsr_ray.sparse.fourier import MATMUL_SIDE
from acsr_ray.sparse.prox import project_atoms


def _random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _atoms(num_atoms=4, channels=3, support=(4, 3), seed=0):
    return project_atoms(_random(num_atoms, channels, *support, seed=seed))


def _convolve(atoms, maps):
    """Return sum_m d_m * x_m by shifting the maps, without a DFT."""
    result = maps.new_zeros((len(maps), atoms.shape[1], *maps.shape[2:]))
    for row in range(atoms.shape[2]):
        for column in range(atoms.shape[3]):
            shifted = maps.roll((row, column), (2, 3))
            result += torch.einsum("mc,nmhw->nchw", atoms[:, :, row, column], shifted)
    return result


def _correlate(atoms, images):
    """Return D^T images (N, M, H, W), the transpose of `_convolve`."""
    result = images.new_zeros((len(images), len(atoms), *images.shape[2:]))
    for row in range(atoms.shape[2]):
        for column in range(atoms.shape[3]):
            shifted = images.roll((-row, -column), (2, 3))
            result += torch.einsum("mc,nchw->nmhw", atoms[:, :, row, column], shifted)
    return result


def _sparse_maps(num_images, num_atoms, size, spikes, seed):
    generator = torch.Generator().manual_seed(seed)
    maps = torch.zeros(num_images, num_atoms, *size, dtype=torch.float64)
    for image in range(num_images):
        where = torch.randperm(maps[image].numel(), generator=generator)[:spikes]
        sign = torch.randint(2, (spikes,), generator=generator) * 2 - 1
        height = 1 + torch.rand(spikes, generator=generator, dtype=torch.float64)
        maps[image].view(-1)[where] = sign * height
    return maps


@pytest.mark.parametrize(
    ("size", "support", "num_atoms", "channels"),
    [
        ((16, 16), (4, 4), 6, 3),
        ((12, 17), (4, 3), 5, 3),
        ((13, 11), (5, 5), 4, 3),
        ((15, 8), (3, 3), 3, 2),
        ((70, 66), (4, 4), 3, 3),
    ],
)
def test_parity_with_sporco(size, support, num_atoms, channels):
    cbpdn = pytest.importorskip("sporco.admm.cbpdn")
    atoms, images = _atoms(num_atoms, channels, support, seed=1), _random(2, channels, *size, seed=2)
    config = CbpdnConfig(solver="admm", lmbda=0.2, iterations=25, rho=3.0, relaxation=1.8)
    options = cbpdn.ConvBPDN.Options(
        {
            "Verbose": False,
            "MaxMainIter": config.iterations,
            "RelStopTol": 0.0,
            "AutoRho": {"Enabled": False},
            "rho": config.rho,
            "RelaxParam": config.relaxation,
        }
    )
    solver = cbpdn.ConvBPDN(
        atoms.permute(2, 3, 1, 0).numpy(),
        images.permute(2, 3, 1, 0).numpy(),
        config.lmbda,
        options,
        dimK=1,
    )
    solver.solve()
    theirs = torch.from_numpy(solver.reconstruct().reshape(*size, channels, 2)).permute(3, 2, 0, 1)
    result = Cbpdn(atoms, config).solve(images)
    assert theirs.norm() > 0.1 * images.norm()
    assert (result.reconstruction - theirs).norm() / theirs.norm() < 1e-10
    their_maps = torch.from_numpy(solver.getcoef().reshape(*size, 2, num_atoms)).permute(2, 3, 0, 1)
    assert (result.maps - their_maps).norm() / their_maps.norm() < 1e-10


def test_the_large_parity_case_takes_the_fft():
    assert max(70, 66) > MATMUL_SIDE > 17


def test_default_penalty_is_sporcos():
    assert CbpdnConfig(solver="admm", lmbda=0.1).penalty == pytest.approx(6.0)
    assert CbpdnConfig(solver="admm", lmbda=0.1, rho=2.5).penalty == 2.5


@pytest.mark.parametrize("size", [(12, 12), (9, 14)])
def test_optimality_conditions_hold(size):
    atoms, images, lmbda = _atoms(), _random(2, 3, *size, seed=3), 0.5
    maps = Cbpdn(atoms, CbpdnConfig(solver="admm", lmbda=lmbda, iterations=1500, rho=1.0)).solve(images).maps
    slope = _correlate(atoms, _convolve(atoms, maps) - images)
    support = maps != 0
    assert 20 < support.sum() < support.numel() / 2
    assert slope[~support].abs().max() <= lmbda * (1 + 1e-4)
    assert (slope[support] + lmbda * maps[support].sign()).abs().max() <= 1e-4 * lmbda


def test_minimiser_beats_perturbed_maps():
    atoms, images, config = (
        _atoms(),
        _random(1, 3, 9, 9, seed=4),
        CbpdnConfig(solver="admm", lmbda=0.3, iterations=800),
    )
    result = Cbpdn(atoms, config).solve(images)
    for seed in range(10):
        moved = result.maps + 0.02 * _random(*result.maps.shape, seed=100 + seed) * (result.maps != 0)
        residual = _convolve(atoms, moved) - images
        assert 0.5 * residual.square().sum() + config.lmbda * moved.abs().sum() > result.objective[0]


def test_maps_vanish_from_lmbda_max_on():
    atoms, images = _atoms(), _random(1, 3, 10, 9, seed=5)
    lmbda_max = _correlate(atoms, images).abs().max().item()
    above = Cbpdn(atoms, CbpdnConfig(solver="admm", lmbda=1.001 * lmbda_max, iterations=300, rho=1.0)).solve(
        images
    )
    below = Cbpdn(atoms, CbpdnConfig(solver="admm", lmbda=0.95 * lmbda_max, iterations=300, rho=1.0)).solve(
        images
    )
    assert torch.equal(above.maps, torch.zeros_like(above.maps))
    assert above.reconstruction.abs().max() == 0
    assert below.maps.abs().max() > 0


@pytest.mark.parametrize("size", [(12, 10), (66, 7)])
def test_batch_equals_one_by_one(size):
    solver = Cbpdn(_atoms(), CbpdnConfig(solver="admm", lmbda=0.1, iterations=20))
    images = _random(5, 3, *size, seed=6)
    batch = solver.solve(images)
    for n in range(5):
        alone = solver.solve(images[n : n + 1])
        torch.testing.assert_close(batch.maps[n], alone.maps[0], rtol=0, atol=1e-12)
        torch.testing.assert_close(batch.reconstruction[n], alone.reconstruction[0], rtol=0, atol=1e-12)
        torch.testing.assert_close(batch.objective[n], alone.objective[0], rtol=1e-12, atol=0)


@pytest.mark.parametrize("position", [0, 2, 3])
@pytest.mark.parametrize("size", [(32, 32), (13, 17), (66, 9)])
def test_neighbours_do_not_change_a_bit(size, position):
    solver = Cbpdn(_atoms(8, support=(8, 8)).float(), CbpdnConfig(solver="admm", iterations=10))
    image = _random(3, *size, seed=7).float()
    outcomes = []
    for seed in (8, 9):
        batch = _random(4, 3, *size, seed=seed).float() * (1 if seed == 8 else 30)
        batch[position] = image
        outcomes.append(solver.solve(batch))
    first, second = outcomes
    assert torch.equal(first.maps[position], second.maps[position])
    assert torch.equal(first.reconstruction[position], second.reconstruction[position])


def test_planted_maps_are_recovered():
    atoms = _atoms(4, 3, (4, 4), seed=10)
    planted = _sparse_maps(2, 4, (16, 15), spikes=12, seed=11)
    result = Cbpdn(atoms, CbpdnConfig(solver="admm", lmbda=0.01, iterations=400, rho=1.0)).solve(
        _convolve(atoms, planted)
    )
    assert (result.maps - planted).abs().max() < 0.05
    assert torch.equal(result.maps.abs() > 0.5, planted != 0)


@pytest.mark.parametrize("size", [(12, 12), (11, 14), (66, 5)])
def test_objective_and_reconstruction_belong_to_the_maps(size):
    atoms, images = _atoms(support=(5, 4)), _random(3, 3, *size, seed=12)
    config = CbpdnConfig(solver="admm", lmbda=0.15, iterations=7)
    result = Cbpdn(atoms, config).solve(images)
    direct = _convolve(atoms, result.maps)
    torch.testing.assert_close(result.reconstruction, direct, rtol=0, atol=1e-12)
    fidelity = 0.5 * (direct - images).square().sum((1, 2, 3))
    expected = fidelity + config.lmbda * result.maps.abs().sum((1, 2, 3))
    torch.testing.assert_close(result.objective, expected, rtol=1e-12, atol=0)
    assert torch.equal(Cbpdn(atoms, config).reconstruct(images), result.reconstruction)


def test_more_iterations_lower_the_objective():
    atoms, images = _atoms(), _random(2, 3, 12, 12, seed=13)
    few, many, converged = (
        Cbpdn(atoms, CbpdnConfig(solver="admm", lmbda=0.3, iterations=iterations)).solve(images).objective
        for iterations in (3, 60, 1000)
    )
    assert (many < few).all()
    assert (many <= 1.03 * converged).all()


def test_gradient_is_right():
    solver = Cbpdn(_atoms(2, 2, (3, 2)), CbpdnConfig(solver="admm", lmbda=0.05, iterations=4))
    images = _random(2, 2, 5, 4, seed=14).requires_grad_()
    assert solver.solve(images).maps.abs().max() > 0
    assert torch.autograd.gradcheck(solver.reconstruct, (images,))
    assert torch.autograd.gradcheck(lambda x: solver.solve(x).objective, (images,))


@pytest.mark.parametrize("rho", [None, 2.0])
def test_strength_scales_lmbda_of_an_image_and_leaves_rho(rho):
    atoms, images = _atoms(), _random(4, 3, 12, 10, seed=17)
    config = CbpdnConfig(solver="admm", lmbda=0.1, iterations=15, rho=rho)
    strength = torch.tensor([0.5, 1.0, 2.0, 7.0], dtype=torch.float64)
    result = Cbpdn(atoms, config).solve(images, strength)
    for n, factor in enumerate(strength.tolist()):
        scaled = CbpdnConfig(solver="admm", lmbda=0.1 * factor, iterations=15, rho=config.penalty)
        alone = Cbpdn(atoms, scaled).solve(images[n : n + 1])
        torch.testing.assert_close(result.maps[n], alone.maps[0], rtol=0, atol=1e-12)
        torch.testing.assert_close(result.reconstruction[n], alone.reconstruction[0], rtol=0, atol=1e-12)
        torch.testing.assert_close(result.objective[n], alone.objective[0], rtol=1e-12, atol=0)
    # A penalty that followed lmbda would end elsewhere.
    followed = Cbpdn(atoms, CbpdnConfig(solver="admm", lmbda=0.7, iterations=15)).solve(images[3:])
    assert (result.maps[3] - followed.maps[0]).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_strength_one_changes_no_bit(dtype):
    solver, images = (
        Cbpdn(_atoms(), CbpdnConfig(solver="admm", iterations=20)),
        _random(3, 3, 9, 14, seed=18).to(dtype),
    )
    plain, strong = solver.solve(images), solver.solve(images, torch.ones(3, dtype=dtype))
    assert torch.equal(strong.maps, plain.maps)
    assert torch.equal(strong.reconstruction, plain.reconstruction)
    assert torch.equal(strong.objective, plain.objective)
    assert torch.equal(solver.reconstruct(images, torch.ones(3, dtype=dtype)), plain.reconstruction)


def test_more_strength_takes_more_away():
    atoms, image = _atoms(), _random(1, 3, 12, 12, seed=19)
    strength = torch.tensor([0.2, 1.0, 5.0, 1e4], dtype=torch.float64)
    solver = Cbpdn(atoms, CbpdnConfig(solver="admm", iterations=60))
    size = solver.reconstruct(image.expand(4, -1, -1, -1), strength).flatten(1).norm(dim=1)
    assert (size.diff() < 0).all()
    assert size[-1] == 0


def test_gradient_with_respect_to_strength_is_right():
    solver = Cbpdn(_atoms(2, 2, (3, 2)), CbpdnConfig(solver="admm", lmbda=0.05, iterations=4))
    images = _random(2, 2, 5, 4, seed=14)
    strength = torch.tensor([0.7, 1.6], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: solver.reconstruct(images, s), (strength,))


@pytest.mark.parametrize("size", [(3, 3), (1, 1), (4, 20), (20, 2)])
def test_image_smaller_than_an_atom(size):
    atoms, images = _atoms(support=(8, 8)), _random(2, 3, *size, seed=15)
    solver = Cbpdn(atoms, CbpdnConfig(solver="admm", iterations=20))
    result = solver.solve(images)
    assert result.reconstruction.shape == images.shape
    height, width = max(8, size[0]), max(8, size[1])
    assert result.maps.shape == (2, 4, height, width)
    padded = F.pad(images, (0, width - size[1], 0, height - size[0]))
    expected = solver.solve(padded).reconstruction[..., : size[0], : size[1]]
    torch.testing.assert_close(result.reconstruction, expected, rtol=0, atol=1e-14)


def test_one_solver_serves_many_sizes_and_dtypes():
    atoms, config = _atoms(), CbpdnConfig(solver="admm", iterations=5)
    shared = Cbpdn(atoms, config)
    for size in ((8, 8), (8, 9), (9, 8), (8, 8)):
        for dtype in (torch.float32, torch.float64):
            images = _random(1, 3, *size, seed=16).to(dtype)
            got = shared.solve(images).reconstruction
            assert got.dtype == dtype
            assert torch.equal(got, Cbpdn(atoms, config).solve(images).reconstruction)


@pytest.mark.parametrize(
    "atoms",
    [
        torch.ones(3, 4, 4),
        torch.ones(1, 1, 2, 3, 4, 4),
        torch.full((2, 3, 4, 4), float("nan")),
        torch.full((2, 3, 4, 4), float("inf")),
    ],
)
def test_bad_atoms_are_refused(atoms):
    with pytest.raises(ValueError, match="atoms must be finite"):
        Cbpdn(atoms, CbpdnConfig(solver="admm"))


@pytest.mark.parametrize("shape", [(2, 1, 8, 8), (2, 4, 8, 8), (3, 8, 8)])
def test_bad_images_are_refused(shape):
    with pytest.raises(ValueError, match="highpass must be"):
        Cbpdn(_atoms(), CbpdnConfig(solver="admm")).solve(torch.zeros(shape))
