"""One run over a corpus: what is to be done, in waves of units, until each is published or accounted for.

Nothing here knows how units are purified: that is a function from units to tables, each a receipt or a
failure. What a failure means is decided here: deferred units and those of a changed shard are done again, at
once; a shard that cannot be read is refused, and the others finish; a stage that fails on a unit is tried
again, and what fails for good is told at the end.
"""

import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import islice
from typing import Any

import pyarrow as pa

from acsr_ray.columns import DETAIL, FACTS, FAILED, UNIT
from acsr_ray.config import FailedError, ResumableStop
from acsr_ray.corpus.agenda import Agenda
from acsr_ray.corpus.agenda import NightSettings as NightSettings
from acsr_ray.corpus.changes import Refused, ShardWork, inspect_shard, list_corpus
from acsr_ray.corpus.differences import shard_changes
from acsr_ray.corpus.facts import UnitFacts
from acsr_ray.corpus.lease import Lease
from acsr_ray.corpus.ledger import Ledger, shard_of
from acsr_ray.corpus.removals import check_removed
from acsr_ray.corpus.retrying import told_retry
from acsr_ray.corpus.run_record import RunTally
from acsr_ray.corpus.snapshot import Receipt, ShardEntry, Snapshot, total
from acsr_ray.corpus.sources import CorpusError, ImageFolder, Shard
from acsr_ray.corpus.stopping import StopRequest
from acsr_ray.corpus.units import Unit
from acsr_ray.storage import StorageError

logger = logging.getLogger(__name__)

MOST_TRIES = 3
"""Of a unit that a stage fails on, and of a shard that changes while it is read."""
MOST_IDLE_ROUNDS = 20
IDLE_PAUSE_S = 1.0
SHOWN = 5

PurifyUnits = Callable[[list[Unit], frozenset[str]], Iterable[pa.Table]]
"""From units, and the shards whose new units are parked, to one table per unit."""


class Night:
    """A run over a corpus; `run` does it, `summary` tells.

    Args:
        settings: what is asked for.
        ledger: of the output, claimed.
        lease: held for it.
        stop: when made, the run commits what is finished and ends.
        purify_units: does the work.
        tally: told of everything that happens.
    """

    def __init__(
        self,
        settings: NightSettings,
        ledger: Ledger,
        lease: Lease,
        stop: StopRequest,
        purify_units: PurifyUnits,
        tally: RunTally | None = None,
    ) -> None:
        self.settings, self.ledger, self.lease, self.stop = settings, ledger, lease, stop
        self.failed: dict[str, str] = {}
        """Why units could not be done, by output name."""
        self.refused: dict[str, str] = {}
        """Why shards could not be read, by URI."""
        self.removed = 0
        """Shards that are in the output no more, because they left the input."""
        self.tally = tally or RunTally()
        self.redone: list[tuple[Receipt, Receipt]] = []
        """Receipts of the units that a retry did again: before, and now."""
        self._purify_units = purify_units
        self._snapshot = ledger.snapshot()
        self.tally.corpus = lambda: total(self._snapshot.receipts())
        before = self._snapshot
        self.tally.changes = lambda: shard_changes(before, self._snapshot)
        # What a crash after the last commit left half done.
        self._published, finished = ledger.settle(self._snapshot, lease.check)
        self._agenda = Agenda(settings, ledger, self._snapshot, finished)
        self._entries: dict[str, ShardEntry] = dict(self._snapshot.shards)
        self._open: dict[str, ShardWork] = {}
        self._emptied: dict[str, ShardWork] = {}
        """Shards that had rows and have none now: their rows go at the end, as those of removed shards."""
        self._stale: Counter[str] = Counter(shard_of(name) for name in self._published)
        self._seen: set[str] = set()
        self._hidden: set[str] = set()
        """Shards whose new units are parked, until all of them are there."""
        self._tries: Counter[str] = Counter()
        self._rows_done = self._units_done = 0

    def run(self, source: list[Shard] | ImageFolder) -> None:
        """Purify what is new or changed, forget what is gone, and commit.

        Args:
            source: the corpus as it was listed.

        Raises:
            CorpusError: nothing of the corpus can be read.
            ResumableStop: it was asked to stop, or storage failed; what was published is committed.
            FailedError: the work itself cannot go on.
        """
        asked, agenda = self.settings, self._agenda
        if asked.retry is None:
            check_removed(self._snapshot.shards, source, asked.max_removed_share)
        found = agenda.found(source, lambda count: self.tally.shards(count, asked.limit))
        waiting = self._pending(agenda.limited(self._readable(found)))
        while wave := dict(islice(waiting, asked.wave_units)):
            self._wave(wave)
        self._seen |= agenda.passed
        if not self._seen and self.refused:
            reasons = list(self.refused.values())
            raise CorpusError("no shard can be read: " + "; ".join(reasons[:SHOWN]))
        if asked.retry is not None:
            self._finish_retry()
            return
        if self._emptied:
            check_removed(self._snapshot.shards, source, asked.max_removed_share, list(self._emptied))
        self._finish()
        if not any(entry.receipts for entry in self._entries.values()) and not self.failed:
            raise CorpusError("the input has no rows")

    def summary(self, elapsed_s: float) -> dict[str, Any]:
        """Return what there is now and what this run did.

        Args:
            elapsed_s: seconds of the run.
        """
        sums = total(self._snapshot.receipts())
        done = f"{self._rows_done} images in {self._units_done} units"
        nothing = "nothing to do, every unit was finished before"
        told: dict[str, Any] = {
            "images": sums["rows"],
            "statuses": sums["statuses"],
            "quarantined": sums["quarantined"],
            "this run": done if self._units_done else nothing,
            "images/s": round(self._rows_done / elapsed_s, 1) if self._rows_done else 0.0,
            "output": f"{self.ledger.output}/data",
        }
        extra: dict[str, Any] = {
            "refused shards": self.refused,
            "failed units": self.failed,
            "removed shards": self.removed,
        }
        if self.settings.retry is not None:
            told["retry"] = told_retry(self.settings.retry, self.redone)
            extra["changed shards left to the next run"] = self._agenda.left
        return told | {key: value for key, value in extra.items() if value}

    def _readable(self, found: Iterable[ShardWork | Refused]) -> Iterator[ShardWork]:
        for work in found:
            if self.stop.is_made:
                self._end_wave()
            if isinstance(work, Refused):
                self.tally.opened()
                self._refuse(work.uri, work.relative, work.reason)
            else:
                yield work

    def _pending(self, works: Iterable[ShardWork]) -> Iterator[tuple[str, Unit]]:
        """Open each shard and yield its units that are not finished, by output name."""
        for work in works:
            self.tally.opened()
            self._seen.add(work.relative)
            if not self._agenda.settle(work):
                continue
            before = self._entries.get(work.relative)
            if before is not None and before.receipts and not work.units:
                self._emptied[work.relative] = work
                continue
            self._open[work.relative] = work
            for name, unit in list(self._agenda.waiting(work, work.units)):
                # A shard that changed in an earlier wave has other units by now.
                if self._open.get(work.relative) is work:
                    yield name, unit

    def _wave(self, wave: dict[str, Unit]) -> None:
        logger.info("%d units of %d images", len(wave), sum(unit.num_rows for unit in wave.values()))
        idle = 0
        try:
            while wave and not self.stop.is_made:
                self.lease.check()
                before = len(wave), dict(self._tries)
                self._round(wave)
                idle = idle + 1 if before == (len(wave), dict(self._tries)) else 0
                if idle > MOST_IDLE_ROUNDS:
                    raise ResumableStop("no unit can begin: every node is leaving; the same command resumes")
                if idle:
                    time.sleep(IDLE_PAUSE_S)
        except (FailedError, ResumableStop) as error:
            self._commit_after(error)
            raise
        self._end_wave()

    def _end_wave(self) -> None:
        self._commit()
        self.stop.check()

    def _round(self, wave: dict[str, Unit]) -> None:
        """Run the units of a wave once; those that are done, or never will be, leave it."""
        parked = frozenset(self._parked(wave))
        self.tally.plan(sum(unit.num_rows for unit in wave.values()))
        self._hidden |= parked
        for table in self._purify_units(list(wave.values()), parked):
            for row in table.to_pylist():
                facts = UnitFacts.from_json(row[FACTS]) if FACTS in row else UnitFacts()
                if FAILED not in row:
                    self._done(wave, Receipt(**json.loads(row["receipt"])), parked, facts)
                    continue
                self.tally.spent(facts)
                if row[FAILED] == "storage":
                    # Every other unit would wait for the storage as long as this one has.
                    raise StorageError(f"{row[DETAIL]}; the same command goes on from here")
                self._not_done(wave, Unit.from_json(row[UNIT]), row[FAILED], row[DETAIL])

    def _parked(self, wave: Mapping[str, Unit]) -> Iterator[str]:
        """Yield the shards that have published files which their new units replace."""
        for relative in {unit.relative for unit in wave.values()}:
            own = sum(name in self._published for name in self._open[relative].names)
            if self._stale[relative] > own:
                yield relative

    def _done(
        self, wave: dict[str, Unit], receipt: Receipt, parked: frozenset[str], facts: UnitFacts
    ) -> None:
        relative = shard_of(receipt.name)
        if relative not in parked and receipt.name not in self._published:
            self._published.add(receipt.name)
            self._stale[relative] += 1
        unit = wave.pop(receipt.name, None)
        if unit is None:
            return  # its shard changed meanwhile
        receipt = replace(receipt, generation=unit.generation)
        self._open[relative].receipts[receipt.name] = receipt
        self._units_done += 1
        self._rows_done += receipt.rows
        if not facts.statuses:
            facts += UnitFacts(receipt.statuses, receipt.reasons)
        self.tally.done(receipt.name, facts)

    def _not_done(self, wave: dict[str, Unit], unit: Unit, kind: str, detail: str) -> None:
        name = unit.output_name(self.settings.fingerprint)
        # An answer of before a change says nothing about what waits under the same name now.
        if wave.get(name) != unit or kind == "deferred":
            return
        if kind == "changed":
            self._changed(wave, unit, detail)
        elif kind == "too_large":
            self._halve(wave, unit)
        elif kind == "vanished":
            self._drop(wave, unit.relative)
            self._refuse(unit.uri, unit.relative, "vanished: it is no longer there")
        elif kind == "unreadable":
            del wave[name]
            self._refuse(unit.uri, unit.relative, detail)
        else:
            self._tries[name] += 1
            logger.warning("unit %s failed: %s", name, detail)
            if kind == "given_up" or self._tries[name] >= MOST_TRIES:
                del wave[name]
                self.failed[name] = detail
                self.tally.fail(name, detail)
                self._keep_before(name, unit)
            else:
                self.tally.again()

    def _keep_before(self, name: str, unit: Unit) -> None:
        """Let a unit that a retry could not do again stand as it was."""
        if name in self._agenda.generations.replaced:
            before, receipt = self._agenda.generations.replaced[name]
            work = self._open[unit.relative]
            work.units[work.units.index(unit)] = before
            work.receipts[receipt.name] = receipt

    def _changed(self, wave: dict[str, Unit], unit: Unit, detail: str) -> None:
        """Plan a shard anew that is not what it was when it was listed."""
        self._drop(wave, unit.relative)
        self._tries[unit.uri] += 1
        logger.warning("%s", detail)
        if self._tries[unit.uri] > MOST_TRIES:
            self._refuse(unit.uri, unit.relative, "changing: it changes while it is read")
            return
        self.tally.again()
        try:
            source = list_corpus(unit.uri)
        except CorpusError:
            self._refuse(unit.uri, unit.relative, "vanished: it is no longer there")
            return
        assert not isinstance(source, ImageFolder)
        shard = replace(source[0], relative=unit.relative)
        work = inspect_shard(shard, self.settings.plan, self._snapshot, self.settings.fingerprint)
        if isinstance(work, Refused):
            self._refuse(work.uri, work.relative, work.reason)
        else:
            wave.update(self._pending([work]))

    def _halve(self, wave: dict[str, Unit], unit: Unit) -> None:
        """Put a unit's halves in its place; a later run that meets the whole unit again does the same."""
        del wave[unit.output_name(self.settings.fingerprint)]
        work = self._open[unit.relative]
        at = work.units.index(unit)
        work.units[at : at + 1] = map(self._agenda.generations.current, unit.halves())
        wave.update(self._agenda.waiting(work, work.units[at : at + 2]))

    def _drop(self, wave: dict[str, Unit], relative: str) -> None:
        for name in [name for name, unit in wave.items() if unit.relative == relative]:
            del wave[name]
        self._open.pop(relative, None)

    def _refuse(self, uri: str, relative: str, reason: str) -> None:
        logger.warning("shard %s is left out: %s", uri, reason)
        self.refused[uri] = reason
        self.tally.refuse(uri, reason)
        if relative in self._entries:
            # Its last good state stays: what was purified then is still the answer.
            self._seen.add(relative)

    def _commit(self) -> None:
        """Commit the shards that are complete now, and what there is of new ones."""
        refused = {**(self._snapshot.refused if self.settings.retry else {}), **self.refused}
        for relative, work in list(self._open.items()):
            if work.is_complete:
                self._entries[relative] = work.entry()
                self._note_redone(work)
                del self._open[relative]
            elif work.receipts and relative not in self._hidden:
                before = self._entries.get(relative)
                if before is None or not before.complete:
                    self._entries[relative] = work.entry()
        changed = self._entries != self._snapshot.shards or refused != self._snapshot.refused
        if not changed:
            return
        self.lease.check()
        number = self._snapshot.number + 1
        self._snapshot = Snapshot(number, dict(self._entries), refused)
        self.ledger.commit(self._snapshot, self.lease.check)
        for entry in self._entries.values():
            self._published.update(receipt.name for receipt in entry.receipts)

    def _note_redone(self, work: ShardWork) -> None:
        replaced = self._agenda.generations.replaced
        self.redone += [
            (replaced[name][1], receipt) for name, receipt in work.receipts.items() if name in replaced
        ]

    def _commit_after(self, error: Exception) -> None:
        try:
            self._commit()
        except (FailedError, ResumableStop) as again:
            logger.warning("%s; nor could the snapshot be written: %s", error, again)

    def _finish(self) -> None:
        gone = self._entries.keys() - self._seen
        self.removed = len(gone)
        for relative in gone:
            del self._entries[relative]
        self._entries |= {relative: work.entry() for relative, work in self._emptied.items()}
        if gone:
            logger.warning("%d shards left the input: their output goes too", len(gone))
        self._commit()
        self.lease.check()
        pending = {name for work in self._open.values() for name in work.names}
        self.ledger.sweep(self._snapshot, pending, self.lease.check)

    def _finish_retry(self) -> None:
        """Commit; what is new, changed or gone, and what may be left over of it, is for the next run."""
        self._commit()
        self.ledger.tidy(self._snapshot, self.lease.check)
        # Done or not, no run comes back to these names.
        self.ledger.forget_attempts(self._agenda.generations.replaced)
