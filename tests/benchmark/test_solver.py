"""What the benchmark of the solver calls equal: both sides near the same optimum, and the work it counts."""

import pytest

from acsr_ray.benchmark.peer_sporco import new_sporco
from acsr_ray.benchmark.pictures import high_bands
from acsr_ray.benchmark.solver import (
    GAP,
    benchmark_solver,
    count_work,
    fit_ours,
    fit_sporco,
    make_problem,
    sporco_objective,
)
from acsr_ray.purification.bundle import load_bundle
from acsr_ray.sparse.cbpdn import Cbpdn, CbpdnConfig


@pytest.fixture(scope="module")
def problem():
    return make_problem(load_bundle("cifar10-small").atoms[0], high_bands(2, 24))


def test_the_optimum_is_that_of_a_thousand_iterations(problem):
    config = CbpdnConfig(solver="admm", iterations=1000, rho=4.0)
    objective = Cbpdn(problem.atoms.double(), config).code(problem.images.double()).objective.mean().item()
    assert problem.enough / (1 + GAP) == pytest.approx(objective, rel=1e-4)


def test_ours_stops_as_soon_as_it_is_good_enough(problem):
    config, gap = fit_ours(problem, "cpu")
    assert 0 <= gap <= GAP
    fewer = config.model_copy(update={"rounds": config.rounds - 1})
    assert Cbpdn(problem.atoms, fewer).code(problem.images).objective.mean() > problem.enough


def test_sporco_stops_as_soon_as_it_is_good_enough(problem):
    pytest.importorskip("sporco")
    iterations, rho = fit_sporco(problem, "cpu")
    objectives = []
    for steps in (iterations, iterations - 4):
        solver = new_sporco(problem.atoms, problem.images, problem.lmbda, steps, rho)
        solver.solve()
        objectives.append(sporco_objective(solver, problem))
    assert objectives[0] <= problem.enough < objectives[1]


def test_sporcos_objective_is_ours_at_the_same_iterations(problem):
    pytest.importorskip("sporco")
    solver = new_sporco(problem.atoms, problem.images, problem.lmbda, 30, 4.0)
    solver.solve()
    config = CbpdnConfig(lmbda=problem.lmbda, solver="admm", iterations=30, rho=4.0)
    ours = Cbpdn(problem.atoms, config).code(problem.images).objective.mean().item()
    assert sporco_objective(solver, problem) == pytest.approx(ours, rel=1e-4)


def test_more_rounds_are_more_work(problem):
    few, many = (count_work(problem, CbpdnConfig(rounds=rounds), "cpu") for rounds in (2, 6))
    # The first search alone is a product of every patch with all atoms.
    assert few[0] > 2 * 24 * 24 * 64 * 192
    assert many[0] > 1.3 * few[0]
    assert many[1] > few[1]
    once, twice = (count_work(problem, CbpdnConfig(iterations=k), "cuda") for k in (10, 20))
    assert twice == (2 * once[0], 2 * once[1])


def test_a_row_of_a_size():
    atoms = load_bundle("cifar10-small").atoms[0]
    row = benchmark_solver(atoms, 96, shard=None, device="cpu", peer="none", cores=1, repeats=1)
    assert (row.part, row.side, row.images, row.ratio) == ("solver", 96, 3, None)
    assert row.seconds > 0
    assert row.flop > 2 * 96 * 96 * 64 * 192
