"""Clusters of every class by Ray tasks: one reads a class's latents, others split them into k = 1, 2, ..."""

import logging
from typing import Any, Literal

import numpy as np
import ray

from acsr_ray.clustering.elbow import ClassClusters, ElbowConfig, choose_clusters, split_class
from acsr_ray.clustering.kmeans import resolve_backend
from acsr_ray.distributed.latents import Latents
from acsr_ray.distributed.runtime import check_task

logger = logging.getLogger(__name__)


def cluster_classes(latents: Latents, config: ElbowConfig, seed: int) -> dict[int, ClassClusters]:
    """Cluster the latents of each class by itself; a Ray session must be open.

    The tasks of a class share one copy of its latents, in the object store; the driver holds none. The
    largest k, which take longest, start first.

    Raises:
        ResourceError: no node can hold a task.
        ValueError: latents that are not finite.
    """
    check_task("k-means", config.task_cpus, config.task_gpus)
    config = config.model_copy(update={"backend": backend_of(config)})
    logger.info("k-means: %s, %g CPUs and %g GPUs a task", config.backend, config.task_cpus, config.task_gpus)
    labels, counts = np.unique(latents.labels, return_counts=True)
    ks = {
        label: range(1, min(config.k_max, count) + 1)
        for label, count in zip(labels.tolist(), counts.tolist(), strict=True)
    }
    placed: dict[str, Any] = {"num_cpus": config.task_cpus, "max_retries": 3}
    read: Any = ray.remote(Latents.of_class).options(**placed)
    split = ray.remote(split_class).options(**placed, num_gpus=config.task_gpus)
    choose = ray.remote(choose_clusters).options(**placed)
    shared = ray.put(latents)
    own = {label: read.remote(shared, label) for label in ks}
    splits = {
        (label, k): split.remote(own[label], k, config, seed)
        for label, k in sorted(
            ((label, k) for label in ks for k in ks[label]), key=lambda entry: (-entry[1], entry[0])
        )
    }
    chosen = {
        label: choose.remote(own[label], config, *(splits[label, k] for k in ks[label])) for label in ks
    }
    fits: dict[int, ClassClusters] = {}
    for label, fit in chosen.items():
        fits[label] = ray.get(fit)
        share = [round(value / fits[label].wcss[0], 3) for value in fits[label].wcss]
        logger.info("class %d: %d clusters, WCSS %s", label, fits[label].num_clusters, share)
    return fits


def backend_of(config: ElbowConfig) -> Literal["sklearn", "cuml"]:
    """Return the backend that `auto` stands for: cuML where tasks get a GPU share and have it installed."""
    if config.backend != "auto":
        return config.backend
    if not config.task_gpus:
        return "sklearn"
    # The driver may run on a machine without GPUs, so a task with a share looks.
    look = ray.remote(resolve_backend).options(num_cpus=config.task_cpus, num_gpus=config.task_gpus)
    found: Literal["sklearn", "cuml"] = ray.get(look.remote("auto"))
    return found
