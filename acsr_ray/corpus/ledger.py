"""The output folder of a purification: what is finished, how a unit becomes visible, what belongs together.

`data/` holds the purified shards, `_acsr/` everything else: `run.json` (the settings that decide pixels,
written first), `receipts/`, `quarantine/` (original bytes of refused images), `staging/`, `ready/` (finished
units that replace published ones), `runs/` (a report per run) and `manifest.json` (the snapshot, written
last). A unit appears in `data/` by a hard link that refuses to replace, so it is either absent or complete,
and of two attempts the first wins.
"""

import json
import os
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from acsr_ray.artifacts import atomic_write, write_json
from acsr_ray.columns import QUARANTINED, REASON, STATUS
from acsr_ray.corpus.sources import CorpusError

RECEIPT_KEY = b"acsr_receipt"
MANIFEST_VERSION = 1


@dataclass(frozen=True)
class Receipt:
    """What one published unit holds: rows, rows per status, and rows per quarantine reason."""

    name: str
    rows: int
    statuses: Mapping[str, int]
    reasons: Mapping[str, int]


class Ledger:
    """The bookkeeping of one output folder.

    Args:
        output: local or shared-disk folder.
    """

    def __init__(self, output: str) -> None:
        self.output = Path(output)
        self.data = self.output / "data"
        self.private = self.output / "_acsr"
        self.ready = self.private / "ready"

    def check(self, settings: Mapping[str, Any]) -> None:
        """Refuse an output that was begun with other settings, or is not ours; writes nothing.

        Raises:
            CorpusError: naming the settings that differ.
        """
        path = self.private / "run.json"
        if path.exists():
            before = json.loads(path.read_text())
            keys = sorted(before.keys() | settings.keys())
            changed = [key for key in keys if before.get(key) != settings.get(key)]
            if changed:
                lines = [f"\n  {k}: {before.get(k)!r} -> {settings.get(k)!r}" for k in changed]
                raise CorpusError(
                    f"output {self.output} was made with other settings; use another --output:"
                    + "".join(lines)
                )
            return
        if self.data.exists() and any(self.data.iterdir()):
            raise CorpusError(f"{self.data} holds files that no purification here wrote")

    def claim(self, settings: Mapping[str, Any]) -> None:
        """Bind the output to the settings that decide its content, after `check`."""
        self.check(settings)
        write_json(self.private / "run.json", settings)

    def report(self, summary: Mapping[str, Any]) -> None:
        """Keep a run's closing summary under `runs/`."""
        write_json(self.private / "runs" / f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}.json", summary)

    def published(self) -> set[str]:
        """Return the names of the published units, relative to `data/`."""
        return _names(self.data)

    def finished(self) -> set[str]:
        """Return the names of the units that need not be done again: published, or parked until commit."""
        return _names(self.data) | _names(self.ready)

    def publish(
        self, name: str, table: pa.Table, quarantine: pa.Table | None, *, parked: bool = False
    ) -> Receipt:
        """Write a unit's output and make it visible at once; an earlier attempt's output and receipt stay.

        Args:
            name: path below `data/`.
            table: the rows, in input order.
            quarantine: original bytes of the rows that were refused.
            parked: keep it out of `data/` until `commit`, because it replaces files that readers still see.
        """
        receipt = Receipt(
            name, table.num_rows, _counts(table, STATUS), _counts(table.filter(_refused(table)), REASON)
        )
        metadata = {**(table.schema.metadata or {}), RECEIPT_KEY: json.dumps(asdict(receipt))}
        staged = self._stage(table.replace_schema_metadata(metadata))
        if quarantine is not None and quarantine.num_rows:
            _link(self._stage(quarantine), self.private / "quarantine" / name)
        if not _link(staged, (self.ready if parked else self.data) / name):
            return self.receipt(name)
        self._write_receipt(receipt)
        return receipt

    def receipt(self, name: str) -> Receipt:
        """Return a published unit's receipt, rebuilt from its footer if a crash lost the file."""
        path = self._receipt_path(name)
        if path.exists():
            return Receipt(**json.loads(path.read_text()))
        parked = self.ready / name
        metadata = pq.read_schema(parked if parked.exists() else self.data / name).metadata or {}
        if RECEIPT_KEY not in metadata:
            raise CorpusError(f"{self.data / name} was not written by a purification")
        receipt = Receipt(**json.loads(metadata[RECEIPT_KEY]))
        self._write_receipt(receipt)
        return receipt

    def known_shards(self) -> dict[str, tuple[str, str]]:
        """Return (version, content digest) by URI of the shards in the last snapshot."""
        path = self.private / "manifest.json"
        if not path.exists():
            return {}
        shards: dict[str, list[str]] = json.loads(path.read_text())["shards"]
        return {uri: (version, content) for uri, (version, content) in shards.items()}

    def commit(
        self,
        receipts: Sequence[Receipt],
        shards: Mapping[str, tuple[str, str]] = MappingProxyType({}),
    ) -> None:
        """Write the snapshot of a finished run and remove what it no longer lists.

        Args:
            receipts: every unit that belongs to the output now.
            shards: (version, content digest) of the input's shards by URI.
        """
        files = {receipt.name: {"rows": receipt.rows, **receipt.statuses} for receipt in receipts}
        write_json(
            self.private / "manifest.json",
            {"schema_version": MANIFEST_VERSION, "files": files, "shards": dict(shards)},
        )
        for name in self.finished() - files.keys():
            (self.private / "quarantine" / name).unlink(missing_ok=True)
            (self.data / name).unlink(missing_ok=True)
            (self.ready / name).unlink(missing_ok=True)
            self._receipt_path(name).unlink(missing_ok=True)
        for name in _names(self.ready):
            _link(self.ready / name, self.data / name)
        self.sweep()

    def sweep(self) -> None:
        """Remove what interrupted attempts left in staging."""
        for path in (self.private / "staging").glob("*"):
            path.unlink(missing_ok=True)

    def _stage(self, table: pa.Table) -> Path:
        path = self.private / "staging" / f"{uuid.uuid4().hex}.tmp"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, path)
        with path.open("rb") as file:
            os.fsync(file.fileno())
        if pq.read_metadata(path).num_rows != table.num_rows:
            raise OSError(f"{path} does not hold the {table.num_rows} rows written to it")
        return path

    def _receipt_path(self, name: str) -> Path:
        return self.private / "receipts" / f"{name.removesuffix('.parquet')}.json"

    def _write_receipt(self, receipt: Receipt) -> None:
        atomic_write(self._receipt_path(receipt.name), json.dumps(asdict(receipt)).encode())


def total(receipts: Iterable[Receipt]) -> dict[str, Any]:
    """Return the sums over receipts: rows, rows per status, quarantined rows per reason."""
    rows, statuses, reasons = 0, dict[str, int](), dict[str, int]()
    for receipt in receipts:
        rows += receipt.rows
        for counts, sums in ((receipt.statuses, statuses), (receipt.reasons, reasons)):
            for key, count in counts.items():
                sums[key] = sums.get(key, 0) + count
    return {"rows": rows, "statuses": statuses, "quarantined": reasons}


def _names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*.parquet")}


def _refused(table: pa.Table) -> pa.Array:
    return pa.array([status == QUARANTINED for status in table[STATUS].to_pylist()], pa.bool_())


def _counts(table: pa.Table, column: str) -> dict[str, int]:
    counts = table[column].value_counts().to_pylist()
    return {entry["values"]: entry["counts"] for entry in counts if entry["values"] is not None}


def _link(staged: Path, target: Path) -> bool:
    """Make a staged file visible under its final name; False when a file is already there."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(staged, target)
    except FileExistsError:
        return False
    finally:
        staged.unlink()
    return True
