"""A job that asks a growing cluster for GPUs: it gets them, or goes on with what is there."""

import threading
import time

import pytest
import ray

from acsr_ray.distributed.joining import ResourceError
from acsr_ray.distributed.runtime import RaySettings, ray_session
from acsr_ray.distributed.scaling import wait_for_gpus

pytestmark = pytest.mark.ray


def test_a_cluster_that_has_none_and_gets_none(ray_local):
    began = time.monotonic()
    with pytest.raises(ResourceError, match=r"no GPU after 0\.5 s; --ray\.gpus asked for 2"):
        wait_for_gpus(2, 0.5)
    assert 0.4 < time.monotonic() - began < 10


@pytest.mark.slow
def test_a_cluster_that_grows(monkeypatch):
    from ray.cluster_utils import Cluster

    small = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args={**small, "num_cpus": 0})
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    threading.Timer(4, lambda: cluster.add_node(num_gpus=2, **small)).start()
    try:
        began = time.monotonic()
        with ray_session(RaySettings(gpus=2, gpus_wait_s=60)):
            assert 2 < time.monotonic() - began < 55
            assert ray.cluster_resources()["GPU"] == 2
            # What was asked for is free again.
            assert ray.get(ray.remote(num_gpus=2, num_cpus=0)(lambda: "here").remote(), timeout=30) == "here"
            assert wait_for_gpus(1, 0.1) == 2
            assert wait_for_gpus(3, 0.5) == 2, "it goes on with what is there"
    finally:
        cluster.shutdown()
