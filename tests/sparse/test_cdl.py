"""Dictionary learning: progress, feasible atoms, planted atoms and sporco's online learner."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from acsr_ray.sparse.cbpdn import Cbpdn, CbpdnConfig
from acsr_ray.sparse.cdl import CdlConfig, learn_dictionary
from acsr_ray.sparse.prox import project_atoms

CODE = CbpdnConfig(lmbda=0.2, iterations=30, rho=2.0)
CONFIG = CdlConfig(num_atoms=6, support=5, code=CODE, epochs=15, batch_size=4)


def _planted_atoms(num_atoms=4, channels=3, support=5, seed=0):
    """Return smooth random atoms, well apart from one another."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(num_atoms, channels, support, support, generator=generator, dtype=torch.float64)
    kernel = torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]], dtype=torch.float64) / 16
    smooth = F.conv2d(F.pad(noise, (1,) * 4), kernel.expand(channels, 1, 3, 3), groups=channels)
    return project_atoms(smooth)


def _planted_images(atoms, num_images, side=24, spikes=14, seed=1):
    generator = torch.Generator().manual_seed(seed)
    maps = torch.zeros(num_images, len(atoms), side, side, dtype=torch.float64)
    for image in maps:
        where = torch.randperm(image.numel(), generator=generator)[:spikes]
        image.view(-1)[where] = torch.randn(spikes, generator=generator, dtype=torch.float64) + 0.5
    support = atoms.shape[-1]
    padded = F.pad(atoms, (0, side - support, 0, side - support))
    product = torch.einsum("nmhw,mchw->nchw", torch.fft.rfft2(maps), torch.fft.rfft2(padded))
    return torch.fft.irfft2(product, s=(side, side))


def _held_out_objective(atoms, images):
    code = CODE.model_copy(update={"iterations": 200})
    return Cbpdn(atoms.to(images), code).solve(images).objective.mean().item()


@pytest.fixture(scope="module")
def planted():
    return _planted_atoms()


@pytest.fixture(scope="module")
def images(planted):
    return _planted_images(planted, 12)


@pytest.fixture(scope="module")
def learned(images):
    return learn_dictionary(images, CONFIG, seed=0)


def test_objective_falls_well_below_its_start(learned):
    assert len(learned.objective) == 3 * CONFIG.epochs
    assert np.mean(learned.objective[-3:]) < 0.7 * np.mean(learned.objective[:3])


def test_atoms_are_feasible(learned):
    assert learned.atoms.shape == (6, 3, 5, 5)
    norms = learned.atoms.flatten(1).norm(dim=1)
    torch.testing.assert_close(norms, torch.ones_like(norms), rtol=0, atol=1e-12)
    assert learned.atoms.mean((2, 3)).abs().max() < 1e-12


def test_held_out_objective_beats_random_and_starting_atoms(learned, planted, images):
    held_out = _planted_images(planted, 4, seed=2)
    generator = torch.Generator().manual_seed(3)
    random = project_atoms(torch.randn(6, 3, 5, 5, generator=generator, dtype=torch.float64))
    patches = project_atoms(images[:6, :, 8:13, 8:13])
    got = _held_out_objective(learned.atoms, held_out)
    assert got < 0.8 * _held_out_objective(random, held_out)
    assert got < 0.9 * _held_out_objective(patches, held_out)
    assert got < 1.05 * _held_out_objective(planted, held_out)


def test_planted_atoms_are_found_up_to_shift_sign_and_order(learned, planted):
    found = F.pad(learned.atoms, (4,) * 4)
    similarity = F.conv2d(found, planted).abs().amax((2, 3))
    assert (similarity.amax(0) > 0.95).all()


def test_earlier_batches_count_unless_forgotten(images):
    config = CONFIG.model_copy(update={"batch_size": 6, "epochs": 1})
    kept, faded, lost = (
        learn_dictionary(images, config.model_copy(update={"forgetting": exponent}), seed=0)
        for exponent in (0.0, 1.0, 1e6)
    )
    # The first update has no past, so both batches are coded alike; only the second update differs.
    assert kept.objective == faded.objective == lost.objective
    to_lost, to_faded = ((kept.atoms - other.atoms).norm().item() for other in (lost, faded))
    assert to_lost > to_faded > 1e-3


def test_same_seed_same_dictionary(images):
    config = CONFIG.model_copy(update={"epochs": 2})
    first, again = (learn_dictionary(images, config, seed=7) for _ in range(2))
    other = learn_dictionary(images, config, seed=8)
    assert torch.equal(first.atoms, again.atoms)
    assert first.objective == again.objective
    assert not torch.allclose(first.atoms, other.atoms)


def test_float32_follows_float64(images):
    config = CONFIG.model_copy(update={"epochs": 2})
    double, single = (learn_dictionary(data, config, seed=0) for data in (images, images.float()))
    assert single.atoms.dtype == torch.float32
    np.testing.assert_allclose(single.objective, double.objective, rtol=1e-3)


def test_blank_images_leave_the_atoms_feasible():
    result = learn_dictionary(torch.zeros(3, 3, 8, 8), CONFIG.model_copy(update={"epochs": 1}), seed=0)
    assert torch.isfinite(result.atoms).all()
    torch.testing.assert_close(result.atoms.flatten(1).norm(dim=1), torch.ones(6))


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
def test_bad_images_are_refused(highpass):
    with pytest.raises(ValueError, match="highpass must be"):
        learn_dictionary(highpass, CONFIG, seed=0)


def test_as_good_as_sporcos_online_learner(learned, planted, images):
    onlinecdl = pytest.importorskip("sporco.dictlrn.onlinecdl")
    options = onlinecdl.OnlineConvBPDNDictLearn.Options(
        {
            "Verbose": False,
            "ZeroMean": True,
            "eta_a": 10.0,
            "eta_b": 20.0,
            "DataType": np.float64,
            "CBPDN": {
                "rho": CODE.penalty,
                "AutoRho": {"Enabled": False},
                "MaxMainIter": CODE.iterations,
                "RelStopTol": 0.0,
            },
        }
    )
    rng = np.random.default_rng(4)
    start = rng.standard_normal((5, 5, 3, 6))
    learner = onlinecdl.OnlineConvBPDNDictLearn(start, CODE.lmbda, options)
    for _ in range(CONFIG.epochs):
        for n in rng.permutation(len(images)):
            learner.solve(images[n].permute(1, 2, 0).numpy())
    theirs = torch.from_numpy(learner.getdict().reshape(5, 5, 3, 6)).permute(3, 2, 0, 1)
    held_out = _planted_images(planted, 4, seed=5)
    ours = _held_out_objective(learned.atoms, held_out)
    assert _held_out_objective(theirs, held_out) < _held_out_objective(
        torch.from_numpy(start).permute(3, 2, 0, 1) / 10, held_out
    )
    assert ours <= 1.05 * _held_out_objective(theirs, held_out)


def test_batch_learning_never_raises_the_objective_of_all_images(images):
    config = CONFIG.model_copy(update={"method": "batch", "epochs": 8, "batch_size": 5})
    learned = learn_dictionary(images, config, seed=0)
    batches = 3
    assert len(learned.objective) == 8 * batches
    sizes = np.tile([5, 5, 2], 8)
    passes = (np.array(learned.objective) * sizes).reshape(8, batches).sum(1)
    # Codes stop within their tolerance, a share of a percent above their optimum.
    assert (np.diff(passes) < 2e-3 * passes[:-1]).all()
    assert passes[-1] < 0.75 * passes[0]


def test_a_blank_first_batch_does_not_stop_learning(images):
    mixed = torch.cat([images[:4], torch.zeros_like(images[:4])])
    config = CONFIG.model_copy(update={"batch_size": 1, "epochs": 3})
    learned = [learn_dictionary(mixed, config, seed=seed) for seed in range(4)]
    blank = [result.objective[0] == 0 for result in learned]
    assert any(blank)
    assert not all(blank)
    ends = [_held_out_objective(result.atoms, images[4:]) for result in learned]
    assert max(ends) < 1.5 * min(ends)


def test_dead_atoms_are_replaced(images):
    dead = torch.zeros(1, 3, 5, 5, dtype=torch.float64)
    # A checkerboard of pixels: the images are smooth.
    dead[:, :, ::2, ::2], dead[:, :, 1::2, 1::2] = 1, 1
    start = torch.cat([learn_dictionary(images, CONFIG, seed=1).atoms[:5], project_atoms(dead)])
    for method in ("online", "batch"):
        config = CONFIG.model_copy(update={"method": method, "epochs": 4})
        found = learn_dictionary(images, config, seed=0, start=start).atoms
        assert (found[5] * start[5]).sum().abs() < 0.5
        maps = Cbpdn(found, CODE).solve(images).maps
        usage = maps.square().sum((0, 2, 3))
        assert usage[5] > 1e-2 * usage.mean()
        assert Cbpdn(start, CODE).solve(images).maps[:, 5].square().sum() < 1e-3 * usage.mean()


def test_atoms_of_several_sizes(images):
    config = CdlConfig(num_atoms=7, scales=(6, 3, 4), code=CODE, epochs=2, batch_size=4)
    assert config.window == 6
    assert config.sides == (3, 3, 3, 4, 4, 6, 6)
    atoms = learn_dictionary(images, config, seed=0).atoms
    assert atoms.shape == (7, 3, 6, 6)
    for atom, side in zip(atoms, config.sides, strict=True):
        assert torch.equal(atom[:, side:], torch.zeros_like(atom[:, side:]))
        assert torch.equal(atom[:, :, side:], torch.zeros_like(atom[:, :, side:]))
        assert atom[:, :side, :side].mean((1, 2)).abs().max() < 1e-12
        assert atom.norm().item() == pytest.approx(1, abs=1e-12)
        assert atom[:, side - 1].abs().max() > 1e-3


def test_a_start_is_where_learning_starts(images, learned):
    config = CONFIG.model_copy(update={"epochs": 1, "batch_size": 12})
    cold, warm = (
        learn_dictionary(images, config, seed=3, start=start).objective[0] for start in (None, learned.atoms)
    )
    assert warm < 0.8 * cold
    with pytest.raises(ValueError, match="start must be"):
        learn_dictionary(images, config, seed=3, start=learned.atoms[:3])


@pytest.mark.parametrize(
    "settings",
    [
        {"scales": (1, 4)},
        {"scales": (3, 4, 5), "num_atoms": 2},
        {"scales": (3, 4), "backend": "sporco"},
        {"method": "batch", "backend": "sporco"},
        {"code": CODE.model_copy(update={"padding": 4})},
    ],
)
def test_settings_that_cannot_work_are_refused(settings):
    with pytest.raises(ValueError, match=r"scales|backend|padding"):
        CdlConfig(**settings)


def test_learning_on_whole_maps_ends_alike(images):
    """ADMM codes as a GPU does; the surrogate takes the same entries."""
    admm = CONFIG.model_copy(update={"code": CODE.model_copy(update={"solver": "admm", "iterations": 200})})
    own, other = (
        _held_out_objective(learn_dictionary(images, config, seed=0).atoms, images)
        for config in (CONFIG, admm)
    )
    assert own == pytest.approx(other, rel=0.03)
