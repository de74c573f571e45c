"""A job that asks a growing cluster for GPUs: it gets them, or goes on with what is there."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import ray

from acsr_ray.distributed.joining import ResourceError
from acsr_ray.distributed.runtime import RaySettings, ray_session
from acsr_ray.distributed.scaling import wait_for_gpus

pytestmark = pytest.mark.ray


def test_a_cluster_that_has_none_and_gets_none(ray_local):
    began = time.monotonic()
    with pytest.raises(ResourceError, match=r"no GPU after 1 s; --ray\.gpus asked for 2"):
        wait_for_gpus(2, 1)
    assert time.monotonic() - began > 0.9


@pytest.mark.slow
def test_a_cluster_that_grows(monkeypatch, caplog):
    from ray.cluster_utils import Cluster

    small = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args={**small, "num_cpus": 0})
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    try:
        with ray_session(RaySettings()), ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(wait_for_gpus, 2, 120)
            time.sleep(2)
            assert not waiting.done()
            cluster.add_node(num_gpus=2, **small)
            assert waiting.result(150) == 2
            # What was asked for is free again.
            assert ray.get(ray.remote(num_gpus=2, num_cpus=0)(lambda: "here").remote(), timeout=90) == "here"
        caplog.clear()
        with ray_session(RaySettings(gpus=3, gpus_wait_s=0.5)):
            assert "going on with 2 GPUs instead of 3" in caplog.text
        with ray_session(RaySettings(gpus=2)):
            pass
    finally:
        cluster.shutdown()
