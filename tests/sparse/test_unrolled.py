"""The unrolled network: at its start the solver it was cut from, and its contract for any weights."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from acsr_ray.sparse.noise import noise_level
from acsr_ray.sparse.prox import project_atoms
from acsr_ray.sparse.unrolled import (
    UnrolledConfig,
    UnrolledCsc,
    ridge_analysis,
    spread_atoms,
)

LMBDA = 0.1


def _random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _atoms(num_atoms=4, channels=3, support=5, seed=0):
    return project_atoms(_random(num_atoms, channels, support, support, seed=seed))


def _bands(count=2, height=12, width=12, seed=1):
    """Return low and high bands (N, 3, H, W) of about the sizes that photos have."""
    low = torch.rand(count, 3, 1, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    ramp = torch.linspace(-0.2, 0.2, width, dtype=torch.float64)
    return low + ramp.expand(count, 3, height, width), 0.3 * _random(count, 3, height, width, seed=seed + 1)


def _network(config, atoms=None, clusters=1, lmbda=LMBDA, seed=3):
    atoms = _atoms() if atoms is None else atoms
    sets = atoms if atoms.ndim == 5 else atoms[None]
    generator = torch.Generator().manual_seed(seed)
    return UnrolledCsc(sets, config, clusters, lmbda, generator).double()


def _dense(atoms, height, width, stride):
    """Return D (C H W, M h w): each column is one atom `stride` pixels further, cut off at the border."""
    support = atoms.shape[-1]
    pad = (support - stride) // 2
    columns = []
    for atom in atoms:
        for top in range(0, height, stride):
            for left in range(0, width, stride):
                canvas = atoms.new_zeros(len(atom), height + 2 * pad, width + 2 * pad)
                canvas[:, top : top + support, left : left + support] = atom
                columns.append(canvas[:, pad : pad + height, pad : pad + width].flatten())
    return torch.stack(columns, 1)


def _steps(atoms, signal, stride, iterations, lmbda=LMBDA):
    """Return the codes (columns, N) after some steps z <- soft(z + E (h - D z), theta), and D."""
    analysis = ridge_analysis(atoms, stride)
    size = signal.shape[-2:]
    matrix, adjoint = _dense(atoms, *size, stride), _dense(analysis, *size, stride)
    theta = lmbda * analysis.norm() / atoms.norm()
    codes = matrix.new_zeros(matrix.shape[1], len(signal))
    data = signal.flatten(1).T
    for _ in range(iterations):
        reached = codes + adjoint.T @ (data - matrix @ codes)
        codes = reached.sign() * (reached.abs() - theta).clamp(min=0)
    return codes, matrix


@pytest.mark.parametrize("low_band", ["passed", "coded"])
@pytest.mark.parametrize(("stride", "iterations"), [(1, 1), (1, 3), (3, 1), (3, 2), (3, 6), (5, 4)])
def test_at_its_start_it_is_the_solver(stride, iterations, low_band):
    side = 5 * (4 if stride == 5 else 3)
    config = UnrolledConfig(iterations=iterations, stride=stride, deeper=(), low_band=low_band)
    lowpass, highpass = _bands(2, side, side)
    codes, matrix = _steps(_atoms(), highpass, stride, iterations)
    assert 0.02 < (codes != 0).double().mean() < 0.98
    expected = lowpass + (matrix @ codes).T.view_as(highpass)
    got = _network(config)(lowpass, highpass)
    # The size of a step is kept in single precision.
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("stride", "channels"), [(1, 1), (3, 1), (3, 3), (5, 1)])
def test_the_analysis_is_that_of_ridge_regression(stride, channels, monkeypatch):
    # On a circular image, where it is exact before it is cut to the atoms' support.
    side, rho = 15, 0.7
    monkeypatch.setattr("acsr_ray.sparse.unrolled.RIDGE_SIDE", side)
    atoms = _atoms(3, channels, seed=4)
    columns = []
    for atom in atoms:
        canvas = F.pad(atom, (0, side - 5, 0, side - 5))
        for top in range(0, side, stride):
            for left in range(0, side, stride):
                columns.append(canvas.roll((top, left), (1, 2)).flatten())
    matrix = torch.stack(columns, 1)
    gram = matrix @ matrix.T + rho * torch.eye(len(matrix), dtype=torch.float64)
    exact = torch.linalg.solve(gram, matrix)
    first = exact[:, :: (side // stride) ** 2].T.view(3, channels, side, side)
    torch.testing.assert_close(ridge_analysis(atoms, stride, rho), first[..., :5, :5])


def test_a_few_steps_describe_an_image_that_its_atoms_can():
    atoms, (lowpass, highpass) = _atoms(40, seed=2), _bands(2, 15, 15)
    left = []
    for iterations in (1, 2, 4):
        network = _network(UnrolledConfig(iterations=iterations, stride=3, deeper=()), atoms, lmbda=1e-9)
        left.append(((network(lowpass, highpass) - lowpass - highpass).norm() / highpass.norm()).item())
    assert left[0] > left[1] > left[2]
    # The textbook step of 1 / L is far behind.
    matrix = _dense(atoms, 15, 15, 3)
    data, codes = highpass.flatten(1).T, torch.zeros(matrix.shape[1], 2, dtype=torch.float64)
    for _ in range(4):
        codes = codes + matrix.T @ (data - matrix @ codes) / _largest_eigenvalue(atoms)
    assert left[2] < 0.7 * ((matrix @ codes - data).norm() / data.norm()).item()


def _largest_eigenvalue(atoms):
    return torch.linalg.matrix_norm(_dense(atoms, 15, 15, 3), 2).item() ** 2


@pytest.mark.parametrize("deeper", [(), (6, 4)])
def test_at_its_start_the_low_band_passes_even_where_it_is_coded(deeper):
    lowpass, highpass = _bands(2, 13, 17)
    shape = {"stride": 3, "deeper": deeper}
    passed, coded = (_network(UnrolledConfig(low_band=low_band, **shape)) for low_band in ("passed", "coded"))
    torch.testing.assert_close(coded(lowpass, highpass), passed(lowpass, highpass))
    shift = 0.2 * _random(*lowpass.shape, seed=9)
    got = coded(lowpass + shift, highpass) - coded(lowpass, highpass)
    torch.testing.assert_close(got, shift)


def test_a_coded_low_band_can_be_repaired(moved):
    lowpass, highpass = _bands()
    for low_band, repaired in (("passed", False), ("coded", True)):
        network = moved(_network(UnrolledConfig(stride=3, deeper=(6,), low_band=low_band)), 1)
        shift = 0.2 * _random(*lowpass.shape, seed=9)
        got = network(lowpass + shift, highpass) - network(lowpass, highpass)
        assert ((got - shift).abs().max() > 1e-3) == repaired


def test_spread_atoms_is_the_greedy_choice():
    clusters = _random(3, 4, 2, 3, 3, seed=5)
    flat = clusters.flatten(0, 1).flatten(1)
    residual, chosen = flat.clone(), []
    for _ in range(7):
        best = int(residual.norm(dim=1).argmax())
        chosen.append(best)
        direction = residual[best] / residual[best].norm()
        residual = residual - (residual @ direction)[:, None] * direction
    assert torch.equal(spread_atoms(clusters, 7).flatten(1), flat[chosen])


def test_spread_atoms_of_all_is_a_permutation():
    clusters = _random(2, 5, 3, 4, 4, seed=6).float()
    rows = [row.tolist() for row in spread_atoms(clusters, 10).flatten(1)]
    assert sorted(rows) == sorted(row.tolist() for row in clusters.flatten(0, 1).flatten(1))
    assert spread_atoms(clusters, 3).dtype == torch.float32


def test_spread_atoms_leave_out_near_copies():
    # Ten clusters that have learnt nearly the same four atoms, and one that has others.
    common = _atoms(4, seed=7)
    copies = torch.stack([project_atoms(common + 0.02 * _random(4, 3, 5, 5, seed=n)) for n in range(10)])
    clusters = torch.cat([copies, _atoms(4, seed=8)[None]])
    chosen = _largest_eigenvalue(spread_atoms(clusters, 8))
    drawn = []
    for seed in range(5):
        order = torch.randperm(44, generator=torch.Generator().manual_seed(seed))[:8]
        drawn.append(_largest_eigenvalue(clusters.flatten(0, 1)[order]))
    assert chosen < 0.9 * min(drawn)


def test_more_atoms_than_there_are():
    with pytest.raises(ValueError, match="9 atoms cannot be chosen from 8"):
        spread_atoms(torch.zeros(2, 4, 3, 5, 5), 9)


@pytest.mark.parametrize(
    ("iterations", "stride", "deeper", "grid"), [(1, 3, (), 3), (2, 1, (3,), 2), (1, 3, (3, 3), 12)]
)
def test_nothing_reaches_beyond_reach(iterations, stride, deeper, grid, moved):
    config = UnrolledConfig(iterations=iterations, stride=stride, deeper=deeper)
    reach = config.reach(5)
    assert config.grid == grid
    assert reach % grid == 0
    # Hardly a threshold, so that no zero hides a path.
    network = moved(_network(config, lmbda=1e-9), 2)
    side = 2 * reach + 2 * grid
    middle, extent = side // 2, 0
    lowpass, highpass = (band.requires_grad_() for band in _bands(1, side, side))
    # The level is of the whole image, so it is held.
    purified = network(lowpass, highpass, level=torch.zeros(1, dtype=torch.float64))
    for row, column in ((middle, middle), (middle + grid - 1, middle - grid // 2)):
        gradients = torch.autograd.grad(purified[0, 0, row, column], (lowpass, highpass), retain_graph=True)
        for gradient in gradients:
            _, _, rows, columns = gradient.nonzero(as_tuple=True)
            extent = max(extent, *((rows - row).abs().max(), (columns - column).abs().max()))
    assert 0.3 * reach < extent <= reach


NETWORKS = {
    (stride, deeper): _network(UnrolledConfig(iterations=2, stride=stride, deeper=deeper), _atoms().float())
    for stride, deeper in ((1, ()), (3, ()), (3, (4,)), (1, (4, 4)), (5, (4,)))
}


@settings(deadline=None, max_examples=40)
@given(
    shape=st.sampled_from(sorted(NETWORKS)),
    count=st.integers(1, 3),
    height=st.integers(1, 26),
    width=st.integers(1, 26),
)
def test_any_size_is_kept(shape, count, height, width):
    with torch.no_grad():
        purified = NETWORKS[shape](*_bands(count, height, width))
    assert purified.shape == (count, 3, height, width)
    assert torch.isfinite(purified).all()


@pytest.mark.parametrize("size", [(11, 12), (7, 1), (17, 13)])
def test_an_image_goes_on_as_its_last_row_and_column(size, moved):
    network = moved(_network(UnrolledConfig(iterations=2, stride=3, deeper=(4,))), 3)
    lowpass, highpass = _bands(2, *size)
    height, width = size
    rows = torch.arange(-(-height // 6) * 6).clamp(max=height - 1)
    columns = torch.arange(-(-width // 6) * 6).clamp(max=width - 1)
    level = noise_level(highpass)
    continued = [band[..., rows[:, None], columns] for band in (lowpass, highpass)]
    expected = network(*continued, level=level)[..., :height, :width]
    torch.testing.assert_close(network(lowpass, highpass), expected, rtol=0, atol=1e-12)


def test_the_noise_level_is_measured_when_it_is_not_given(moved):
    network = moved(_network(UnrolledConfig(stride=3, deeper=(4,))), 4)
    lowpass, highpass = _bands()
    given_level = network(lowpass, highpass, level=noise_level(highpass))
    assert torch.equal(network(lowpass, highpass), given_level)


@pytest.mark.parametrize("low_band", ["passed", "coded"])
def test_mid_grey_is_kept_by_any_weights(low_band, moved):
    network = moved(_network(UnrolledConfig(stride=3, deeper=(4,), low_band=low_band)), 12)
    grey = torch.full((1, 3, 13, 8), 0.5, dtype=torch.float64)
    assert torch.equal(network(grey, 0 * grey), grey)


def _shared(sharing, clusters=3):
    """Return settings and atoms of clusters with something of their own."""
    config = UnrolledConfig(iterations=2, stride=3, deeper=(4,), sharing=sharing)
    sets = clusters if sharing == "filters" else 1
    return config, torch.stack([_atoms(seed=20 + number) for number in range(sets)])


def _of_cluster(network, cluster):
    """Return the network of one cluster alone, its weights copied out of a network of several."""
    config = network.config.model_copy(update={"sharing": "global"})
    own, weights = cluster if network.config.sharing == "filters" else 0, {}
    for name, tensor in network.state_dict().items():
        if not name.startswith(f"members.{own}."):
            continue
        mine = network.config.sharing == "thresholds" and ("thresholds" in name or "noise_slopes" in name)
        kept = tensor[cluster : cluster + 1] if mine else tensor
        weights[f"members.0.{name.split('.', 2)[2]}"] = kept
    alone = _network(config)
    alone.load_state_dict(weights)
    return alone


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("sharing", ["thresholds", "filters"])
def test_a_row_is_computed_by_its_own_cluster(sharing, training, moved):
    config, atoms = _shared(sharing)
    network = moved(_network(config, atoms, 3), 5).train(training)
    lowpass, highpass = _bands(6)
    # Cluster 1 has no row, as happens to most clusters in most batches.
    cluster = torch.tensor([2, 0, 2, 0, 0, 2])
    got = network(lowpass, highpass, cluster)
    alone = {number: _of_cluster(network, number) for number in (0, 2)}
    for row, number in enumerate(cluster.tolist()):
        rows = slice(row, row + 1)
        expected = alone[number](lowpass[rows], highpass[rows])
        torch.testing.assert_close(got[rows], expected, rtol=0, atol=1e-12)
        other = alone[2 - number](lowpass[rows], highpass[rows])
        assert (got[rows] - other).abs().max() > 1e-4


@pytest.mark.parametrize("sharing", ["thresholds", "filters"])
def test_a_cluster_is_needed_where_clusters_differ(sharing):
    config, atoms = _shared(sharing)
    with pytest.raises(ValueError, match=f"{sharing} of their own: cluster is needed"):
        _network(config, atoms, 3)(*_bands())


def test_a_cluster_changes_nothing_where_all_is_shared(moved):
    network = moved(_network(UnrolledConfig(stride=3, deeper=(4,)), clusters=3), 5)
    lowpass, highpass = _bands(3)
    assert torch.equal(network(lowpass, highpass, torch.tensor([0, 1, 2])), network(lowpass, highpass))


def _thresholds(network, factor):
    for name, parameter in network.named_parameters():
        if "thresholds" in name:
            parameter.data *= factor
    return network


@pytest.mark.parametrize("low_band", ["passed", "coded"])
def test_the_higher_the_thresholds_the_less_is_added_to_the_low_band(low_band):
    lowpass, highpass = _bands()
    distance = []
    for factor in (0.5, 1.0, 1.5, 1e6):
        network = _thresholds(_network(UnrolledConfig(stride=3, deeper=(4,), low_band=low_band)), factor)
        distance.append((network(lowpass, highpass) - lowpass).norm().item())
    assert distance[0] > distance[1] > distance[2] > distance[3] == 0


def _with_slopes(config, slope, **more):
    network = _network(config, **more)
    for name, parameter in network.named_parameters():
        if "noise_slopes" in name:
            parameter.data.fill_(slope)
    return network


def test_noise_raises_the_thresholds_and_its_absence_does_not():
    config = UnrolledConfig(stride=3, deeper=(4,))
    lowpass, highpass = _bands(2)
    plain, adaptive = _with_slopes(config, 0.0), _with_slopes(config, 0.4)
    silent = torch.zeros(2, dtype=torch.float64)
    without = plain(lowpass, highpass)
    assert torch.equal(adaptive(lowpass, highpass, level=silent), without)
    # Slopes are per hundredth of noise: at 0.02, thresholds are 1 + 0.4 * 2 times as high.
    noisy = adaptive(lowpass, highpass, level=silent + 0.02)
    stronger = _thresholds(_with_slopes(config, 0.0), 1.8)(lowpass, highpass)
    torch.testing.assert_close(noisy, stronger, rtol=0, atol=1e-12)
    mixed = adaptive(lowpass, highpass, level=torch.tensor([0, 0.02], dtype=torch.float64))
    torch.testing.assert_close(mixed, torch.stack([without[0], noisy[1]]), rtol=0, atol=1e-12)


def test_an_image_without_fine_detail_counts_as_free_of_noise():
    config = UnrolledConfig(stride=3, deeper=())
    lowpass, highpass = _bands(2)
    blocks = highpass[..., ::2, ::2].repeat_interleave(2, -1).repeat_interleave(2, -2)
    assert torch.equal(_with_slopes(config, 5.0)(lowpass, blocks), _with_slopes(config, 0.0)(lowpass, blocks))
    changed = _with_slopes(config, 5.0)(lowpass, highpass) - _with_slopes(config, 0.0)(lowpass, highpass)
    assert changed.abs().max() > 0.01


def test_without_noise_adaptivity_the_level_is_ignored(moved):
    network = moved(_network(UnrolledConfig(stride=3, deeper=(4,), noise_adaptive=False)), 7)
    assert not [name for name, _ in network.named_parameters() if "noise" in name]
    lowpass, highpass = _bands()
    level = torch.full((2,), 0.5, dtype=torch.float64)
    assert torch.equal(network(lowpass, highpass, level=level), network(lowpass, highpass))


@pytest.mark.parametrize("low_band", ["passed", "coded"])
def test_gradient_with_respect_to_the_image_is_right(low_band, moved):
    config = UnrolledConfig(iterations=2, stride=1, deeper=(2,), low_band=low_band)
    network = moved(_network(config, _atoms(2, support=3)), 8).requires_grad_(False)
    lowpass, highpass = (band.requires_grad_() for band in _bands(2, 5, 4))
    coded = (network(lowpass, highpass) - lowpass).abs().max()
    assert coded > 0.01
    assert torch.autograd.gradcheck(network, (lowpass, highpass))


@pytest.mark.parametrize("sharing", ["global", "thresholds", "filters"])
def test_gradient_with_respect_to_the_weights_is_right(sharing, moved):
    config, atoms = _shared(sharing)
    network = moved(_network(config, atoms, 3), 9)
    bands, cluster = _bands(3), torch.tensor([1, 0, 1])
    weights = _random(*bands[0].shape, seed=10)

    def value():
        return (network(*bands, cluster) * weights).sum()

    parameters = dict(network.named_parameters())
    gradients = torch.autograd.grad(value(), list(parameters.values()), materialize_grads=True)
    for number, (name, gradient) in enumerate(zip(parameters, gradients, strict=True)):
        direction = _random(*gradient.shape, seed=30 + number)
        sides = []
        for step in (1e-6, -1e-6):
            parameters[name].data += step * direction
            sides.append(value().item())
            parameters[name].data -= step * direction
        slope = (sides[0] - sides[1]) / 2e-6
        assert (gradient * direction).sum().item() == pytest.approx(slope, rel=1e-4, abs=1e-7), name


@pytest.mark.parametrize("sharing", ["global", "thresholds", "filters"])
@pytest.mark.parametrize("low_band", ["passed", "coded"])
@pytest.mark.parametrize("deeper", [(), (4,), (4, 3)])
@pytest.mark.parametrize("iterations", [1, 3])
@pytest.mark.parametrize("noise_adaptive", [False, True])
def test_training_gives_every_parameter_a_gradient(
    sharing, low_band, deeper, iterations, noise_adaptive, moved
):
    """Distributed training waits for all of them, also for those of clusters that a batch has not met."""
    config = UnrolledConfig(
        iterations=iterations,
        stride=3,
        deeper=deeper,
        low_band=low_band,
        noise_adaptive=noise_adaptive,
        sharing=sharing,
    )
    _, atoms = _shared(sharing)
    # Low thresholds, so that no layer is silent.
    network = moved(_network(config, atoms, 3, lmbda=1e-3), 12).train()
    network(*_bands(2), torch.tensor([2, 0])).square().sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.any() != name.startswith("members.1."), name


def test_the_generator_decides_the_start():
    config = UnrolledConfig(stride=3, deeper=(4, 4))
    one, same, other = (_network(config, seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["members.0.analysis.1.0"], other["members.0.analysis.1.0"])
    assert torch.equal(one["members.0.analysis.0.0"], other["members.0.analysis.0.0"])


@pytest.mark.parametrize("sharing", ["global", "thresholds", "filters"])
def test_weights_make_the_network_again(sharing, moved):
    config, atoms = _shared(sharing)
    network = moved(_network(config, atoms, 3), 11).float()
    # Another lmbda and other atoms would give other steps; the weights bring their own.
    again = UnrolledCsc.from_weights(network.state_dict(), config, 3)
    bands, cluster = [band.float() for band in _bands(3)], torch.tensor([1, 0, 2])
    assert torch.equal(again(*bands, cluster), network(*bands, cluster))
    assert again.support == network.support == 5


def test_weights_are_loaded_without_an_analysis_of_their_own(monkeypatch):
    """Filters of many clusters would take seconds, in every process that purifies."""
    config, atoms = _shared("filters")
    network = _network(config, atoms, 3).float()
    # An image of no pixel cannot be analysed.
    monkeypatch.setattr("acsr_ray.sparse.unrolled.RIDGE_SIDE", 0)
    with pytest.raises(RuntimeError):
        _network(config, atoms, 3)
    again = UnrolledCsc.from_weights(network.state_dict(), config, 3).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in network.state_dict().items())


def test_the_analysis_can_be_given():
    config, atoms = _shared("filters")
    analysis = torch.stack([_random(*own.shape, seed=30 + number) for number, own in enumerate(atoms)])
    members = UnrolledCsc(atoms, config, 3, analysis=analysis).members
    for member, filters in zip(members, analysis, strict=True):
        weights = member.state_dict()
        # The high band's half, in units of the step.
        found = weights["step"] * weights["analysis.0.0"][:, :3]
        torch.testing.assert_close(found, filters, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "clusters"),
    [
        ({"iterations": 1}, 3),
        ({"iterations": 3}, 3),
        ({"deeper": (5,)}, 3),
        ({"deeper": ()}, 3),
        ({"low_band": "passed"}, 3),
        ({"noise_adaptive": False}, 3),
        ({"sharing": "global"}, 3),
        ({"sharing": "filters"}, 3),
        ({"stride": 2}, 3),
        ({"stride": 7}, 3),
        ({}, 2),
    ],
)
def test_weights_of_another_network_are_refused(change, clusters):
    config, atoms = _shared("thresholds")
    weights = _network(config, atoms, 3).state_dict()
    with pytest.raises((KeyError, RuntimeError, ValueError)):
        UnrolledCsc.from_weights(weights, config.model_copy(update=change), clusters)


def test_weights_without_filters_are_refused():
    with pytest.raises(KeyError):
        UnrolledCsc.from_weights({}, UnrolledConfig(), 1)


@pytest.mark.parametrize(
    ("shape", "change", "message"),
    [
        ((4, 3, 5, 5), {}, "atoms must be"),
        ((2, 4, 3, 5, 5), {}, "atoms must be"),
        ((1, 4, 3, 5, 5), {"sharing": "filters"}, "atoms must be"),
        ((1, 4, 1, 5, 5), {}, "atoms must be"),
        ((1, 4, 3, 5, 5), {"stride": 2}, "stride 2 does not fit atoms of 5"),
        ((1, 4, 3, 5, 5), {"stride": 7}, "stride 7 does not fit atoms of 5"),
    ],
)
def test_atoms_that_do_not_fit_the_config(shape, change, message):
    with pytest.raises(ValueError, match=message):
        UnrolledCsc(torch.ones(shape), UnrolledConfig(**{"stride": 3, **change}), clusters=3)


def test_deeper_layers_explain_nothing_at_first():
    lowpass, highpass = _bands()
    plain = _network(UnrolledConfig(stride=3, deeper=()))(lowpass, highpass)
    layered = _network(UnrolledConfig(stride=3, deeper=(6, 4)))(lowpass, highpass)
    torch.testing.assert_close(layered[..., 3:-3, 3:-3], plain[..., 3:-3, 3:-3])
