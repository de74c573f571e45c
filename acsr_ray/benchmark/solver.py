"""CBPDN beside sporco, both stopped as soon as their mean objective is within 1 % of the optimum.

The optimum is what coordinate descent reaches at a violation of 1e-3 lmbda in float64, which is below what
1,000 iterations of ADMM reach. sporco runs with its own adaptive rho and with the fixed one of our ADMM,
and of its time only `solve` counts. Either side runs as one batch on all cores and as one process per core;
the faster counts.
"""

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from acsr_ray.benchmark.peer_sporco import new_sporco, sporco_maps, sporco_side
from acsr_ray.benchmark.pictures import high_bands
from acsr_ray.benchmark.report import Row
from acsr_ray.benchmark.timing import Side, alternate, in_processes, timed
from acsr_ray.config import ConfigError
from acsr_ray.sparse.cbpdn import Cbpdn, CbpdnConfig
from acsr_ray.sparse.descent import PatchDictionary, Work, descend

GAP = 0.01
BATCH = {32: 32, 64: 16, 128: 8, 224: 4}
"""Images per run by side; others have as many pixels as at 32."""
GPU_BATCH_PIXELS = 4096 * 32 * 32
PEER_STEP = 2
"""Iterations of sporco between two looks at its objective."""


@dataclass(frozen=True)
class Problem:
    """Images to code and how good is good enough."""

    atoms: Tensor
    images: Tensor
    lmbda: float
    enough: float
    """Mean objective."""


def benchmark_solver(
    atoms: Tensor, side: int, *, shard: str | None, device: str, peer: str, cores: int, repeats: int
) -> Row:
    """Return the row of one size.

    Args:
        atoms: (M, C, h, w).
        side: of the images.
        shard: whose images; scikit-learn's photos when omitted.
        device: `cpu` or `cuda`.
        peer: `sporco` or `none`.
        cores: processes of the peer, and threads of ours.
        repeats: timed runs of each side.

    Raises:
        ConfigError: the peer does not come near the optimum.
        MissingExtraError: the peer is not installed.
    """
    count = BATCH.get(side, max(2, 32 * 32 * 32 // side**2))
    # The optimum is found on a CPU, so of as few images on a GPU too, which codes more of them.
    problem = make_problem(atoms, high_bands(count, side, shard=shard))
    config, gap = fit_ours(problem, device)
    images = problem.images
    if device == "cuda":
        count = max(4, GPU_BATCH_PIXELS // side**2)
        images = high_bands(count, side, shard=shard).to(device)
    solver = Cbpdn(atoms.to(device), config)
    with ExitStack() as stack, torch.inference_mode():
        sides: dict[str, Side] = {"ours": timed(lambda: solver.reconstruct(images), device)}
        if device == "cpu" and cores > 1:
            own = [(atoms, part, config) for part in images.chunk(cores)]
            sides["ours, processes"] = stack.enter_context(in_processes(our_side, own))
        if peer == "sporco":
            iterations, rho = fit_sporco(problem, device)
            name = f"sporco, {'adaptive' if rho is None else f'rho {rho:g}'}, {iterations} iterations"
            sides[f"{name}, batch"] = sporco_side(atoms, images, problem.lmbda, iterations, rho, cores)
            if device == "cpu":
                parts = [(atoms, part, problem.lmbda, iterations, rho, 1) for part in images.chunk(cores)]
                sides[f"{name}, {cores} processes"] = stack.enter_context(in_processes(sporco_side, parts))
        seconds = alternate(sides, repeats)
    ours = min(seconds.pop(name) for name in list(seconds) if name.startswith("ours")) / count
    fastest = min(seconds, key=lambda name: seconds[name], default="")
    flop, moved = count_work(problem, config, device)
    stopped = f"{config.rounds} rounds" if device == "cpu" else f"{config.iterations} iterations"
    return Row(
        part="solver",
        what=f"CBPDN, {'descent' if device == 'cpu' else 'ADMM'}, {stopped}",
        side=side,
        images=count,
        seconds=ours,
        peer=fastest,
        peer_seconds=seconds[fastest] / count if fastest else None,
        flop=flop,
        bytes=moved,
        note=f"{100 * gap:.2f} % above the optimum",
    )


def our_side(atoms: Tensor, images: Tensor, config: CbpdnConfig) -> Side:
    """Return a side that codes a batch on one core."""
    solver = Cbpdn(atoms, config)

    @torch.inference_mode()
    def work() -> None:
        solver.reconstruct(images)

    return timed(work)


def make_problem(atoms: Tensor, images: Tensor, lmbda: float = 0.1) -> Problem:
    """Find the optimum and set the limit `GAP` above it."""
    exact = CbpdnConfig(lmbda=lmbda, solver="descent", tolerance=1e-3, rounds=500)
    optimum = Cbpdn(atoms.double(), exact).code(images.double()).objective.mean().item()
    return Problem(atoms, images, lmbda, (1 + GAP) * optimum)


def fit_ours(problem: Problem, device: str) -> tuple[CbpdnConfig, float]:
    """Return the settings of fewest rounds or iterations that are good enough, and their gap."""
    images = problem.images.to(device)
    for steps in range(2, 400):
        config = CbpdnConfig(lmbda=problem.lmbda, rounds=steps, iterations=steps)
        objective = Cbpdn(problem.atoms.to(device), config).code(images).objective.double().mean().item()
        if objective <= problem.enough:
            return config, objective * (1 + GAP) / problem.enough - 1
    raise ConfigError("our own solver does not come near the optimum of these images")


def fit_sporco(problem: Problem, device: str) -> tuple[int, float | None]:
    """Return the fewest iterations that are good enough, and the rho (None: adaptive) that takes them.

    Raises:
        ConfigError: none within 500.
    """
    best: tuple[int, float | None] = (500, None)
    images = problem.images.to(device)
    for rho in (None, 50 * problem.lmbda + 1):
        solver = new_sporco(problem.atoms, images, problem.lmbda, PEER_STEP, rho)
        for steps in range(PEER_STEP, best[0], PEER_STEP):
            solver.solve()
            if sporco_objective(solver, problem) <= problem.enough:
                best = (steps, rho)
                break
    if best[0] == 500:
        raise ConfigError("sporco does not come near the optimum of these images")
    return best


def sporco_objective(solver: Any, problem: Problem) -> float:  # noqa: ANN401
    """Return the mean functional at sporco's sparse maps; what it reports itself mixes two iterates."""
    maps = sporco_maps(solver)
    count, _, height, width = problem.images.shape
    maps = maps.reshape(height, width, count, -1).permute(2, 3, 0, 1).double()
    transform = torch.fft.rfft2(problem.atoms.double(), s=(height, width))
    whole = torch.stack(
        [
            torch.fft.irfft2(
                torch.einsum("mhw,mchw->chw", torch.fft.rfft2(own), transform), s=(height, width)
            )
            for own in maps
        ]
    )
    fidelity = 0.5 * (whole - problem.images.double()).square().sum()
    return float(fidelity + problem.lmbda * maps.abs().sum()) / count


def count_work(problem: Problem, config: CbpdnConfig, device: str) -> tuple[float, float]:
    """Return FLOP and bytes per image in float32.

    Descent: a searched pixel costs a product of its patch with all atoms, and the patch and the
    correlations are written and read; a visit of an entry costs a dot product and at most one update of a
    patch. ADMM: the DFT as matrix products and as many passes over maps and spectra as `Admm` makes.
    """
    count, channels, height, width = problem.images.shape
    atoms = len(problem.atoms)
    if device == "cpu":
        dictionary, work = PatchDictionary(problem.atoms), Work()
        for image in problem.images:
            descend(
                image, dictionary, config.lmbda, tolerance=config.tolerance, rounds=config.rounds, work=work
            )
        taps = dictionary.atoms.shape[1]
        flop = 2 * work.searched * atoms * taps + 4 * work.visits * taps
        moved = 4 * (work.searched * 2 * (taps + atoms) + work.visits * 3 * taps)
        return flop / count, moved / count
    half = width // 2 + 1
    transform = 2 * atoms * (2 * half * width * height + 4 * height * height * half)
    products = 2 * 2 * height * half * atoms * 2 * channels * 2
    maps, spectra = 4 * atoms * height * width, 8 * atoms * height * half
    return config.iterations * (2 * transform + products), config.iterations * (9 * maps + 6 * spectra)
