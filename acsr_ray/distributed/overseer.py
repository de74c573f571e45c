"""The actor that keeps the attempt book of a run; it imports nothing heavy, to be there before the stages."""

import logging
import time
from collections.abc import Sequence
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from acsr_ray.config import AcsrError
from acsr_ray.corpus.attempts import AttemptBook, Orders
from acsr_ray.corpus.ledger import Ledger
from acsr_ray.filesystems import Connection, connect
from acsr_ray.storage import StorageError

logger = logging.getLogger(__name__)


class Overseer:
    """Keeps the attempt book; see `AttemptBook` for the methods of the same names.

    Args:
        output: whose units are worked on; records of units that fell are kept there.
    """

    def __init__(self, output: str) -> None:
        self._output = output
        self._connection = Connection()

    def open(self, connection: Connection) -> None:
        """Open the output; no other method is called before.

        Args:
            connection: how stores are reached. It comes as an argument of a call, which stays between the two
                processes; arguments of the constructor would be kept by Ray's head.
        """
        connect(connection)
        self._connection = connection
        self._ledger = Ledger(self._output)
        self._book = AttemptBook(self._ledger.attempts())

    def connection(self) -> Connection:
        """Return how stores are reached, for the workers of stages."""
        return self._connection

    def begin(self, stage: str, unit: str, **attempt: Any) -> Orders:  # noqa: ANN401  (as in AttemptBook)
        """Begin a unit; what fell is written down, to be known after the driver's death too."""
        before = self._book.state_of(unit)
        orders = self._book.begin(stage, unit, **attempt)
        after = self._book.state_of(unit)
        if after is not None and after != before:
            try:
                self._ledger.write_attempt(unit, after)
            except (StorageError, OSError) as error:
                logger.warning("an attempt of %s is only remembered: %s", unit, error)
        return orders

    def narrow(self, stage: str, unit: str, first: int, behind: int) -> None:
        """Say which rows come next."""
        self._book.narrow(stage, unit, first, behind)

    def end(self, stage: str, unit: str) -> None:
        """End a unit."""
        self._book.end(stage, unit)

    def starting(self, stage: str, actors: int) -> bool:
        """Say that a worker of a pool starts."""
        return self._book.starting(stage, actors)

    def started(self, stage: str) -> None:
        """Say that it is ready."""
        self._book.started(stage)

    def beat(self, stage: str, node: str, pid: int) -> None:
        """Hear that a worker is there."""
        self._book.beat(stage, node, pid)

    def silent(self, seconds: float) -> list[tuple[str, str, int]]:
        """Return (stage, node, pid) of workers that were not heard of for longer, each once."""
        return self._book.silent(seconds)

    def stop(self) -> None:
        """Let no stage begin another unit; what is begun is finished and published."""
        self._book.stopping = True

    def forget(self) -> None:
        """Forget what is in flight: the pipeline that carried it is given up, and nothing fell."""
        self._book.forget()

    def falls(self) -> int:
        """Return how often a unit lost its worker."""
        return self._book.falls

    def look(
        self, timeout_s: float, draining: Sequence[str]
    ) -> tuple[list[dict[str, Any]], list[str], float]:
        """Hear which nodes are leaving; return what hangs, stages that do not start, and seconds of silence.

        Args:
            timeout_s: seconds on one unit, or part of one, after which its worker is taken for hung.
            draining: ids of nodes that are being drained.
        """
        self._book.draining = frozenset(draining)
        late = [
            {
                "stage": flight.stage,
                "unit": flight.unit,
                "rows": flight.rows,
                "node": flight.node,
                "pid": flight.pid,
            }
            for flight in self._book.overdue(timeout_s)
        ]
        return late, self._book.stillborn(), time.monotonic() - self._book.last_event


def start_overseer(output: str, connection: Connection) -> "ActorHandle[Any]":
    """Start the actor on the driver's own node, so that it lives as long as the driver does.

    Args:
        output: whose units are worked on.
        connection: how it and the workers of stages reach stores.

    Raises:
        StorageError: it cannot reach the output.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor: Any = ray.remote(Overseer).options(num_cpus=0, scheduling_strategy=here)
    handle: ActorHandle[Any] = actor.remote(output)
    opened: Any = handle
    try:
        ray.get(opened.open.remote(connection))
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, AcsrError):
            raise error.cause from None
        raise
    return handle
