"""Run one pipeline over a wave of units and watch it: progress, hung workers, leaving nodes, stops."""

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import psutil
import pyarrow as pa
import ray
from ray.actor import ActorHandle
from ray.data import Dataset
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from acsr_ray.config import FailedError, ResumableStop
from acsr_ray.corpus.run_record import RunTally
from acsr_ray.corpus.stopping import StopRequest
from acsr_ray.distributed.runtime import draining_nodes, node_resources
from acsr_ray.storage import Storage, StorageError

logger = logging.getLogger(__name__)

NOTHING: pa.Table = pa.table({})
TICK_S = 0.5
LOOK_S = 1.0
SPACE_S = 10.0
SILENT_S = 20.0
"""So long, or the stage timeout where that is longer, may a worker give no sign of life."""
ANSWER_S = 5.0
"""How long the overseer is waited for where its answer is only for the record."""
STRANDED_S = 30.0
"""So long may nothing happen after a node was lost, before what is left is shared out anew."""
STORE_FULL = (ray.exceptions.OutOfDiskError, ray.exceptions.ObjectStoreFullError)
STILL_S = 60.0
"""So long, and twice the stage timeout, may nothing happen at all, the wait for machines included."""


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
    tally: RunTally,
) -> Iterator[pa.Table]:
    """Yield the pipeline's tables as they come, and look after it meanwhile.

    Args:
        pipeline: from units to receipts or failures.
        overseer: handle of the run's `Overseer`.
        storage: of the output.
        stop: when made, nothing new is begun; when overdue, this ends without the rest.
        limits: when to step in.
        tally: hears of units that lost their worker.

    Raises:
        FailedError: a stage that cannot start, or code that fails.
        ResumableStop: no room left for the output, or Ray's own failure.
    """
    results: queue.Queue[pa.Table | BaseException | None] = queue.Queue()
    threading.Thread(target=_pull, args=(pipeline, results), daemon=True, name="wave").start()
    keeper = _Keeper(overseer, storage, stop, limits, tally)
    while not stop.is_overdue:
        item: pa.Table | BaseException | None = NOTHING
        with contextlib.suppress(queue.Empty):
            item = results.get(timeout=TICK_S)
        if item is None:
            keeper.count_falls()
            return
        if isinstance(item, BaseException):
            raise _explained(item) from item
        if item is not NOTHING:
            yield item
        try:
            keeper.tick()
        except ray.exceptions.RayError as error:
            raise _explained(error) from error
        if keeper.is_stranded:
            # Actors of the lost node wait for room that the others do not have.
            logger.warning("a node was lost and nothing moves: the rest begins again on those that are left")
            _abandon(pipeline)
            ray.get(overseer.forget.remote())
            return
    logger.warning("units in flight took too long; they are done again next time")


def _abandon(pipeline: Dataset) -> None:
    # Ray Data has no public way to end an execution from outside; its own iterators do it like this.
    executor = pipeline._current_executor
    if executor is None:
        raise ResumableStop("a node was lost before the first unit was done; the same command resumes")
    executor.shutdown(force=True)


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
        self,
        overseer: "ActorHandle[Any]",
        storage: Storage,
        stop: StopRequest,
        limits: Limits,
        tally: RunTally,
    ) -> None:
        self._overseer: Any = overseer
        self._storage, self._stop, self._limits, self._tally = storage, stop, limits, tally
        self._looked = self._measured = -1e9
        self._began = time.monotonic()
        self._told = False
        self._drained: frozenset[str] = frozenset()
        self._nodes = len(node_resources())
        self._kills: dict[ray.ObjectRef[bool], str] = {}
        self.is_stranded = False

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
            self.count_falls()
            check_room(self._storage, self._limits.min_free_bytes)

    def count_falls(self) -> None:
        with contextlib.suppress(ray.exceptions.RayError):
            self._tally.fallen(ray.get(self._overseer.falls.remote(), timeout=ANSWER_S))

    def _look(self) -> None:
        drained = draining_nodes()
        if drained - self._drained:
            logger.warning("%d nodes are leaving: they begin no new unit", len(drained))
        self._drained = drained
        late, stillborn, idle_s = ray.get(
            self._overseer.look.remote(self._limits.stage_timeout_s, sorted(drained)), timeout=STILL_S
        )
        for flight in late:
            logger.error(
                "%s has worked on rows %d..%d of unit %s for more than %g s: process %d of node %s is killed",
                flight["stage"],
                flight["rows"][0],
                flight["rows"][1] - 1,
                flight["unit"],
                self._limits.stage_timeout_s,
                flight["pid"],
                flight["node"],
            )
            _kill(flight["node"], flight["pid"])
        self._look_for_silence()
        # What was before this wave does not count: planning it may have taken long.
        idle_s = min(idle_s, time.monotonic() - self._began)
        self.is_stranded = idle_s > STRANDED_S and len(node_resources()) < self._nodes
        if idle_s > STILL_S + 2 * self._limits.stage_timeout_s:
            # A worker that hangs between two units is in no stage's hands.
            raise ResumableStop(f"nothing was begun or ended for {idle_s:.0f} s; the same command resumes")
        if stillborn:
            raise FailedError(f"workers of {', '.join(stillborn)} die before they are ready")

    def _look_for_silence(self) -> None:
        limit = max(SILENT_S, self._limits.stage_timeout_s)
        silent = ray.get(self._overseer.silent.remote(limit), timeout=STILL_S)
        for stage, node, pid in silent:
            told = f"a worker of {stage} gave no sign of life for {limit:g} s: process {pid} of node {node}"
            self._kills[_kill(node, pid)] = told
        if not self._kills:
            return
        done, _ = ray.wait(list(self._kills), num_returns=len(self._kills), timeout=0)
        for kill in done:
            told = self._kills.pop(kill)
            # Most have only ended with their pool; nobody has to hear of those.
            with contextlib.suppress(ray.exceptions.RayError):
                if ray.get(kill):
                    logger.error("%s is killed", told)


def _kill(node: str, pid: int) -> "ray.ObjectRef[bool]":
    """Kill a process of a node, even one that is stopped; Ray then starts its actor anew."""
    there = NodeAffinitySchedulingStrategy(node, soft=False)
    return ray.remote(_kill_here).options(num_cpus=0, scheduling_strategy=there, max_retries=0).remote(pid)


def _kill_here(pid: int) -> bool:
    # It may have ended by itself, and its number may be another program's by now.
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        if " ".join(process.cmdline()).startswith("ray::"):
            process.kill()
            return True
    return False


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
    """Return what a pipeline's end means for the job, with the one line that says why."""
    if isinstance(error, FailedError | ResumableStop):
        return error
    chain = list(_chain(error))
    if any(isinstance(link, STORE_FULL) for link in chain):
        return ResumableStop(
            "no room left in Ray's object store, nor on the disk that it spills to: make room there or give "
            "the store more (--ray.object-store-megabytes for a local Ray); the same command resumes"
        )
    of_code = (ray.exceptions.RayTaskError, ray.exceptions.ActorDiedError)
    told = next((e for e in chain if isinstance(e, of_code)), error)
    # The last line of what a worker says is the error itself; what comes before is its way there.
    lines = [line for line in str(told).splitlines() if line.strip()]
    message = lines[-1].strip() if lines else type(told).__name__
    if isinstance(told, ray.exceptions.RayError | TimeoutError) and not isinstance(told, of_code):
        return ResumableStop(f"Ray could not go on: {message}; the same command resumes")
    return FailedError(message)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        # A task's error carries what was raised in the task.
        error = getattr(error, "cause", None) or error.__cause__
