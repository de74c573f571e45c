"""Named units of work as Ray tasks: bounded, cached by file, published atomically, with progress and ETA."""

import logging
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ray

from acsr_ray.artifacts import atomic_write
from acsr_ray.config import AcsrError, Device
from acsr_ray.distributed.runtime import GPU_DEVICE, ResourceError, cluster_resources, takes_gpus

logger = logging.getLogger(__name__)

PROGRESS_SECONDS = 10.0
MAX_RETRIES = 3
SHOWN_FAILURES = 3


class SweepError(AcsrError, RuntimeError):
    """Some units failed; what finished is kept, and the same command goes on from there."""


class UnitRunner:
    """Runs named units as Ray tasks, a bounded number at a time, and publishes each result as one file.

    Args:
        cache: folder of the files.
        device: `auto` takes the cluster's GPUs if there are any.
        task_cpus: CPUs of a unit.
        task_gpus: GPU share of a unit where units compute on GPUs.
        folders: sub-folders of the cache that units are published in.

    Raises:
        ResourceError: the cluster has no room for one unit.
    """

    def __init__(
        self, cache: Path, device: Device, *, task_cpus: float, task_gpus: float, folders: Sequence[str]
    ) -> None:
        total = cluster_resources()
        gpus = total.get("GPU", 0.0)
        on_gpu = takes_gpus(device)
        if task_cpus > total.get("CPU", 0.0):
            raise ResourceError(
                f"a unit asks for {task_cpus:g} CPUs, the Ray cluster has {total.get('CPU', 0.0):g}"
            )
        self.device = GPU_DEVICE if on_gpu else "cpu"
        # Workers on other nodes have other working directories.
        self.cache = cache.resolve()
        for name in folders:
            _clear_leftovers(self.cache / name)
        self.threads = max(1, int(task_cpus))
        self.cached = 0
        self._tasks: dict[Callable[..., Any], Any] = {}
        self._cpus = task_cpus
        self._gpus = task_gpus if on_gpu else 0.0
        slots = gpus / task_gpus if on_gpu else total.get("CPU", 1.0) / task_cpus
        # One more per slot waits, so that no slot stands idle while the driver writes.
        self._in_flight = max(2, 2 * int(slots))

    def task(self, body: Callable[..., Any]) -> Any:  # noqa: ANN401  (ray's remote functions have no type)
        """Return a function as a Ray task with the unit's resources."""
        # Once per function: Ray ships every remote function to every worker.
        if body not in self._tasks:
            options = {"num_cpus": self._cpus, "num_gpus": self._gpus, "max_retries": MAX_RETRIES}
            self._tasks[body] = ray.remote(body).options(**options)
        return self._tasks[body]

    def run(
        self,
        what: str,
        keys: Sequence[str],
        path_of: Callable[[str], Path],
        submit: Callable[[str], "ray.ObjectRef[Any]"],
    ) -> None:
        """Run every unit whose file is not there; `SweepError` after the last one if some failed."""
        waiting = [key for key in dict.fromkeys(keys) if not path_of(key).exists()]
        cached = len(set(keys)) - len(waiting)
        self.cached += cached
        if not keys:
            return
        logger.info("%s: %d units, %d from the cache", what, len(set(keys)), cached)
        total = len(waiting)
        running: dict[ray.ObjectRef[Any], str] = {}
        failed: list[str] = []
        started = reported = time.monotonic()
        while waiting or running:
            while waiting and len(running) < self._in_flight:
                key = waiting.pop(0)
                running[submit(key)] = key
            (done,), _ = ray.wait(list(running), num_returns=1)
            key = running.pop(done)
            try:
                atomic_write(path_of(key), ray.get(done))
            except ray.exceptions.RayError as error:
                failed.append(str(error).strip().splitlines()[-1])
                logger.warning("%s: unit %s failed: %s", what, key, failed[-1])
            if time.monotonic() - reported > PROGRESS_SECONDS:
                reported = time.monotonic()
                finished = total - len(waiting) - len(running)
                left = (reported - started) / finished * (total - finished)
                logger.info("%s: %d of %d, about %.0f min left", what, finished, total, left / 60 + 0.5)
        if failed:
            reasons = "; ".join(sorted(set(failed))[:SHOWN_FAILURES])
            raise SweepError(f"{len(failed)} of {total} units of {what} failed: {reasons}")


def _clear_leftovers(folder: Path) -> None:
    """Remove what writers that were killed had begun; another sweep may be writing here now."""
    for path in folder.glob(".*.tmp"):
        writer = path.name.split(".")[-2]
        if not writer.isdecimal():
            continue
        try:
            os.kill(int(writer), 0)
        except ProcessLookupError:
            path.unlink(missing_ok=True)
        except OSError:
            continue  # it lives, as another user
