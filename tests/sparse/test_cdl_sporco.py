"""What both learners of dictionaries promise; `-m gpu` runs the same tests on sporco's CuPy half."""

from contextlib import suppress
from types import SimpleNamespace

import numpy as np
import pytest
import sporco
import torch
import torch.nn.functional as F
from sporco import fft

from acsr_ray.sparse.cbpdn import Cbpdn, CbpdnConfig
from acsr_ray.sparse.cdl import CdlConfig, learn_dictionary
from acsr_ray.sparse.cdl_sporco import _sporco_on
from acsr_ray.sparse.prox import project_atoms

CODE = CbpdnConfig(lmbda=0.2, iterations=20, rho=2.0)
# Ten images make batches of 4, 4 and 2.
CONFIG = CdlConfig(num_atoms=5, support=5, code=CODE, epochs=6, batch_size=4)
BACKENDS = ["acsr", "sporco", pytest.param("cupy", marks=pytest.mark.gpu)]


def random_atoms(count, seed):
    generator = torch.Generator().manual_seed(seed)
    return project_atoms(torch.randn(count, 3, 5, 5, generator=generator, dtype=torch.float64))


def planted_images(count, seed, side=20, spikes=10):
    """Return sparse sums of the same four atoms (count, 3, side, side)."""
    generator = torch.Generator().manual_seed(seed)
    maps = torch.zeros(count, 4 * side * side, dtype=torch.float64)
    where = torch.rand(maps.shape, generator=generator).argsort(1)[:, :spikes]
    maps.scatter_(1, where, torch.randn(where.shape, generator=generator, dtype=torch.float64) + 0.5)
    padded = F.pad(random_atoms(4, seed=0), (0, side - 5, 0, side - 5))
    maps_f = torch.fft.rfft2(maps.view(count, 4, side, side))
    product = torch.einsum("nmhw,mchw->nchw", maps_f, torch.fft.rfft2(padded))
    return torch.fft.irfft2(product, s=(side, side))


def held_out_objective(atoms):
    code = CODE.model_copy(update={"iterations": 100})
    return Cbpdn(atoms.cpu().double(), code).solve(planted_images(6, seed=2)).objective.mean().item()


def learn(backend, images, seed=1, **changes):
    device = "cuda" if backend == "cupy" else "cpu"
    learner = "acsr" if backend == "acsr" else "sporco"
    config = CONFIG.model_copy(update={"backend": learner, **changes})
    return learn_dictionary(images.to(device), config, seed=seed)


@pytest.fixture(params=BACKENDS, scope="module")
def backend(request):
    if request.param == "cupy":
        pytest.importorskip("cupy")
    return request.param


@pytest.fixture(scope="module")
def images():
    return planted_images(10, seed=1)


@pytest.fixture(scope="module")
def learned(backend, images):
    return learn(backend, images)


def test_atoms_are_feasible_and_stay_where_the_images_are(backend, images, learned):
    assert learned.atoms.shape == (5, 3, 5, 5)
    assert learned.atoms.dtype == images.dtype
    assert learned.atoms.device.type == ("cuda" if backend == "cupy" else "cpu")
    norms = learned.atoms.flatten(1).norm(dim=1)
    torch.testing.assert_close(norms, torch.ones_like(norms), rtol=0, atol=1e-12)
    assert learned.atoms.mean((2, 3)).abs().max() < 1e-12


def test_the_objective_of_every_mini_batch_is_told_and_falls(learned):
    assert len(learned.objective) == 3 * CONFIG.epochs
    assert np.isfinite(learned.objective).all()
    assert np.mean(learned.objective[-3:]) < 0.5 * np.mean(learned.objective[:3])


def test_the_first_objective_is_that_of_the_starting_atoms(backend, images):
    # One batch: it is coded with the start, which both learners share, by the same ADMM.
    same = {"batch_size": 10, "epochs": 1, "code": CONFIG.code.model_copy(update={"solver": "admm"})}
    first = learn(backend, images, **same).objective
    np.testing.assert_allclose(first, learn("acsr", images, **same).objective, rtol=1e-9)


def test_the_seed_decides(backend, images):
    first, again, other = (learn(backend, images, seed, epochs=1) for seed in (7, 7, 8))
    assert torch.equal(first.atoms, again.atoms)
    assert first.objective == again.objective
    assert not torch.allclose(first.atoms, other.atoms, atol=0.1)


def test_held_out_images_are_coded_better_than_with_random_atoms(learned):
    assert held_out_objective(learned.atoms) < 0.4 * held_out_objective(random_atoms(5, seed=3))


def test_held_out_objectives_of_the_learners_are_alike(images, learned):
    ours = held_out_objective(learn("acsr", images).atoms)
    assert ours / 1.1 < held_out_objective(learned.atoms) < 1.1 * ours


def test_float32_follows_float64(backend, images):
    double, single = (learn(backend, data, epochs=1) for data in (images, images.float()))
    assert single.atoms.dtype == torch.float32
    np.testing.assert_allclose(single.objective, double.objective, rtol=1e-3)


@pytest.mark.parametrize("channels", [1, 2])
def test_any_number_of_channels(backend, images, channels):
    result = learn(backend, images[:, :channels], epochs=2)
    assert result.atoms.shape == (5, channels, 5, 5)
    assert np.mean(result.objective[-3:]) < np.mean(result.objective[:3])


def test_blank_images_leave_the_atoms_feasible(backend):
    result = learn(backend, torch.zeros(3, 3, 8, 8), epochs=1)
    assert torch.isfinite(result.atoms).all()
    torch.testing.assert_close(result.atoms.flatten(1).norm(dim=1).cpu(), torch.ones(5))


@pytest.mark.parametrize(
    "highpass",
    [
        torch.zeros(0, 3, 8, 8),
        torch.zeros(2, 3, 4, 8),
        torch.zeros(2, 3, 8, 4),
        torch.zeros(3, 8, 8),
        torch.full((1, 3, 8, 8), float("nan")),
    ],
)
def test_bad_images_are_refused(backend, highpass):
    with pytest.raises(ValueError, match="highpass must be"):
        learn(backend, highpass)


def test_unknown_backends_are_refused():
    with pytest.raises(ValueError, match="backend"):
        CdlConfig(backend="spams")


def test_sporco_refuses_a_single_atom(images):
    with pytest.raises(ValueError, match="num_atoms must be >= 2"):
        learn("sporco", images, num_atoms=1)


def test_sporco_is_quiet_and_leaves_fftw_as_it_was(images, capfd):
    before = fft.pyfftw_threads, fft.pyfftw_planner_effort
    learn("sporco", images[:2], epochs=1)
    with suppress(RuntimeError), _sporco_on(torch.device("cpu")):
        assert (fft.pyfftw_threads, fft.pyfftw_planner_effort) == (torch.get_num_threads(), "FFTW_ESTIMATE")
        raise RuntimeError
    assert (fft.pyfftw_threads, fft.pyfftw_planner_effort) == before
    assert capfd.readouterr() == ("", "")


def test_a_gpu_without_cupy_is_an_error_and_no_silent_numpy(monkeypatch):
    monkeypatch.setattr(sporco, "cupy", SimpleNamespace(cupy_enabled=lambda: False), raising=False)
    with pytest.raises(ImportError, match=r"acsr-ray\[gpu\]"), _sporco_on(torch.device("cuda", 0)):
        pass


@pytest.mark.gpu
def test_cupy_agrees_with_numpy(images):
    pytest.importorskip("cupy")
    on_cpu, on_gpu = (learn(backend, images, epochs=2) for backend in ("sporco", "cupy"))
    torch.testing.assert_close(on_gpu.atoms.cpu(), on_cpu.atoms, rtol=0, atol=1e-6)
    np.testing.assert_allclose(on_gpu.objective, on_cpu.objective, rtol=1e-6)
