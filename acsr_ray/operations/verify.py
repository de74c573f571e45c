"""Check an output against its snapshot, its digests and, if asked, its input; sweep what belongs to none."""

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any, ClassVar, TypeVar

from pydantic import Field

from acsr_ray.artifacts import json_digest
from acsr_ray.columns import IMAGE
from acsr_ray.config import ResumableStop
from acsr_ray.corpus.binding import CUT_BY
from acsr_ray.corpus.lease import Lease, look
from acsr_ray.corpus.ledger import DATA, QUARANTINE, READY, Ledger
from acsr_ray.corpus.snapshot import Receipt, ShardEntry, Snapshot, total
from acsr_ray.corpus.sources import CorpusError, absolute_uri
from acsr_ray.filesystems import StoreSettings, over_stores
from acsr_ray.operations.input_check import InputIndex, check_columns, check_coverage
from acsr_ray.operations.unit_check import Problem, check_quarantine, check_rows, read_listed
from acsr_ray.storage import DiskStorage

logger = logging.getLogger(__name__)

MOST_TOLD = 1000
SHOWN = 50

ItemT = TypeVar("ItemT")


class VerifySettings(StoreSettings):
    """Check an output: digests, rows, coverage, snapshot against storage, quarantine; exit 1 with a list."""

    sections: ClassVar[tuple[str, ...]] = ("purify_corpus",)
    borrows: ClassVar[bool] = True

    output: str | None = None
    """Folder or URI of a purification."""
    input: str | None = None
    """Also compare with this input, row for row in all columns but the image; reads all of it."""
    repair: bool = False
    """First remove what no snapshot lists, as a run does at its end; the next makes it again if need be."""
    threads: int = Field(8, ge=1)
    """Files read at the same time; bounds memory, together with the size of a unit."""

    def render(self, summary: Mapping[str, Any]) -> str:
        """Return the verdict, and the first problems."""
        counts = f"{summary['images']} images in {summary['files']} files, {summary['megabytes']} MiB"
        lines = [f"verified {summary['output']}: {counts}, snapshot {summary['snapshot']}"]
        lines += [f"  removed   {name}" for name in summary["removed"][:SHOWN]]
        lines += [f"  note      {note}" for note in summary["notes"]]
        for problem in summary["problems"][:SHOWN]:
            lines.append(f"  {problem['kind']:9} {problem['name']}: {problem['detail']}")
        if len(summary["problems"]) > SHOWN:
            lines.append(f"  and more: {summary['problem_counts']}; --json has them")
        return "\n".join([*lines, "clean" if summary["clean"] else "not clean"])


@over_stores
def verify_output(settings: VerifySettings) -> dict[str, Any]:
    """Verify an output and return what was found; `exit_code` is 1 and `error` set where something is wrong.

    Raises:
        CorpusError: no purification is there, or another run holds what is to be repaired.
        ResumableStop: a run committed meanwhile, so that there is nothing whole to compare.
    """
    if settings.output is None:
        raise CorpusError("--output is needed: the folder or URI of a purification")
    ledger = Ledger(absolute_uri(settings.output))
    bound = ledger.binding.settings()
    if bound is None:
        raise CorpusError(f"no purification at {ledger.output}: it has no _acsr/run.json")
    removed = repair_output(ledger) if settings.repair else []
    snapshot = ledger.snapshot()
    check = Verification(ledger, snapshot, bound, settings.input, settings.threads)
    counts, problems = Counter[str](), list[dict[str, str]]()
    for problem in check.problems():
        counts[problem.kind] += 1
        if len(problems) < MOST_TOLD:
            problems.append(problem.to_dict())
    if ledger.snapshot().number != snapshot.number:
        raise ResumableStop("a run committed another snapshot meanwhile; verify again")
    sums = total(snapshot.receipts())
    told: dict[str, Any] = {
        "output": ledger.output,
        "snapshot": snapshot.number,
        "clean": not counts,
        "images": sums["rows"],
        "files": len(snapshot.names()),
        "megabytes": round(check.num_bytes / 2**20, 1),
        "statuses": sums["statuses"],
        "quarantined": sums["quarantined"],
        "removed": removed,
        "notes": check.notes,
        "problem_counts": dict(counts),
        "problems": problems,
    }
    if counts:
        listed = ", ".join(f"{count} {kind}" for kind, count in counts.items())
        told |= {"error": f"{ledger.output} is not as it should be: {listed}", "exit_code": 1}
    return told


def repair_output(ledger: Ledger) -> list[str]:
    """End what a commit left half done, remove units that no snapshot lists, and return their names.

    Raises:
        LeaseError: a run holds the output.
    """
    with Lease(ledger.storage) as lease:
        snapshot, before = ledger.snapshot(), _units_of(ledger)
        ledger.settle(snapshot, lease.check)
        ledger.sweep(snapshot, still_ours=lease.check)
        return sorted(before - _units_of(ledger))


def _units_of(ledger: Ledger) -> set[str]:
    """Return the names of all units that there is any file of."""
    return ledger.finished() | set(ledger.storage.names(QUARANTINE))


class Verification:
    """One check of an output; `problems` does it.

    Args:
        ledger: of the output.
        snapshot: the current one.
        bound: settings of the output.
        source: input to compare with, if any.
        threads: files at the same time.
    """

    def __init__(
        self, ledger: Ledger, snapshot: Snapshot, bound: Mapping[str, Any], source: str | None, threads: int
    ) -> None:
        self.num_bytes = 0
        self.notes: list[str] = []
        self._ledger, self._snapshot, self._threads = ledger, snapshot, threads
        self._image_column = str(bound.get("image_column", IMAGE))
        deciding = {key: value for key, value in bound.items() if key not in CUT_BY}
        named_by = ledger.binding.naming(json_digest(deciding))
        self._index = None if source is None else InputIndex(absolute_uri(source), bound, snapshot, named_by)
        self._kept = ledger.storage.names(QUARANTINE)

    def problems(self) -> Iterator[Problem]:
        """Yield what is wrong, as it is found."""
        yield from self._stored()
        for relative, entry in self._snapshot.shards.items():
            yield from check_coverage(relative, entry)
        if self._index is not None:
            yield from self._index.check()
        units = (
            (relative, entry, receipt)
            for relative, entry in self._snapshot.shards.items()
            for receipt in entry.receipts
        )
        for found in _in_threads(self._unit, units, self._threads):
            yield from found

    def _stored(self) -> Iterator[Problem]:
        """Yield files that are there and belong to nothing."""
        storage, listed = self._ledger.storage, self._snapshot.names()
        there, ready = storage.names(DATA), storage.names(READY)
        self.num_bytes = sum(size for name, size in there.items() if name in listed)
        extra = [Problem("orphan", f"{DATA}/{name}", _WHY_ORPHAN) for name in sorted(there.keys() - listed)]
        for name in sorted(ready):
            why = "a commit that did not end; the next run shows it" if name in listed else _WHY_LEFT
            extra.append(Problem("leftover", f"{READY}/{name}", why))
        for name in sorted(self._kept.keys() - listed):
            extra.append(Problem("leftover", f"{QUARANTINE}/{name}", _WHY_LEFT))
        for name in sorted(storage.names(DiskStorage.STAGING)):
            extra.append(Problem("leftover", f"{DiskStorage.STAGING}/{name}", _WHY_LEFT))
        lease = look(storage)
        if lease is not None and lease.lives:
            # What a run has published since its last commit is not listed yet.
            self.notes.append(f"a run is under way; {len(extra)} files that are not listed may be its own")
            return
        yield from extra

    def _unit(self, item: tuple[str, ShardEntry, Receipt]) -> list[Problem]:
        relative, entry, receipt = item
        storage, image = self._ledger.storage, self._image_column
        table = read_listed(storage, receipt, image)
        if isinstance(table, Problem):
            return [table]
        found = [*check_rows(table, receipt, image)]
        found += check_quarantine(storage, table, receipt, receipt.name in self._kept)
        unit = None if self._index is None else self._index.unit(relative, entry, receipt)
        if unit is not None:
            found += check_columns(unit, table, image)
        return found


_WHY_ORPHAN = "no snapshot lists it: of a run that did not end, and the next goes on with it, or of no run"
_WHY_LEFT = "no snapshot lists it: of a run that did not end; the next one, or --repair, removes it"


def _in_threads(
    work: Callable[[ItemT], list[Problem]], items: Iterable[ItemT], threads: int
) -> Iterator[list[Problem]]:
    """Yield results in order, no further ahead than twice the threads: results and items may be very many."""
    waiting = iter(items)
    with ThreadPoolExecutor(threads) as pool:
        running = [pool.submit(work, item) for item in islice(waiting, 2 * threads)]
        while running:
            yield running.pop(0).result()
            running += [pool.submit(work, item) for item in islice(waiting, 1)]
