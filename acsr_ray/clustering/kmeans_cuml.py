"""The GPU backend of `fit_kmeans`: the only module that imports cuML and CuPy."""

from typing import Any

import cupy
import numpy as np
from cuml.cluster import KMeans
from numpy.typing import NDArray
from torch import Tensor


def fit_cuml(
    latents: NDArray[Any] | Tensor, options: dict[str, Any]
) -> tuple[NDArray[Any], NDArray[Any], float]:
    """Return centroids (K, L), cluster ids (N,) and WCSS of cuML's k-means.

    A tensor on a GPU is shared by DLPack, anything else copied there.
    """
    if isinstance(latents, Tensor) and latents.is_cuda:
        on_gpu = cupy.from_dlpack(latents.detach().float().contiguous())
    else:
        on_gpu = cupy.asarray(np.ascontiguousarray(latents, np.float32))
    if not isinstance(options["init"], str):
        options = {**options, "init": cupy.asarray(options["init"], cupy.float32)}
    model = KMeans(**options, output_type="cupy").fit(on_gpu)
    return (
        cupy.asnumpy(model.cluster_centers_),
        cupy.asnumpy(model.labels_),
        float(model.inertia_),
    )
