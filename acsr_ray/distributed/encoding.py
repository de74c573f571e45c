"""What encoders make of images, computed on the cluster: Gaussians of clusters, attacked held-out images."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

from acsr_ray.artifacts import load_artifact
from acsr_ray.attacks.threat import ThreatModel
from acsr_ray.clustering.assignments import ASSIGNMENTS, Assignments
from acsr_ray.clustering.gaussians import GaussianMoments
from acsr_ray.config import Device
from acsr_ray.distributed.latents import compute_latents
from acsr_ray.distributed.runtime import GPU_DEVICE, RaySettings, check_task, takes_gpus
from acsr_ray.evaluation.selection_quality import HeldOutLatents, held_out_latents

if TYPE_CHECKING:
    from ray import ObjectRef

ATTACK_CPUS = 0.25
"""CPUs of an attacking task: less than one, so that the latents of training images go on beside it."""


def cluster_moments(
    semantics: Path, encoder: Path, kind: str, *, device: Device, settings: RaySettings
) -> GaussianMoments:
    """Return the sums over an encoder's latents of every cluster of stage i, on the images it was found on.

    Args:
        semantics: artifact of the clusters; latents are cached there.
        encoder: artifact of the encoder.
        kind: `baseline` or `robust`.
        device: where to encode.
        settings: how much of Ray to take; a session must be open.
    """
    train = load_artifact(semantics, "semantics")["settings"]["train"]
    latents = compute_latents(train, encoder, kind, cache=semantics, device=device, settings=settings)
    keys = list(zip(latents.image_shards(), latents.rows.tolist(), strict=True))
    return latents.gaussian_moments(Assignments.load(semantics / ASSIGNMENTS).clusters_of(keys))


def start_attack(
    encoder: Path,
    kind: str,
    shards: Sequence[str],
    images: int,
    threat: ThreatModel,
    *,
    device: Device,
    task_gpus: float,
    half: bool = False,
) -> "ObjectRef[HeldOutLatents]":
    """Start `held_out_latents` as a task, on a GPU share where the cluster has GPUs."""
    on_gpu = takes_gpus(device)
    check_task("attacking an encoder", ATTACK_CPUS, task_gpus if on_gpu else 0.0)
    task: Any = ray.remote(held_out_latents).options(
        num_cpus=ATTACK_CPUS, num_gpus=task_gpus if on_gpu else 0, max_retries=3
    )
    # Workers have other working directories.
    places = [shard if "://" in shard else str(Path(shard).resolve()) for shard in shards]
    started: ObjectRef[HeldOutLatents] = task.remote(
        encoder.resolve(), kind, places, images, threat, GPU_DEVICE if on_gpu else "cpu", half
    )
    return started
