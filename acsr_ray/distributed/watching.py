"""Stages under watch: attempts are counted, hung workers found, and what fails does not stop the rest."""

import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import ray

from acsr_ray.columns import FAILED, UNIT
from acsr_ray.config import AcsrError, FailedError
from acsr_ray.corpus.attempts import Orders
from acsr_ray.corpus.containers import ContainerError
from acsr_ray.corpus.facts import facts_in, with_facts, without_facts
from acsr_ray.corpus.ledger import LateAttemptError
from acsr_ray.corpus.units import ShardChangedError, Unit
from acsr_ray.distributed.blocks import Stage, StageChain, chain_name
from acsr_ray.distributed.joining import check_environment
from acsr_ray.filesystems import connect
from acsr_ray.purification.failures import (
    FailureKind,
    StageError,
    apply_by_halves,
    failed_unit,
    refuse_rows,
)
from acsr_ray.purification.metering import Meter
from acsr_ray.purification.stages import UnitTooLargeError
from acsr_ray.storage import StorageError

BEAT_S = 5.0
"""Seconds between two signs of life of a worker."""


class StartError(FailedError):
    """A stage whose workers never get ready."""


@dataclass(frozen=True)
class Watch:
    """What a chain of stages has to know of the run it is part of."""

    overseer: Any
    """Handle of the `Overseer` actor."""
    fingerprint: str
    position: str
    """`first`, `middle` or `last` in the pipeline."""
    actors: int
    """Size of the chain's pool."""

    @property
    def divisible(self) -> bool:
        """Whether the chain's rows can be tried alone; reading and publishing take a unit as a whole."""
        return self.position == "middle"


class WatchedChain(StageChain):
    """A chain of stages whose units are counted, tried in parts after a fall, and allowed to fail.

    Args:
        stages: class and constructor's arguments of each.
        watch: the run.

    Raises:
        StartError: the chain's workers died so often before they got ready that this one does not try.
    """

    def __init__(self, stages: Sequence[Stage], watch: Watch) -> None:
        self.watch = watch
        self.meter = Meter()
        self.name = chain_name(stages)
        check_environment()
        if not ray.get(watch.overseer.starting.remote(self.name, watch.actors)):
            raise StartError(f"workers of {self.name} die before they are ready")
        # The driver's endpoints and credentials: other nodes have an environment of their own.
        connect(ray.get(watch.overseer.connection.remote()))
        super().__init__(stages)
        ray.get(watch.overseer.started.remote(self.name))
        self.node: str = ray.get_runtime_context().get_node_id()
        # A worker that hangs between two units is in no stage's hands: only its silence tells.
        threading.Thread(target=self._beat, daemon=True, name="beat").start()

    def _beat(self) -> None:
        while True:
            self.watch.overseer.beat.remote(self.name, self.node, os.getpid())
            time.sleep(BEAT_S)

    def __call__(self, table: pa.Table) -> pa.Table:
        """Pass a unit through all stages; a unit that failed before, or fails here, becomes one row."""
        if FAILED in table.column_names:
            return table
        before, table = facts_in(table), without_facts(table)
        answer = self._answer(table)
        return with_facts(answer, before + facts_in(answer) + self.meter.read())

    def _answer(self, table: pa.Table) -> pa.Table:
        text = table[UNIT][0].as_py()
        unit = Unit.from_json(text)
        name = unit.output_name(self.watch.fingerprint)
        overseer, position = self.watch.overseer, self.watch.position
        orders: Orders = ray.get(
            overseer.begin.remote(
                self.name,
                name,
                rows=unit.num_rows,
                node=self.node,
                pid=os.getpid(),
                last_stage=position == "last",
                divisible=self.watch.divisible,
            )
        )
        if orders.refusal == "given_up":
            detail = f"{self.name} brought down {orders.falls} workers over it"
            return failed_unit(text, "given_up", detail)
        if orders.refusal:
            return failed_unit(text, "deferred", orders.refusal)
        try:
            return self._work(table, name, orders)
        except AcsrError as error:
            return failed_unit(text, _kind(error), f"{self.name}: {error}")
        except FileNotFoundError as error:
            # Only who reads the input can miss a shard.
            kind: FailureKind = "vanished" if position == "first" else "storage"
            return failed_unit(text, kind, f"{self.name}: {error}")
        finally:
            ray.get(overseer.end.remote(self.name, name))

    def _apply(self, table: pa.Table) -> pa.Table:
        for stage in self.stages:
            table = self.meter.call(stage, table)
        return table

    def _work(self, table: pa.Table, name: str, orders: Orders) -> pa.Table:
        if not self.watch.divisible:
            return self._apply(table)
        table = refuse_rows(table, orders.poison)
        if not orders.parts:
            return apply_by_halves(self._apply, table)
        done = []
        for first, behind in orders.parts:
            ray.get(self.watch.overseer.narrow.remote(self.name, name, first, behind))
            part = table.slice(first, behind - first)
            done.append((first, apply_by_halves(self._apply, part)))
        return pa.concat_tables([part for _, part in sorted(done, key=lambda item: item[0])])


def _kind(error: AcsrError) -> FailureKind:
    if isinstance(error, StorageError | LateAttemptError):
        return "storage"
    if isinstance(error, ShardChangedError):
        return "changed"
    if isinstance(error, ContainerError):
        return "unreadable"
    if isinstance(error, UnitTooLargeError):
        return "too_large"
    if isinstance(error, StageError):
        return "stage"
    raise error
