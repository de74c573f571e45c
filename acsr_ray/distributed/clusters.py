"""Clusters of every class by Ray tasks, one per class and number of clusters."""

import logging
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray

from acsr_ray.clustering.elbow import (
    ClassClusters,
    ElbowConfig,
    Split,
    choose_clusters,
    largest_k,
    split_class,
)
from acsr_ray.clustering.kmeans import resolve_backend

logger = logging.getLogger(__name__)


def cluster_classes(
    latents: NDArray[np.float32], labels: NDArray[np.int64], config: ElbowConfig, seed: int
) -> dict[int, ClassClusters]:
    """Cluster the latents (N, L) of each class by itself; a Ray session must be open.

    The tasks of a class share one copy of its latents. The largest k, which take longest, start first.
    """
    config = config.model_copy(update={"backend": backend_of(config)})
    logger.info("k-means: %s, %g GPUs a task", config.backend, config.task_gpus)
    task = ray.remote(split_class).options(
        num_cpus=config.task_cpus, num_gpus=config.task_gpus, max_retries=3
    )
    own = {label: latents[labels == label] for label in np.unique(labels).tolist()}
    shared = {label: ray.put(rows) for label, rows in own.items()}
    wanted = [(label, k) for label, rows in own.items() for k in range(1, largest_k(rows, config) + 1)]
    running: dict[tuple[int, int], ray.ObjectRef[Any]] = {
        (label, k): task.remote(shared[label], k, config, seed)
        for label, k in sorted(wanted, key=lambda entry: (-entry[1], entry[0]))
    }
    fits = {}
    for label, rows in own.items():
        splits: list[Split] = ray.get([running[entry] for entry in wanted if entry[0] == label])
        fits[label] = choose_clusters(rows, splits, config)
        share = [round(value / fits[label].wcss[0], 3) for value in fits[label].wcss]
        logger.info("class %d: %d clusters, WCSS %s", label, fits[label].num_clusters, share)
    return fits


def backend_of(config: ElbowConfig) -> str:
    """Return the backend that `auto` stands for: cuML needs a GPU share, which is asked for."""
    if config.backend == "auto" and not config.task_gpus:
        return "sklearn"
    return resolve_backend(config.backend)
