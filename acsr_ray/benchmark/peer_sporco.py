"""sporco as the benchmark's peer: the only module here that imports it, and CuPy."""

import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from acsr_ray.benchmark.timing import Side
from acsr_ray.config import MissingExtraError


def sporco_side(
    atoms: Tensor, images: Tensor, lmbda: float, iterations: int, rho: float | None, threads: int
) -> Side:
    """Return a side that codes a batch with sporco from the start and counts `solve` alone."""

    def run() -> float:
        if images.device.type == "cpu":
            from sporco import fft

            fft.pyfftw_threads = threads
        solver = new_sporco(atoms, images, lmbda, iterations, rho)
        started = time.perf_counter()
        solver.solve()
        if images.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    return run


def new_sporco(atoms: Tensor, images: Tensor, lmbda: float, iterations: int, rho: float | None) -> Any:  # noqa: ANN401
    """Return sporco's solver of a batch (N, C, H, W), not yet started; `rho` None is adaptive.

    Raises:
        MissingExtraError: it, or for images on a GPU CuPy, is not installed.
    """
    try:
        if images.device.type == "cuda":
            import cupy
            from sporco.cupy.admm import cbpdn

            convert = cupy.from_dlpack
        else:
            from sporco.admm import cbpdn

            convert = Tensor.numpy
    except ImportError as error:
        raise MissingExtraError(f"the peer needs acsr-ray[sporco] (and [gpu]): {error}") from error
    options: Mapping[str, Any] = {
        "Verbose": False,
        "MaxMainIter": iterations,
        "RelStopTol": 0.0,
        "AutoRho": {"Enabled": rho is None},
        # No statistics, which would cost a tenth of the time; adaptive rho lives on them.
        "FastSolve": rho is not None,
        **({} if rho is None else {"rho": rho}),
    }
    last = [convert(part.permute(2, 3, 1, 0).contiguous()) for part in (atoms.to(images.device), images)]
    return cbpdn.ConvBPDN(last[0], last[1], lmbda, cbpdn.ConvBPDN.Options(dict(options)), dimK=1)


def sporco_maps(solver: Any) -> Tensor:  # noqa: ANN401
    """Return its sparse maps, (H, W, N, M) or with single sizes left out, on the CPU."""
    array = solver.getcoef()
    return torch.from_numpy(np.asarray(array.get() if hasattr(array, "get") else array)).squeeze()
