"""Wait for the GPUs that a job needs, on a cluster that grows when somebody asks."""

import logging

import ray
from ray.util.placement_group import placement_group, remove_placement_group

from acsr_ray.distributed.joining import ResourceError

logger = logging.getLogger(__name__)


def wait_for_gpus(count: int, wait_s: float) -> float:
    """Ask the connected cluster for GPUs, wait until they are there, and return how many are.

    The request is a placement group: the autoscaler sees it, and a driver that dies takes it along. It goes
    back at once, so that the stages can have what it held; a new node stays for as long as the cluster lets
    nodes idle.

    Args:
        count: how many.
        wait_s: seconds to wait; after that the job goes on with what is there.

    Raises:
        ResourceError: there is none at all.
    """
    there = _gpus()
    if there < count:
        logger.info("the cluster has %g GPUs; waiting up to %g s for %d", there, wait_s, count)
        group = placement_group([{"GPU": 1}] * count, strategy="PACK")
        try:
            group.wait(wait_s)
        finally:
            remove_placement_group(group)
        there = _gpus()
    if not there:
        raise ResourceError(f"the cluster has no GPU after {wait_s:g} s; --ray.gpus asked for {count}")
    if there < count:
        logger.warning("going on with %g GPUs instead of %d", there, count)
    return there


def _gpus() -> float:
    return float(ray.cluster_resources().get("GPU", 0.0))
