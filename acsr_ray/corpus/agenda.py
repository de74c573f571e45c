"""What a run has to look into: shards, with their units as the output holds them or a retry makes them."""

import logging
from collections.abc import Callable, Iterable, Iterator, Set
from dataclasses import dataclass, replace

from acsr_ray.corpus.changes import Refused, ShardWork, folder_work, inspect_shards, unchanged
from acsr_ray.corpus.ledger import Ledger
from acsr_ray.corpus.retrying import Generations, RetryOrder
from acsr_ray.corpus.snapshot import Receipt, Snapshot
from acsr_ray.corpus.sources import ImageFolder, Shard
from acsr_ray.corpus.units import Unit, UnitPlan, limited

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class NightSettings:
    """What a run is asked for, apart from how units are purified."""

    plan: UnitPlan
    fingerprint: str
    limit: int | None = None
    wave_units: int = 2048
    max_removed_share: float = 1.0
    """Most of the output's shards, or of a folder's images, that may leave with the input."""
    retry: RetryOrder | None = None
    """Do these units again, and nothing that is new."""


class Agenda:
    """Finds the shards of an input that a run opens, and sets their units.

    Args:
        settings: of the run.
        ledger: of the output.
        snapshot: the current one.
        finished: names of the units that need not be done again.
    """

    def __init__(
        self, settings: NightSettings, ledger: Ledger, snapshot: Snapshot, finished: Set[str]
    ) -> None:
        self.passed: set[str] = set()
        """Shards that need not be opened."""
        self.left: list[str] = []
        """Shards that changed since they were purified, which a retry leaves to the next run."""
        self.generations = Generations(snapshot, settings.fingerprint, finished, settings.retry)
        self._settings, self._ledger, self._snapshot, self._finished = settings, ledger, snapshot, finished
        self._known = {receipt.name: receipt for receipt in snapshot.receipts()}

    def found(
        self, source: list[Shard] | ImageFolder, told: Callable[[int], None] = lambda count: None
    ) -> Iterator[ShardWork | Refused]:
        """Yield the shards that have to be looked into; nothing of the others is read.

        Args:
            source: the corpus as it was listed.
            told: hears how many that will be, before the first.
        """
        settings = self._settings
        if isinstance(source, ImageFolder):
            told(1)
            yield folder_work(source, settings.plan, settings.fingerprint)
            return
        # A limit counts the rows of every shard before.
        opened = [shard for shard in source if settings.limit is not None or not self._is_passed(shard)]
        self.passed = {shard.relative for shard in source} - {shard.relative for shard in opened}
        logger.info("%d shards, %d of them as they were", len(source), len(source) - len(opened))
        told(len(opened))
        yield from inspect_shards(opened, settings.plan, self._snapshot, settings.fingerprint)

    def limited(self, works: Iterable[ShardWork]) -> Iterator[ShardWork]:
        """Yield shards up to the limit of rows, the last one cut."""
        left = self._settings.limit
        for work in works:
            if left == 0:
                return
            if left is not None:
                whole = len(work.units), sum(unit.num_rows for unit in work.units)
                work.units = list(limited(work.units, left))
                if whole != (len(work.units), sum(unit.num_rows for unit in work.units)):
                    # A shard that was cut is not one that a later run may take as done.
                    work.version = ""
                left -= sum(unit.num_rows for unit in work.units)
            yield work

    def settle(self, work: ShardWork) -> bool:
        """Set a shard's units to what the output holds, or a retry makes; False for a shard to pass over."""
        generations = self.generations
        if generations.order is None:
            work.units = list(map(generations.current, work.units))
            return True
        if not generations.is_opened(work.relative):
            return False
        units = [part for unit in work.units for part in generations.cut(unit)]
        if generations.is_changed(work.relative, units):
            logger.warning("shard %s has changed: a retry leaves it to the next run", work.uri)
            self.left.append(work.relative)
            return False
        work.units = list(generations.again(units, self._receipt))
        return True

    def waiting(self, work: ShardWork, units: list[Unit]) -> Iterator[tuple[str, Unit]]:
        """Yield those of a shard's units that are not finished, and take the receipts of the others."""
        for unit in units:
            name = unit.output_name(self._settings.fingerprint)
            if name in self._finished:
                work.receipts[name] = replace(self._receipt(name), generation=unit.generation)
            else:
                yield name, unit

    def _is_passed(self, shard: Shard) -> bool:
        if self._settings.retry is not None:
            return not self.generations.is_opened(shard.relative)
        entry = unchanged(shard, self._snapshot, self._settings.fingerprint)
        return entry is not None and all(receipt.name in self._finished for receipt in entry.receipts)

    def _receipt(self, name: str) -> Receipt:
        """Return the receipt of a finished unit, from its file where no snapshot has it."""
        if name not in self._known:
            self._known[name] = self._ledger.receipt(name)
        return self._known[name]
