"""Failures inside a stage: which rows are to blame, and how a unit that failed travels on.

A stage that raises on a table is tried on halves of it, down to the rows that raise alone; those are
quarantined and the rest is done. Does it raise on a harmless image too, the stage is to blame, not the rows,
and the unit fails as a whole: its table is then one row that says why, which later stages pass on.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import pyarrow as pa
import torch

from acsr_ray.columns import (
    DETAIL,
    FAILED,
    HEIGHT,
    PIXELS,
    PURIFIED,
    QUARANTINED,
    REASON,
    STATUS,
    UNIT,
    WIDTH,
)
from acsr_ray.config import FailedError

logger = logging.getLogger(__name__)

FailureKind = Literal[
    "deferred", "changed", "vanished", "unreadable", "too_large", "stage", "storage", "given_up"
]

PROBE_SIDE = 32

WORK_ERRORS = (RuntimeError, MemoryError, ValueError, ArithmeticError)
"""What torch and numpy raise over an image: lack of memory, odd shapes, values out of range."""

Apply = Callable[[pa.Table], pa.Table]


class StageError(FailedError):
    """A stage that fails on harmless images too."""


def failed_unit(unit: str, kind: FailureKind, detail: str) -> pa.Table:
    """Return the table that stands for a failed unit.

    Args:
        unit: the unit as JSON.
        kind: what the driver is to do about it.
        detail: for people.
    """
    return pa.table({UNIT: [unit], FAILED: [kind], DETAIL: [detail]})


def apply_by_halves(apply: Apply, table: pa.Table) -> pa.Table:
    """Apply row-wise stages to a table, quarantining the rows that they fail on.

    Args:
        apply: the stages; must give every row the same whatever its neighbours are.
        table: with PIXELS, HEIGHT, WIDTH, STATUS, REASON.

    Raises:
        StageError: the stages fail on a harmless image.
    """
    done, error = _attempt(apply, table)
    if done is not None:
        return done
    # Only now: while an exception is handled, its traceback keeps the frames that failed, and with them the
    # memory that they had.
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    rows = table.num_rows
    if rows > 1:
        halves = table.slice(0, rows // 2), table.slice(rows // 2)
        return pa.concat_tables([apply_by_halves(apply, half) for half in halves])
    harmless, again = _attempt(apply, _harmless(table))
    if harmless is None:
        raise StageError(again.message)
    logger.warning("a row is quarantined as %s: %s", error.reason, error.message)
    return apply(refuse_rows(table, {0: error.reason}))


@dataclass(frozen=True)
class _Failure:
    """What is kept of an exception."""

    message: str = ""
    reason: str = "stage_error"


def _attempt(apply: Apply, table: pa.Table) -> tuple[pa.Table | None, _Failure]:
    """Return what the stages give, or None and why they give nothing."""
    try:
        return apply(table), _Failure()
    except WORK_ERRORS as error:
        reason = "out_of_memory" if _lacks_memory(error) else "stage_error"
        return None, _Failure(f"{type(error).__name__}: {error}", reason)


def refuse_rows(table: pa.Table, reasons: Mapping[int, str]) -> pa.Table:
    """Return a table with some rows quarantined; rows that are refused already keep their reason."""
    if not reasons:
        return table
    statuses, told = table[STATUS].to_pylist(), table[REASON].to_pylist()
    gone = {row: reason for row, reason in reasons.items() if statuses[row] == PURIFIED}
    for row, reason in gone.items():
        statuses[row], told[row] = QUARANTINED, reason
    keep = pa.array([None if row in gone else row for row in range(table.num_rows)], pa.int64())
    for name in (PIXELS, HEIGHT, WIDTH):
        table = _replaced(table, name, table[name].take(keep))
    table = _replaced(table, STATUS, pa.array(statuses, pa.string()))
    return _replaced(table, REASON, pa.array(told, pa.string()))


def _harmless(row: pa.Table) -> pa.Table:
    """Return a row with a small grey image in place of its own."""
    grey = bytes([128]) * (3 * PROBE_SIDE**2)
    row = _replaced(row, PIXELS, pa.array([grey], pa.large_binary()))
    for name in (HEIGHT, WIDTH):
        row = _replaced(row, name, pa.array([PROBE_SIDE], pa.int32()))
    return row


def _lacks_memory(error: Exception) -> bool:
    text = str(error).lower()
    return isinstance(error, MemoryError) or "out of memory" in text or "allocate memory" in text


def _replaced(table: pa.Table, name: str, values: pa.ChunkedArray | pa.Array) -> pa.Table:
    return table.set_column(table.column_names.index(name), name, values)
