"""A look at the cluster that a job would join, without running anything on it."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ray

from acsr_ray.distributed.joining import check_environment, join_cluster
from acsr_ray.distributed.runtime import cluster_resources, node_resources

AUTH_MODE = "RAY_AUTH_MODE"


@dataclass(frozen=True)
class ClusterView:
    """What a cluster has, as seen by one who joined it."""

    nodes: int
    resources: Mapping[str, float]


def auth_mode(environment: Mapping[str, str] = os.environ) -> str:
    """Return how Ray authenticates here: `token`, `disabled`, or "" where nothing says so."""
    return environment.get(AUTH_MODE, "").lower()


def check_switches(environment: Mapping[str, str] = os.environ) -> str:
    """Return Ray's version after refusing unsafe switches and old versions, as every job does.

    Raises:
        UnsafeEnvironmentError: see `check_environment`.
    """
    check_environment(environment)
    return str(ray.__version__)


def view_cluster(address: str) -> ClusterView:
    """Join a cluster, count what it has, and leave it; one that is joined already is not left.

    Raises:
        ResourceError: it cannot be joined; the message says what to do.
    """
    joined = ray.is_initialized()
    if not joined:
        join_cluster(address)
    try:
        resources: dict[str, Any] = cluster_resources()
        return ClusterView(len(node_resources()), {key: resources.get(key, 0.0) for key in ("CPU", "GPU")})
    finally:
        if not joined:
            ray.shutdown()
