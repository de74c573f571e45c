"""The output folder of a purification: what is finished, how a unit becomes visible, what belongs together.

`data/` holds the purified shards, `_acsr/` everything else: `run.json` (the settings that decide pixels,
written first), `bundle.json`, `lease/` (who writes), `quarantine/` (original bytes of refused images),
`staging/`, `ready/` (finished units that replace published ones), `attempts/` (units that brought a worker
down), `runs/` (a record per run) and `snapshots/` (the highest number is the current one). A unit appears in
`data/` by an operation that refuses to replace, so it is either absent or complete, and of two attempts the
first wins. Its receipt lies in the file's own footer, so nothing else has to be written with it. Of an output
that is a Delta table, `_delta_log/` beside `data/` lists the same files.
"""

import hashlib
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import asdict, replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from acsr_ray.columns import OUTCOME, QUARANTINED, REASON, STATUS
from acsr_ray.config import ResumableStop
from acsr_ray.corpus.binding import Binding, read_json, write_json
from acsr_ray.corpus.delta import DeltaLog, find_delta
from acsr_ray.corpus.lease import holds
from acsr_ray.corpus.snapshot import Receipt, Snapshot
from acsr_ray.corpus.sources import CorpusError
from acsr_ray.storage import open_storage

RECEIPT_KEY = b"acsr_receipt"
DATA, READY, QUARANTINE, SNAPSHOTS, ATTEMPTS = (
    "data",
    "_acsr/ready",
    "_acsr/quarantine",
    "_acsr/snapshots",
    "_acsr/attempts",
)
KEPT_SNAPSHOTS = 3

Check = Callable[[], None]


def _always() -> None:
    """Hold the output: for who writes it without a lease."""


class LateAttemptError(ResumableStop):
    """An attempt of a run that no longer holds the output; what it made stays invisible."""


class Ledger:
    """The bookkeeping of one output.

    Args:
        output: absolute path of a disk that all nodes share, or URI of an object store.

    Raises:
        StorageLocationError: the URI of a store that cannot be written safely.
    """

    def __init__(self, output: str) -> None:
        self.storage = open_storage(output)
        self.output = self.storage.root
        self.binding = Binding(self.storage)
        self.delta: DeltaLog | None = None
        """Log of the output as a Delta table, once `settle` has looked whether it is one."""

    def check(
        self,
        settings: Mapping[str, Any],
        bundle: Mapping[str, Any] | None = None,
        *,
        anew: bool = False,
    ) -> None:
        """Refuse an output that was begun with other settings, or is not ours; see `Binding.check`."""
        self.binding.check(settings, bundle, anew=anew)

    def claim(self, settings: Mapping[str, Any], bundle: Mapping[str, Any] | None = None) -> None:
        """Bind the output to the settings that decide its content; whoever calls has checked them."""
        self.binding.claim(settings, bundle)

    def published(self) -> set[str]:
        """Return the names of the published units, relative to `data/`."""
        return _parquet(self.storage.names(DATA))

    def finished(self) -> set[str]:
        """Return the names of the units that need not be done again: published, or parked until commit."""
        return self.published() | _parquet(self.storage.names(READY))

    def publish(
        self,
        name: str,
        table: pa.Table,
        quarantine: pa.Table | None,
        *,
        parked: bool = False,
        first: int = 0,
        lease: int = 0,
    ) -> Receipt:
        """Write a unit's output and make it visible at once; an earlier attempt's output stays.

        Args:
            name: path below `data/`.
            table: the rows, in input order.
            quarantine: original bytes of the rows that were refused.
            parked: keep it out of `data/` until `commit`, because it replaces files that readers still see.
            first: first row of the unit in its shard.
            lease: number of the run's lease; 0 publishes without one.

        Raises:
            LateAttemptError: another run holds the output.
        """
        kept = _to_parquet(quarantine) if quarantine is not None and quarantine.num_rows else b""
        receipt = Receipt(name, table.num_rows, *counts(table), first, kept_digest=_digest(kept))
        data = _with_receipt(table, receipt)
        if lease and not holds(self.storage, lease):
            raise LateAttemptError(f"{self.output} is held by another run; {name} is not published")
        if kept and not self.storage.create(f"{QUARANTINE}/{name}", kept):
            # An earlier attempt's stays, which need not be the same file.
            there = _digest(self.storage.read(f"{QUARANTINE}/{name}"))
            if there != receipt.kept_digest:
                receipt = replace(receipt, kept_digest=there)
                data = _with_receipt(table, receipt)
        if not self.storage.create(f"{READY if parked else DATA}/{name}", data):
            return self.receipt(name)
        return replace(receipt, digest=_digest(data))

    def receipt(self, name: str) -> Receipt:
        """Return a finished unit's receipt, from its file.

        Raises:
            CorpusError: it is no file of a purification.
        """
        data = self._finished_file(name)
        try:
            metadata = pq.read_schema(io.BytesIO(data)).metadata or {}
        except pa.ArrowException as error:
            raise CorpusError(f"{self.output}/{DATA}/{name} is damaged: {error}") from error
        if RECEIPT_KEY not in metadata:
            raise CorpusError(f"{self.output}/{DATA}/{name} was not written by a purification")
        fields = json.loads(metadata[RECEIPT_KEY])
        return replace(Receipt(**fields), digest=_digest(data))

    def outcome(self, name: str) -> pa.Table:
        """Return the outcome columns of a finished unit."""
        return pq.read_table(io.BytesIO(self._finished_file(name)), columns=OUTCOME.names)

    def _finished_file(self, name: str) -> bytes:
        try:
            return self.storage.read(f"{DATA}/{name}")
        except FileNotFoundError:
            return self.storage.read(f"{READY}/{name}")

    def snapshot(self) -> Snapshot:
        """Return the current snapshot, an empty one where there is none."""
        numbers = self._snapshots()
        if not numbers:
            return Snapshot()
        name = _snapshot_file(numbers[-1])
        return Snapshot.from_json(self.storage.read(name), f"{self.output}/{name}")

    def commit(self, snapshot: Snapshot, still_ours: Check = _always) -> None:
        """Make a snapshot the current one, then show what it lists and remove what it replaces.

        A crash in between leaves the snapshot as it is; the next commit, of this or another run, ends it.

        Args:
            snapshot: numbered one above the current one.
            still_ours: raises if another run holds the output by now; asked before anything is removed.

        Raises:
            CorpusError: another run has committed meanwhile.
        """
        data, file = snapshot.to_json(), _snapshot_file(snapshot.number)
        if not self.storage.create(file, data) and self.storage.read(file) != data:
            raise CorpusError(f"another run committed snapshot {snapshot.number} of {self.output}")
        self.settle(snapshot, still_ours)
        for number in self._snapshots()[:-KEPT_SNAPSHOTS]:
            self.storage.remove(_snapshot_file(number))

    def settle(self, snapshot: Snapshot, still_ours: Check = _always) -> tuple[set[str], set[str]]:
        """Make `data/` agree with a committed snapshot, for the shards that are complete in it.

        Of an output that is a Delta table the log follows, whoever commits.

        Returns:
            What `published` and `finished` would return now: to list 10^5 units takes 100 requests.

        Raises:
            MissingExtraError: it is one, and `deltalake` is not installed.
        """
        listed = snapshot.names()
        complete = {relative for relative, entry in snapshot.shards.items() if entry.complete}
        shown, parked = self.storage.names(DATA), self.storage.names(READY)
        replaced = [n for n in sorted(_parquet(shown) - listed) if shard_of(n) in complete]
        waiting = [n for n in sorted(_parquet(parked) & listed) if shard_of(n) in complete]
        self.delta = self.delta or find_delta(self.storage)
        still_ours()
        if self.delta is None:
            self._discard_all(replaced)
            self._show(waiting)
        else:
            # The other way round: a file that the log's last version lists is there until the next one is.
            self._show(waiting)
            sizes = {**parked, **shown}
            self.delta.follow(snapshot, listed & {*shown, *waiting}, sizes)
            self._discard_all(replaced)
        published = (_parquet(shown) | set(waiting)) - set(replaced)
        return published, (published | _parquet(parked)) - set(replaced)

    def _show(self, names: Iterable[str]) -> None:
        for name in names:
            self.storage.move(f"{READY}/{name}", f"{DATA}/{name}")

    def _discard_all(self, names: Iterable[str]) -> None:
        for name in names:
            self.discard(name)

    def discard(self, name: str) -> None:
        """Remove a unit and what was kept of it."""
        self.storage.remove(f"{DATA}/{name}")
        self.storage.remove(f"{READY}/{name}")
        self.storage.remove(f"{QUARANTINE}/{name}")

    def sweep(
        self, snapshot: Snapshot, pending: Set[str] = frozenset(), still_ours: Check = _always
    ) -> list[str]:
        """Remove whatever is neither listed nor to be finished, and return the names of those units.

        Args:
            snapshot: the current one.
            pending: names of units that a later run will finish.
            still_ours: as for `commit`.
        """
        wanted = snapshot.names() | pending
        orphans = sorted((self.finished() | _parquet(self.storage.names(QUARANTINE))) - wanted)
        still_ours()
        for name in orphans:
            self.discard(name)
        open_records = {_attempt_file(name) for name in pending}
        for file in self.storage.names(ATTEMPTS):
            if f"{ATTEMPTS}/{file}" not in open_records:
                self.storage.remove(f"{ATTEMPTS}/{file}")
        self.storage.sweep()
        return orphans

    def tidy(self, snapshot: Snapshot, still_ours: Check = _always) -> None:
        """Remove what no later run can go on with: half-written files, and kept bytes of units that are not.

        Args:
            snapshot: the current one.
            still_ours: as for `commit`.
        """
        alone = set(self.storage.names(QUARANTINE)) - snapshot.names() - self.finished()
        still_ours()
        for name in sorted(alone):
            self.discard(name)
        self.storage.sweep()

    def attempts(self) -> Iterator[dict[str, Any]]:
        """Yield the records of units that brought workers down in this run or an earlier one."""
        for name in self.storage.names(ATTEMPTS):
            record = read_json(self.storage, f"{ATTEMPTS}/{name}")
            if record is not None:
                yield record

    def forget_attempts(self, units: Iterable[str]) -> None:
        """Remove the records of units that are done."""
        kept = self.storage.names(ATTEMPTS)
        for file in {_attempt_file(unit) for unit in units}:
            if file.removeprefix(f"{ATTEMPTS}/") in kept:
                self.storage.remove(file)

    def write_attempt(self, unit: str, record: Mapping[str, Any]) -> None:
        """Keep the record of a unit that brought a worker down."""
        write_json(self.storage, _attempt_file(unit), record)

    def _snapshots(self) -> Sequence[int]:
        # Other programs leave files of their own in folders.
        found = (re.fullmatch(r"(\d{8})\.json", name) for name in self.storage.names(SNAPSHOTS))
        return sorted(int(match[1]) for match in found if match)


def shard_of(name: str) -> str:
    """Return the relative path of the shard that a unit's output name belongs to."""
    return name.rsplit(".rows-", 1)[0]


def _attempt_file(unit: str) -> str:
    return f"{ATTEMPTS}/{hashlib.sha256(unit.encode()).hexdigest()[:16]}.json"


def _snapshot_file(number: int) -> str:
    return f"{SNAPSHOTS}/{number:08d}.json"


def _parquet(names: Mapping[str, int]) -> set[str]:
    return {name for name in names if name.endswith(".parquet")}


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest() if data else ""


def _with_receipt(table: pa.Table, receipt: Receipt) -> bytes:
    metadata = {**(table.schema.metadata or {}), RECEIPT_KEY: json.dumps(asdict(receipt))}
    return _to_parquet(table.replace_schema_metadata(metadata))


def _to_parquet(table: pa.Table) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    data = buffer.getvalue()
    written = pq.read_metadata(io.BytesIO(data))
    if (written.num_rows, written.schema.to_arrow_schema().names) != (table.num_rows, table.schema.names):
        raise OSError(f"a file of {written.num_rows} rows was written of a table of {table.num_rows}")
    return data


def _refused(table: pa.Table) -> pa.Array:
    return pa.array([status == QUARANTINED for status in table[STATUS].to_pylist()], pa.bool_())


def counts(table: pa.Table) -> tuple[dict[str, int], dict[str, int]]:
    """Return what a receipt counts: rows per status, and quarantined rows per reason."""
    return _counts(table, STATUS), _counts(table.filter(_refused(table)), REASON)


def _counts(table: pa.Table, column: str) -> dict[str, int]:
    counts = table[column].value_counts().to_pylist()
    return {entry["values"]: entry["counts"] for entry in counts if entry["values"] is not None}
