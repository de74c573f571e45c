"""Failures of a stage: the rows to blame are quarantined, and a stage to blame fails as a whole."""

import weakref

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from acsr_ray.columns import HEIGHT, PIXELS, PURIFIED, QUARANTINED, REASON, STATUS, WIDTH
from acsr_ray.purification.failures import StageError, apply_by_halves, refuse_rows

SIDE = 4


def decoded(rows: int) -> pa.Table:
    """Return a decoded table whose images hold their row's number."""
    return pa.table(
        {
            "id": pa.array(range(rows), pa.int64()),
            PIXELS: pa.array([bytes([row]) * (3 * SIDE**2) for row in range(rows)], pa.large_binary()),
            HEIGHT: pa.array([SIDE] * rows, pa.int32()),
            WIDTH: pa.array([SIDE] * rows, pa.int32()),
            STATUS: pa.array([PURIFIED] * rows),
            REASON: pa.array([None] * rows, pa.string()),
        }
    )


def failing(bad: set[int], error: Exception, calls: list[int]):
    """Return a stage that adds the first pixel's value, and fails on tables with a bad image."""

    def apply(table: pa.Table) -> pa.Table:
        calls.append(table.num_rows)
        values = [None if data is None else data[0] for data in table[PIXELS].to_pylist()]
        if bad & set(values):
            raise error
        return table.append_column("value", pa.array(values, pa.int64()))

    return apply


@given(rows=st.integers(1, 40), data=st.data())
@settings(max_examples=60, deadline=None)
def test_just_the_rows_to_blame_are_quarantined(rows, data):
    bad = data.draw(st.sets(st.integers(0, rows - 1)))
    table = apply_by_halves(failing(bad, RuntimeError("odd"), []), decoded(rows))
    assert table["id"].to_pylist() == list(range(rows))
    assert table["value"].to_pylist() == [None if row in bad else row for row in range(rows)]
    assert table[STATUS].to_pylist() == [QUARANTINED if row in bad else PURIFIED for row in range(rows)]
    assert table[REASON].to_pylist() == ["stage_error" if row in bad else None for row in range(rows)]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (MemoryError(), "out_of_memory"),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), "out_of_memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "out_of_memory"),
        (RuntimeError("shapes"), "stage_error"),
        (ArithmeticError("not finite"), "stage_error"),
    ],
)
def test_the_reason_is_told(error, reason):
    table = apply_by_halves(failing({3}, error, []), decoded(8))
    assert table[REASON].to_pylist() == [None] * 3 + [reason] + [None] * 4


def test_a_table_too_large_for_memory_is_halved_until_it_fits():
    calls: list[int] = []

    def apply(table: pa.Table) -> pa.Table:
        calls.append(table.num_rows)
        if table.num_rows > 3:
            raise MemoryError
        return table

    assert apply_by_halves(apply, decoded(16)).equals(decoded(16))
    assert max(calls) == 16
    assert calls.count(2) == 8


def test_a_stage_that_fails_on_a_harmless_image_is_to_blame_itself():
    calls: list[int] = []
    everything = failing(set(range(256)), RuntimeError("no kernel image for this device"), calls)
    with pytest.raises(StageError, match="no kernel image"):
        apply_by_halves(everything, decoded(64))
    assert len(calls) < 12, "it stops at the first row, not after all"


def test_errors_of_code_are_not_blamed_on_rows():
    with pytest.raises(KeyError):
        apply_by_halves(failing({1}, KeyError("column"), []), decoded(4))


def test_refused_rows_keep_their_place_and_their_first_reason():
    table = refuse_rows(decoded(4), {1: "worker_crash"})
    again = refuse_rows(table, {1: "stage_error", 2: "stage_error"})
    assert again[REASON].to_pylist() == [None, "worker_crash", "stage_error", None]
    assert [data is None for data in again[PIXELS].to_pylist()] == [False, True, True, False]
    assert again[HEIGHT].to_pylist() == [SIDE, None, None, SIDE]
    assert np.all(again["id"].to_numpy() == np.arange(4))


def test_what_failed_holds_no_memory_while_its_halves_are_tried():
    """A traceback keeps every local of the frames it passed: on a GPU, what the halves would need."""
    held: list[weakref.ref] = []

    def apply(table: pa.Table) -> pa.Table:
        assert [own for own in held if own() is not None] == []
        activations = np.zeros(3)
        held.append(weakref.ref(activations))
        if table.num_rows > 1 or table[PIXELS][0].as_py() == bytes([2]) * (3 * SIDE**2):
            raise MemoryError
        return table

    assert apply_by_halves(apply, decoded(4))[REASON].to_pylist() == [None, None, "out_of_memory", None]
    assert len(held) > 7
