"""A Ray cluster of several nodes on this machine, and drivers that are programs of their own."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

DRIVERS = Path(__file__).parent / "drivers"
ENVIRONMENT = {"RAY_worker_niceness": "0", "OMP_NUM_THREADS": "1"}


@dataclass
class Nodes:
    """A head without CPUs and GPUs, and two nodes."""

    cluster: Any
    nodes: list[Any]

    def kill(self, position: int) -> None:
        """SIGKILL all processes of a node."""
        self.cluster.remove_node(self.nodes[position], allow_graceful=False)

    def start(self, driver: str, *arguments: object, **environment: str) -> subprocess.Popen[str]:
        """Start a driver of `drivers/` on the cluster."""
        return subprocess.Popen(
            [sys.executable, str(DRIVERS / driver), *map(str, arguments)],
            env={
                **os.environ,
                **ENVIRONMENT,
                **environment,
                "RAY_ADDRESS": self.cluster.address,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )


@pytest.fixture
def start_nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Nodes]]:
    """Start a cluster; it is stopped after the test."""
    from ray.cluster_utils import Cluster

    started = []

    def start(*, cpus: int = 1, gpus: int = 0, dashboard: bool = False, **environment: str) -> Nodes:
        for name, value in {**ENVIRONMENT, **environment}.items():
            monkeypatch.setenv(name, value)
        memory = {"object_store_memory": 100 * 2**20}
        head = {"num_cpus": 0, "num_gpus": 0, "include_dashboard": dashboard, **memory}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        started.append(cluster)
        nodes = [cluster.add_node(num_cpus=cpus, num_gpus=gpus, **memory) for _ in range(2)]
        return Nodes(cluster, nodes)

    yield start
    for cluster in started:
        cluster.shutdown()
