"""Doing published units again: which ones, under which names, and what they replace.

A unit's name follows from its shard, rows, content and settings, and nothing published is ever replaced, so a
unit that is to be done again needs another name: a retry has a number, which enters the names of its units as
their generation. They are parked beside what readers see until all of their shard are there; then one
snapshot lists them in place of the old ones. The order for a retry is kept in `run.json` until it is done, so
a retry that was killed goes on under the same number, and does not do again what it has done.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any

from acsr_ray.corpus.snapshot import Receipt, Snapshot, total
from acsr_ray.corpus.units import Unit


@dataclass(frozen=True)
class RetryOrder:
    """What a retry is to do.

    Args:
        number: of the retry; receipts of this generation are done.
        reasons: units with rows quarantined for one of them are done again.
        shards: relative paths of shards whose missing units are tried again too.
        since: when it was first asked for, ISO 8601.
        is_open: whether it has not come to its end.
    """

    number: int
    reasons: frozenset[str]
    shards: frozenset[str] = frozenset()
    since: str = ""
    is_open: bool = True

    def wants(self, receipt: Receipt) -> bool:
        """Return whether a published unit is to be done again."""
        return receipt.generation < self.number and not self.reasons.isdisjoint(receipt.reasons)

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON value."""
        return {
            "number": self.number,
            "reasons": sorted(self.reasons),
            "shards": sorted(self.shards),
            "since": self.since,
            "is_open": self.is_open,
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "RetryOrder":
        """Restore from `to_dict`."""
        sets = {name: frozenset(content[name]) for name in ("reasons", "shards")}
        return cls(content["number"], sets["reasons"], sets["shards"], content["since"], content["is_open"])


def next_order(
    before: RetryOrder | None, snapshot: Snapshot, reasons: Set[str], shards: Set[str]
) -> RetryOrder:
    """Return the order that is still open with what is asked for now added, else a new one.

    Args:
        before: the last order of the output.
        snapshot: the current one.
        reasons: asked for now.
        shards: with missing units, asked for now.
    """
    if before is not None and before.is_open:
        return replace(before, reasons=before.reasons | reasons, shards=before.shards | shards)
    used = max((receipt.generation for receipt in snapshot.receipts()), default=0)
    number = max(used, before.number if before else 0) + 1
    since = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return RetryOrder(number, frozenset(reasons), frozenset(shards), since)


def told_retry(order: RetryOrder, redone: Sequence[tuple[Receipt, Receipt]]) -> dict[str, Any]:
    """Return what a retry came to, for a summary.

    Args:
        order: what it was to do.
        redone: receipts of its units, before and now.
    """
    before, now = total(old for old, _ in redone), total(new for _, new in redone)
    return {
        "number": order.number,
        "reasons": sorted(order.reasons),
        "units": len(redone),
        "quarantined before": before["quarantined"],
        "quarantined now": now["quarantined"],
    }


class Generations:
    """Which generation of each unit an output holds, and which one a retry makes.

    Args:
        snapshot: the current one.
        fingerprint: of the run.
        finished: names of the units that need not be done again; grows while the run goes on.
        order: of a retry; None in a run that does what is new.
    """

    def __init__(
        self, snapshot: Snapshot, fingerprint: str, finished: Set[str], order: RetryOrder | None
    ) -> None:
        self.order = order
        self.replaced: dict[str, tuple[Unit, Receipt]] = {}
        """What units of the retry stand in for, by the name of the new one."""
        self._fingerprint, self._finished = fingerprint, finished
        self._entries = snapshot.shards
        self._held = {
            (relative, receipt.first, receipt.rows): receipt.generation
            for relative, entry in snapshot.shards.items()
            for receipt in entry.receipts
            if receipt.generation
        }

    def is_opened(self, relative: str) -> bool:
        """Return whether a run looks into a shard of the input: a retry only into those with its units."""
        if self.order is None or relative in self.order.shards:
            return True
        entry = self._entries.get(relative)
        return entry is not None and any(map(self.order.wants, entry.receipts))

    def current(self, unit: Unit) -> Unit:
        """Return a planned unit as the output holds it, if it does, else as it was planned."""
        held = self._held.get((unit.relative, unit.first, unit.num_rows), 0)
        there = replace(unit, generation=held)
        return there if self._is_finished(there) else unit

    def cut(self, unit: Unit) -> list[Unit]:
        """Return a planned unit, or the parts it was published in because it was too large as a whole."""
        unit = self.current(unit)
        if self._is_finished(unit) or unit.num_rows < 2 or unit.relative not in self._entries:
            return [unit]
        parts = [part for half in unit.halves() for part in self.cut(half)]
        return parts if all(map(self._is_finished, parts)) else [unit]

    def is_changed(self, relative: str, units: list[Unit]) -> bool:
        """Return whether a retry leaves a shard to the next run: it has units that were never published."""
        asked_for = self.order is None or relative in self.order.shards
        return not asked_for and not all(map(self._is_finished, units))

    def again(self, units: list[Unit], receipt_of: Callable[[str], Receipt]) -> Iterator[Unit]:
        """Yield a shard's units, those that the retry wants as the retry makes them."""
        for unit in units:
            name = unit.output_name(self._fingerprint)
            if self.order is None or name not in self._finished:
                yield unit
                continue
            receipt = receipt_of(name)
            if not self.order.wants(receipt):
                yield unit
                continue
            new = replace(unit, generation=self.order.number)
            self.replaced[new.output_name(self._fingerprint)] = unit, receipt
            yield new

    def _is_finished(self, unit: Unit) -> bool:
        return unit.output_name(self._fingerprint) in self._finished
