"""Whether one published unit is what its receipt says, row for row."""

import hashlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from acsr_ray.columns import QUARANTINED, REASON, STATUS, STATUSES
from acsr_ray.corpus.ledger import DATA, QUARANTINE
from acsr_ray.corpus.snapshot import Receipt
from acsr_ray.storage import Storage


@dataclass(frozen=True)
class Problem:
    """Something that is not as it should be.

    Args:
        kind: a word for programs.
        name: the file or shard.
        detail: what is wrong, for people.
    """

    kind: str
    name: str
    detail: str

    def to_dict(self) -> dict[str, str]:
        """Return a JSON value."""
        return {"kind": self.kind, "name": self.name, "detail": self.detail}


def read_listed(storage: Storage, receipt: Receipt, image_column: str) -> pa.Table | Problem:
    """Read a listed file as a table, or say why it is none.

    Args:
        storage: of the output.
        receipt: of the unit.
        image_column: name of the image column.
    """
    name = f"{DATA}/{receipt.name}"
    try:
        data = storage.read(name)
    except FileNotFoundError:
        return Problem("missing", name, "the snapshot lists it and it is not there")
    found = hashlib.sha256(data).hexdigest()
    if receipt.digest and found != receipt.digest:
        detail = f"SHA-256 {found[:12]}, in the snapshot {receipt.digest[:12]}"
        return Problem("damaged", name, f"{detail}; remove the file, and the next run makes it again")
    try:
        table = pq.read_table(io.BytesIO(data))
    except (pa.ArrowException, OSError) as error:
        return Problem("damaged", name, f"not readable as Parquet: {error}")
    absent = [column for column in (STATUS, REASON, image_column) if column not in table.column_names]
    if absent:
        return Problem("damaged", name, f"it has no column {', '.join(absent)}")
    return table


def check_rows(table: pa.Table, receipt: Receipt, image_column: str) -> Iterator[Problem]:
    """Yield where a unit's rows do not agree with its receipt or with themselves."""
    name = f"{DATA}/{receipt.name}"
    if table.num_rows != receipt.rows:
        yield Problem("rows", name, f"{table.num_rows} rows, in the snapshot {receipt.rows}")
    statuses, reasons = table[STATUS].to_pylist(), table[REASON].to_pylist()
    why = [reason for reason, status in zip(reasons, statuses, strict=True) if status == QUARANTINED]
    for told, counted in (
        (dict(receipt.statuses), _counts(statuses)),
        (dict(receipt.reasons), _counts(why)),
    ):
        if told != counted:
            yield Problem("rows", name, f"it holds {counted}, in the snapshot {told}")
    unknown = {str(status) for status in statuses} - set(STATUSES)
    if unknown:
        yield Problem("rows", name, f"unknown status {', '.join(sorted(unknown))}")
    there = table[image_column].is_valid().to_pylist()
    wrong = [row for row, status in enumerate(statuses) if there[row] == (status == QUARANTINED)]
    if wrong:
        yield Problem(
            "quarantine", name, f"row {receipt.first + wrong[0]}: a row has an image unless it is quarantined"
        )


def check_quarantine(storage: Storage, table: pa.Table, receipt: Receipt, kept: bool) -> Iterator[Problem]:
    """Yield where the kept original bytes are not those of the rows without an image.

    Args:
        storage: of the output.
        table: rows of the unit.
        receipt: of the unit.
        kept: whether there is a file in `_acsr/quarantine/`.
    """
    name = f"{QUARANTINE}/{receipt.name}"
    pairs = zip(table[STATUS].to_pylist(), table[REASON].to_pylist(), strict=True)
    refused = [
        (receipt.first + row, reason) for row, (status, reason) in enumerate(pairs) if status == QUARANTINED
    ]
    if kept != bool(refused):
        told = f"{len(refused)} rows are quarantined and their original bytes are not kept"
        yield Problem("quarantine", name, told if refused else "no row of the unit is quarantined")
        return
    if not kept:
        return
    try:
        data = storage.read(name)
        rows = pq.read_table(io.BytesIO(data), columns=["row", "reason"]).to_pylist()
    except (FileNotFoundError, pa.ArrowException, OSError) as error:
        yield Problem("quarantine", name, f"not readable: {error}")
        return
    digest = hashlib.sha256(data).hexdigest()
    if receipt.kept_digest and digest != receipt.kept_digest:
        told = f"SHA-256 {digest[:12]}, in the snapshot {receipt.kept_digest[:12]}"
        yield Problem("quarantine", name, f"{told}: the original bytes are not those that were kept")
        return
    found = [(row.get("row"), row.get("reason")) for row in rows]
    if found != refused:
        yield Problem("quarantine", name, f"it keeps {found[:3]}, quarantined are {refused[:3]}")


def _counts(values: Sequence[str]) -> dict[str, int]:
    return {value: values.count(value) for value in dict.fromkeys(values)}
