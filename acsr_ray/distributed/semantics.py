"""Stage i, steps 2 to 5: latents of the training split, clusters per class, one dictionary per cluster."""

import importlib.util
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field

from acsr_ray.artifacts import (
    artifact_digest,
    begin_artifact,
    finish_artifact,
    load_artifact,
    save_tensors,
)
from acsr_ray.clustering.assignments import ASSIGNMENTS, GAUSSIANS, Assignments
from acsr_ray.clustering.elbow import ClassClusters, ElbowConfig
from acsr_ray.clustering.gaussians import Inverse
from acsr_ray.config import Device, JobSettings, MissingExtraError
from acsr_ray.distributed.clusters import cluster_classes
from acsr_ray.distributed.dictionaries import (
    ClusterImages,
    DictionaryConfig,
    learn_dictionaries,
    load_dictionaries,
)
from acsr_ray.distributed.latents import TRAINING_DATA, Latents, compute_latents, labelled_data_digest
from acsr_ray.distributed.runtime import RaySettings, cluster_resources, ray_session
from acsr_ray.models.classifier import load_classifier

logger = logging.getLogger(__name__)


class LearnSemanticsSettings(JobSettings):
    """Learn the semantics of a labelled corpus: per class clusters, and one dictionary per cluster.

    A rerun skips the latents and dictionaries that are there.
    """

    train: tuple[str, ...] = Field(min_length=1)
    """Training shards; test images have no place here."""
    baseline: Path
    """Artifact of train_baseline, whose latents are clustered."""
    output: Path
    """Folder of the artifact (`semantics/`)."""
    elbow: ElbowConfig = ElbowConfig()
    """Clusters per class."""
    inverse: Inverse = "shrinkage"
    """Inverse covariance: Ledoit-Wolf `shrinkage`, or the paper's `pinv`."""
    dictionary: DictionaryConfig = DictionaryConfig()
    """Dictionary per cluster."""
    max_in_flight: int | None = Field(None, ge=1)
    """Most dictionary tasks at a time; default: twice the CPUs of the cluster."""
    device: Device = "auto"
    """Where latents are computed."""
    seed: int = 0
    """Fixes k-means, sampling and dictionaries."""
    ray: RaySettings = RaySettings()
    """Where Ray runs and how much of it to take."""


def learn_semantics(settings: LearnSemanticsSettings) -> dict[str, Any]:
    """Run stage i after the baseline, save it as artifact `semantics` and return what was found.

    Raises:
        MissingExtraError: the dictionaries' backend is not installed.
        ResourceError: no node can hold a task.
    """
    if settings.dictionary.cdl.backend == "sporco" and importlib.util.find_spec("sporco") is None:
        raise MissingExtraError("sporco is not installed: pip install 'acsr-ray[sporco]'")
    names = load_classifier(settings.baseline, "baseline").class_names
    begin_artifact(settings.output)
    with ray_session(settings.ray):
        latents = compute_latents(
            settings.train,
            settings.baseline,
            "baseline",
            cache=settings.output,
            device=settings.device,
            settings=settings.ray,
        )
        fits = cluster_classes(latents, settings.elbow, settings.seed)
        assignments = _assign(latents, fits)
        clusters = _cluster_images(assignments)
        in_flight = settings.max_in_flight or max(1, int(2 * cluster_resources().get("CPU", 1.0)))
        paths = learn_dictionaries(
            clusters,
            settings.dictionary,
            settings.output / "dictionaries",
            seed=settings.seed,
            max_in_flight=in_flight,
        )
    assignments.save(settings.output / ASSIGNMENTS)
    gaussians = latents.gaussian_moments(assignments.cluster_id).finish(settings.inverse)
    save_tensors(settings.output / GAUSSIANS, gaussians.pack())
    dictionaries = [f"dictionaries/{path.name}" for path in paths]
    content = {
        "settings": settings.deciding(),
        "class_names": list(names),
        "baseline_digest": artifact_digest(settings.baseline),
        TRAINING_DATA: labelled_data_digest(settings.train),
        "classes": {
            names[label]: {
                "clusters": fit.num_clusters,
                "elbow": fit.elbow,
                "wcss": fit.wcss,
                "blob_wcss": fit.blob_wcss,
            }
            for label, fit in fits.items()
        },
        "clusters": [[c.class_id, c.cluster_id, len(c.rows)] for c in clusters],
        "dictionaries": dictionaries,
    }
    files = [ASSIGNMENTS, GAUSSIANS, *dictionaries]
    finish_artifact(settings.output, "semantics", files, content)
    return {
        "images": len(latents.labels),
        "clusters": len(clusters),
        "clusters per class": {names[label]: fit.num_clusters for label, fit in fits.items()},
        "output": str(settings.output),
    }


def load_semantics_dictionaries(directory: Path) -> tuple[list[tuple[int, int]], torch.Tensor]:
    """Return the (class, cluster) keys and atoms (K, M, 3, h, w) of a semantics artifact."""
    manifest = load_artifact(directory, "semantics")
    keys = [(class_id, cluster_id) for class_id, cluster_id, _ in manifest["clusters"]]
    return keys, load_dictionaries([directory / name for name in manifest["dictionaries"]])


def _assign(latents: Latents, fits: dict[int, ClassClusters]) -> Assignments:
    cluster_id = np.zeros(len(latents.labels), np.int32)
    for label, fit in fits.items():
        cluster_id[latents.labels == label] = fit.cluster_id
    return Assignments(latents.image_shards(), latents.rows, latents.labels, cluster_id)


def _cluster_images(assignments: Assignments) -> list[ClusterImages]:
    groups: dict[tuple[int, int], list[tuple[str, int]]] = {}
    for shard, row, label, cluster in zip(
        assignments.shards,
        assignments.rows.tolist(),
        assignments.class_id.tolist(),
        assignments.cluster_id.tolist(),
        strict=True,
    ):
        groups.setdefault((label, cluster), []).append((shard, row))
    return [ClusterImages(*key, tuple(rows)) for key, rows in sorted(groups.items())]
