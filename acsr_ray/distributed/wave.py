"""Run one pipeline over a wave of units and watch it: progress, hung workers, leaving nodes, stops."""

import logging
import queue
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import ray
from ray.actor import ActorHandle
from ray.data import Dataset

from acsr_ray.config import FailedError, ResumableStop
from acsr_ray.corpus.stopping import StopRequest
from acsr_ray.distributed.runtime import draining_nodes
from acsr_ray.storage import Storage, StorageError

logger = logging.getLogger(__name__)

TICK_S = 0.5
LOOK_S = 1.0
SPACE_S = 10.0


@dataclass(frozen=True)
class Limits:
    """When to step in."""

    stage_timeout_s: float
    min_free_bytes: int


def run_wave(
    pipeline: Dataset,
    overseer: "ActorHandle[Any]",
    storage: Storage,
    stop: StopRequest,
    limits: Limits,
) -> Iterator[pa.Table]:
    """Yield the pipeline's tables as they come, and look after it meanwhile.

    Args:
        pipeline: from units to receipts or failures.
        overseer: handle of the run's `Overseer`.
        storage: of the output.
        stop: when made, nothing new is begun; when overdue, this ends without the rest.
        limits: when to step in.

    Raises:
        FailedError: a stage that cannot start, or code that fails.
        ResumableStop: no room left for the output, or Ray's own failure.
    """
    results: queue.Queue[pa.Table | BaseException | None] = queue.Queue()
    threading.Thread(target=_pull, args=(pipeline, results), daemon=True, name="wave").start()
    keeper = _Keeper(overseer, storage, stop, limits)
    while not stop.is_overdue:
        try:
            item = results.get(timeout=TICK_S)
        except queue.Empty:
            keeper.tick()
            continue
        if item is None:
            return
        if isinstance(item, BaseException):
            raise _explained(item) from item
        yield item
        keeper.tick()
    logger.warning("units in flight took too long; they are done again next time")


def _pull(pipeline: Dataset, results: "queue.Queue[pa.Table | BaseException | None]") -> None:
    try:
        tables: Iterable[pa.Table] = pipeline.iter_batches(
            batch_size=None, batch_format="pyarrow", prefetch_batches=0
        )
        for table in tables:
            results.put(table)
    except Exception as error:  # it is raised again in the main thread
        results.put(error)
    else:
        results.put(None)


class _Keeper:
    def __init__(
        self, overseer: "ActorHandle[Any]", storage: Storage, stop: StopRequest, limits: Limits
    ) -> None:
        self._overseer: Any = overseer
        self._storage, self._stop, self._limits = storage, stop, limits
        self._looked = self._measured = -1e9
        self._told = False
        self._drained: frozenset[str] = frozenset()

    def tick(self) -> None:
        now = time.monotonic()
        if self._stop.is_made and not self._told:
            self._told = True
            self._overseer.stop.remote()
        if now - self._looked > LOOK_S:
            self._looked = now
            self._look()
        if now - self._measured > SPACE_S:
            self._measured = now
            check_room(self._storage, self._limits.min_free_bytes)

    def _look(self) -> None:
        drained = draining_nodes()
        if drained - self._drained:
            logger.warning("%d nodes are leaving: they begin no new unit", len(drained))
        self._drained = drained
        late, stillborn = ray.get(self._overseer.look.remote(self._limits.stage_timeout_s, sorted(drained)))
        for flight in late:
            logger.error(
                "%s has worked on rows %d..%d of unit %s for more than %g s: %s is killed",
                flight["stage"],
                flight["rows"][0],
                flight["rows"][1] - 1,
                flight["unit"],
                self._limits.stage_timeout_s,
                flight["worker"],
            )
            ray.kill(flight["handle"], no_restart=False)
        if stillborn:
            raise FailedError(f"workers of {', '.join(stillborn)} die before they are ready")


def check_room(storage: Storage, least: int) -> None:
    """Raise `StorageError` when the output's disk has less room than asked for; warn before that."""
    free = storage.free_bytes()
    if free is None:
        return
    if free < least:
        raise StorageError(
            f"only {free // 2**20} MiB are left for {storage.root} (--min-free-megabytes {least // 2**20}): "
            "make room and run the same command again"
        )
    if free < 2 * least:
        logger.warning("only %d MiB are left for %s", free // 2**20, storage.root)


def _explained(error: BaseException) -> Exception:
    cause = _cause(error)
    told = str(cause).strip().splitlines()
    message = f"{type(cause).__name__}: {told[-1] if told else ''}"
    if isinstance(error, ray.exceptions.RayTaskError | ray.exceptions.ActorDiedError | FailedError):
        return FailedError(message)
    if isinstance(error, ray.exceptions.RayError | TimeoutError):
        return ResumableStop(f"Ray could not go on: {message}; the same command resumes")
    return FailedError(message)


def _cause(error: BaseException) -> BaseException:
    while isinstance(error, ray.exceptions.RayTaskError) and isinstance(error.cause, Exception):
        error = error.cause
    while error.__cause__ is not None:
        error = error.__cause__
    return error
