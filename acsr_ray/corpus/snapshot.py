"""The snapshot of an output: which files belong to it, what each holds, and which input they came from.

Snapshots are numbered and created, never replaced, so a run that was taken over cannot undo what its
successor wrote. They also spare a nightly run the reading of footers: a shard of the same version has the
same units.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from acsr_ray.corpus.sources import CorpusError

VERSION = 4
READABLE = (2, 3, VERSION)
"""2 is of before retries: its receipts have no generation. Those of 3 do not know the kept bytes."""


@dataclass(frozen=True)
class Receipt:
    """What one published unit holds: rows, rows per status, and rows per quarantine reason."""

    name: str
    rows: int
    statuses: Mapping[str, int]
    reasons: Mapping[str, int]
    first: int = 0
    """First row of the unit in its shard."""
    digest: str = ""
    """SHA-256 of the file."""
    generation: int = 0
    """Number of the retry that made it; 0: the first try."""
    kept_digest: str = ""
    """SHA-256 of the file with the original bytes of its quarantined rows; "" where none was written, or
    nobody noted it."""


@dataclass(frozen=True)
class ShardEntry:
    """One input shard, or the image folder, and the units that were published of it."""

    uri: str
    version: str
    """Fast key of the input: size and etag or time; "" where it says nothing."""
    content: str
    """Digest of the input's bytes; "" for image folders, whose units have their own."""
    receipts: tuple[Receipt, ...]
    fingerprint: str
    """Of the settings that made them, shortened."""
    complete: bool = True
    """Whether these are all units of the shard."""


@dataclass(frozen=True)
class Snapshot:
    """State of an output after a wave or a run.

    `shards` by relative path; `refused` holds the reason of every input shard that could not be read, by URI.
    """

    number: int = 0
    shards: Mapping[str, ShardEntry] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)

    def receipts(self) -> Iterator[Receipt]:
        """Yield the receipt of every file that belongs to the output."""
        for entry in self.shards.values():
            yield from entry.receipts

    def names(self) -> set[str]:
        """Return the names of all files that belong to the output, below `data/`."""
        return {receipt.name for receipt in self.receipts()}

    def to_json(self) -> bytes:
        """Serialise; the fields of a receipt as a list, since there may be millions."""
        shards = {
            relative: {
                "uri": entry.uri,
                "version": entry.version,
                "content": entry.content,
                "fingerprint": entry.fingerprint,
                "complete": entry.complete,
                "units": [list(asdict(receipt).values()) for receipt in entry.receipts],
            }
            for relative, entry in self.shards.items()
        }
        content = {
            "schema_version": VERSION,
            "number": self.number,
            "unit_fields": list(Receipt.__dataclass_fields__),
            "refused": dict(self.refused),
            "shards": shards,
        }
        return json.dumps(content, separators=(",", ":")).encode()

    @classmethod
    def from_json(cls, data: bytes, name: str) -> "Snapshot":
        """Restore from `to_json`.

        Raises:
            CorpusError: it is of a later release.
        """
        content = json.loads(data)
        if content.get("schema_version") not in READABLE:
            raise CorpusError(
                f"{name} has schema version {content.get('schema_version')}, expected at most {VERSION}"
            )
        fields = content["unit_fields"]
        shards = {
            relative: ShardEntry(
                entry["uri"],
                entry["version"],
                entry["content"],
                tuple(Receipt(**dict(zip(fields, unit, strict=True))) for unit in entry["units"]),
                entry["fingerprint"],
                entry["complete"],
            )
            for relative, entry in content["shards"].items()
        }
        return cls(content["number"], shards, content["refused"])


def total(receipts: Iterable[Receipt]) -> dict[str, Any]:
    """Return the sums over receipts: rows, rows per status, quarantined rows per reason."""
    rows, statuses, reasons = 0, dict[str, int](), dict[str, int]()
    for receipt in receipts:
        rows += receipt.rows
        for counts, sums in ((receipt.statuses, statuses), (receipt.reasons, reasons)):
            for key, count in counts.items():
                sums[key] = sums.get(key, 0) + count
    return {"rows": rows, "statuses": statuses, "quarantined": reasons}
