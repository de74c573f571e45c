"""The sporco backend of `learn_dictionary`: the only module that imports sporco, and CuPy through it.

Online dictionary learning by projected gradient steps: a mini-batch is sparse-coded with the current
dictionary, then the atoms take one step of size a / (b + t) at update t = 0, 1, ... Source: Liu,
Garcia-Cardona, Wohlberg and Yin 2018, the first-order method. sporco's arrays are images (H, W, C, N), atoms
(h, w, C, 1, M) and maps (H, W, 1, N, M): a multichannel dictionary shares one map among the channels.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from types import ModuleType
from typing import Any

import torch
from sporco import fft, linalg
from sporco.dictlrn import onlinecdl
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from acsr_ray.sparse.cdl import CdlConfig, CdlResult, mini_batches
from acsr_ray.sparse.prox import project_atoms

ETA_A, ETA_B = 50.0, 5.0
"""Step in units of an atom's curvature, see `_learner`; b is sporco's default.

Measured with 64 atoms, lmbda 0.1 and 3 passes, as the objective of held-out images: on 200 CIFAR images 3.93
(our own learner 3.94, starting patches 4.23), where the plain 10 / (20 + t) of earlier trials gave 4.05;
on 48 crops of 64 x 64 10.1 (10.6). The best a of those tried was 54, 54 and 32 for sides of 16, 32 and 64.
"""
BLANK = 1e-12
"""Energy below which images count as blank; the step stays finite."""


@dataclass(frozen=True)
class _Half:
    """sporco's modules for one kind of device, and how they take a tensor without a copy."""

    onlinecdl: ModuleType
    fft: ModuleType
    linalg: ModuleType
    convert: Callable[[Tensor], Any]


@torch.no_grad()
def learn_with_sporco(
    highpass: Tensor, start: Tensor, config: CdlConfig, generator: torch.Generator
) -> CdlResult:
    """Learn a dictionary with sporco, on the device and in the dtype of the images.

    Args:
        highpass: (N, C, H, W), as checked by `learn_dictionary`.
        start: (M, C, h, w) feasible atoms.
        config: settings; update_steps and forgetting have no counterpart here.
        generator: of the order of the images, as in our own learner.

    Raises:
        ValueError: fewer than two atoms; sporco takes the channels of a single one for atoms.
        ImportError: images on a GPU, but no CuPy that can use it.
    """
    if config.num_atoms < 2:
        raise ValueError(f"num_atoms must be >= 2 with sporco, got {config.num_atoms}")
    objective = []
    with _sporco_on(highpass.device) as half:
        learner = _learner(half, start, highpass, config)
        for rows in chain.from_iterable(
            mini_batches(len(highpass), config, generator) for _ in range(config.epochs)
        ):
            batch = highpass[rows.to(highpass.device)]
            if learner.cri is not None and len(batch) != learner.cri.K:
                # Its arrays have the shape of the first batch; without this it fails on a smaller last one.
                learner.cri = None
            learner.solve(half.convert(_last_first(batch)))
            objective.append(_objective(half, learner) / len(batch))
        atoms = from_dlpack(learner.getdict().squeeze(3)).permute(3, 2, 0, 1)
        return CdlResult(project_atoms(atoms.contiguous()), tuple(objective))


@contextmanager
def _sporco_on(device: torch.device) -> Iterator[_Half]:
    """Yield the half of sporco that computes on a device, set up for the duration of the context."""
    if device.type == "cuda":
        from sporco import cupy

        # Otherwise that package silently computes with numpy.
        if not cupy.cupy_enabled():
            raise ImportError("backend sporco needs CuPy for images on a GPU: install acsr-ray[gpu]")
        from sporco.cupy.dictlrn import onlinecdl as onlinecdl_gpu

        with cupy.cp.cuda.Device(device.index):
            yield _Half(onlinecdl_gpu, cupy.fft, cupy.linalg, cupy.cp.from_dlpack)
        return
    before = fft.pyfftw_threads, fft.pyfftw_planner_effort
    # sporco plans for every core and by timing: that crowds other tasks, and the plan shows in the result.
    fft.pyfftw_threads, fft.pyfftw_planner_effort = torch.get_num_threads(), "FFTW_ESTIMATE"
    try:
        yield _Half(onlinecdl, fft, linalg, Tensor.numpy)
    finally:
        fft.pyfftw_threads, fft.pyfftw_planner_effort = before


def _learner(half: _Half, start: Tensor, highpass: Tensor, config: CdlConfig) -> Any:  # noqa: ANN401
    """Return sporco's online learner with the settings of our own sparse coding."""
    # The gradient is summed over the batch, and an atom's curvature is the energy of its maps, about its
    # share of the images': in this unit a step means the same for any size, contrast, batch and dictionary.
    energy = min(config.batch_size, len(highpass)) * highpass.square().sum((1, 2, 3)).mean().item()
    options = half.onlinecdl.OnlineConvBPDNDictLearn.Options(
        {
            "Verbose": False,
            "ZeroMean": True,
            "eta_a": ETA_A * config.num_atoms / max(energy, BLANK),
            "eta_b": ETA_B,
            "CBPDN": {
                "rho": config.code.penalty,
                "RelaxParam": config.code.relaxation,
                "MaxMainIter": config.code.iterations,
                "AutoRho": {"Enabled": False},
                # No statistics: they cost a quarter of the time, and on a GPU a wait in every iteration.
                "FastSolve": True,
            },
        }
    )
    atoms = half.convert(_last_first(start))
    return half.onlinecdl.OnlineConvBPDNDictLearn(atoms, config.code.lmbda, options, dimK=1)


def _objective(half: _Half, learner: Any) -> float:  # noqa: ANN401
    """Return the functional, summed over the latest batch, at its sparse maps and the atoms that coded it."""
    sizes = learner.cri
    residual_f = half.linalg.inner(learner.Zf, learner.Df, axis=sizes.axisM) - learner.Sf
    fidelity = 0.5 * half.fft.rfl2norm2(residual_f, sizes.shpS, axis=sizes.axisN)
    return float(fidelity + learner.lmbda * abs(learner.Z).sum())


def _last_first(array: Tensor) -> Tensor:
    """Return (N, C, H, W) as (H, W, C, N), contiguous."""
    return array.permute(2, 3, 1, 0).contiguous()
