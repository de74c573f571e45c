"""Connect to Ray and share a machine's or a cluster's CPUs and GPUs between the stages of a pipeline."""

import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import ray
from pydantic import Field

from acsr_ray.config import Device, ResumableStop, Settings
from acsr_ray.distributed.joining import ResourceError as ResourceError
from acsr_ray.distributed.joining import check_environment, join_cluster
from acsr_ray.distributed.scaling import wait_for_gpus

logger = logging.getLogger(__name__)


LATE = "timed out during startup"
"""What Ray says of a node of its own that does not come up."""
GPU_DEVICE = "cpu" if os.environ.get("ACSR_LOGICAL_GPUS") == "1" else "cuda"
"""What a stage with a GPU share computes on. With ACSR_LOGICAL_GPUS=1, here and on the workers, a cluster's
GPUs are only counted (`ray start --num-gpus`): a placement can be tried where there are none."""


class RaySettings(Settings):
    """Where Ray runs and how much of it a job takes."""

    address: str | None = None
    """Cluster to join; default: RAY_ADDRESS where it is set (as in submitted jobs), else a local Ray."""
    object_store_megabytes: int = Field(512, gt=0)
    """Object store of a local Ray, in MiB."""
    actors: int | None = Field(None, ge=1)
    """Purification actors; default: one per GPU, or one per CPU."""
    gpus: int | None = Field(None, ge=1)
    """Of a cluster that grows: ask for so many GPUs, and wait for them, before the job plans."""
    gpus_wait_s: float = Field(900.0, gt=0)
    """How long; after that the job goes on with those that are there."""
    threads_per_actor: int = Field(1, ge=1)
    """Torch threads per actor; latents may differ in the last bit between thread counts, so keep it fixed."""


@contextmanager
def ray_session(settings: RaySettings) -> Iterator[None]:
    """Join the configured cluster, or start a local Ray; what was connected here is disconnected after.

    Raises:
        UnsafeEnvironmentError: see `check_environment`.
        ResourceError: the cluster cannot be joined; the message says what to do.
        ResumableStop: a local Ray does not start in time.
    """
    check_environment()
    if ray.is_initialized():
        yield
        return
    address = settings.address or os.environ.get("RAY_ADDRESS")
    if address:
        join_cluster(address)
    else:
        _start_local(settings.object_store_megabytes * 2**20)
    try:
        if settings.gpus:
            wait_for_gpus(settings.gpus, settings.gpus_wait_s)
        yield
    finally:
        ray.shutdown()


def _start_local(object_store_memory: int) -> None:
    try:
        ray.init(
            "local", include_dashboard=False, log_to_driver=False, object_store_memory=object_store_memory
        )
    except Exception as error:  # Ray has no type for it
        if LATE not in str(error):
            raise
        raise ResumableStop(
            "a local Ray did not start within the half minute that it gives itself, as happens on a busy "
            "machine; the same command tries again"
        ) from error


@dataclass(frozen=True)
class StageShares:
    """Fractional resources of each stage, chosen so that all of them fit at the same time.

    An actor pool keeps its CPUs while it lives: did they not all fit, a small machine would stand still.
    Without GPUs, each purification actor also encodes and selects, with the CPUs of both stages.
    """

    device: str
    encode_actors: int
    encode_cpus: float
    encode_gpus: float
    purify_actors: int
    purify_cpus: float
    purify_gpus: float
    codec_actors: int
    """Of each of the two stages that read and decode, and that encode and write."""
    codec_cpus: float

    def __str__(self) -> str:
        """Return it for the log."""
        encode = f"{self.encode_actors} actors encode, " if self.encode_actors else ""
        what = "purify" if self.encode_actors else "encode and purify"
        return (
            f"on {self.device}: {self.codec_actors} actors read, {encode}{self.purify_actors} {what}, "
            f"{self.codec_actors} write"
        )


def share_resources(device: Device, settings: RaySettings, num_units: int) -> StageShares:
    """Divide the connected cluster between the stages.

    Args:
        device: `auto` takes GPUs when the cluster has some.
        settings: number of actors, if asked for.
        num_units: blocks to come; more actors than that would only start.
    """
    return divide_resources(*cluster_size(device), settings, num_units)


def cluster_size(device: Device) -> tuple[float, float]:
    """Return the CPUs of the connected cluster, and the GPUs that a job may take there."""
    total = cluster_resources()
    return total.get("CPU", 1.0), total.get("GPU", 0.0) if takes_gpus(device) else 0.0


def divide_resources(cpus: float, gpus: float, settings: RaySettings, num_units: int) -> StageShares:
    """Divide so many CPUs and GPUs between the stages; without GPUs, all of them run on CPUs.

    Args:
        cpus: of all nodes.
        gpus: that may be taken, of all nodes.
        settings: number of actors, if asked for.
        num_units: blocks to come.
    """
    cpus, on_gpu = max(1.0, cpus), gpus > 0
    purify = min(settings.actors or int(gpus if on_gpu else cpus) or 1, num_units)
    # On GPUs both pools share each card.
    encode = purify if on_gpu else 0
    # A CIFAR image takes 0.15 ms to decode and to encode, and 5 ms to purify on a core; beside GPUs nearly
    # all cores decode and encode.
    codecs = min(max(1, int((0.4 if on_gpu else 0.25) * cpus)), num_units)
    share = 1 / math.ceil(purify / gpus) if on_gpu else 0.0
    return StageShares(
        device=GPU_DEVICE if on_gpu else "cpu",
        encode_actors=encode,
        encode_cpus=_rounded(min(0.25, 0.25 * cpus / purify)),
        # Ray packs small shares on one card: all of them together leave room for a purifier there.
        encode_gpus=_rounded(0.3 * share / purify),
        purify_actors=purify,
        purify_cpus=_rounded(min(0.5, 0.5 * cpus / purify)),
        purify_gpus=_rounded(0.7 * share),
        codec_actors=codecs,
        codec_cpus=_rounded(min(0.2, 0.08 * cpus / codecs)),
    )


def _rounded(share: float) -> float:
    # Ray keeps four decimals and rejects finer shares.
    return math.floor(share * 1000) / 1000


def takes_gpus(device: Device) -> bool:
    """Return whether a device setting means the GPUs of the connected cluster.

    Raises:
        ResourceError: it asks for GPUs and there are none.
    """
    there = cluster_resources().get("GPU", 0.0) > 0
    if device == "cuda" and not there:
        raise ResourceError("device is cuda, but the Ray cluster has no GPU")
    return there and device != "cpu"


def node_resources() -> list[dict[str, float]]:
    """Return the total resources of every node of the connected cluster that is alive."""
    return [dict(node["Resources"]) for node in ray.nodes() if node["Alive"]]


def draining_nodes() -> frozenset[str]:
    """Return the ids of nodes that were told to leave, such as spot machines that were given notice."""
    # Ray has no public call for it; its own trainer asks in this way.
    return frozenset(ray._private.state.state.get_draining_nodes())


def check_task(what: str, cpus: float, gpus: float) -> None:
    """Raise `ResourceError` unless some node can hold a task; it would wait for ever without a word."""
    nodes = node_resources()
    if not any(node.get("CPU", 0.0) >= cpus and node.get("GPU", 0.0) >= gpus for node in nodes):
        sizes = ", ".join(f"{node.get('CPU', 0):g} and {node.get('GPU', 0):g}" for node in nodes)
        raise ResourceError(
            f"{what} asks for {cpus:g} CPUs and {gpus:g} GPUs a task; the cluster's nodes have {sizes}"
        )


def cluster_resources() -> dict[str, float]:
    """Return the connected cluster's total resources, such as CPU and GPU."""
    totals: dict[str, float] = ray.cluster_resources()
    return totals
