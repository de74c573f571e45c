"""Attempt accounting: a guilty row is found in a few falls, an innocent one is never blamed for another."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from acsr_ray.corpus.attempts import MOST_FALLS, MOST_STARTS, AttemptBook, Orders

STAGE, UNIT = "PurifyImages", "a.rows-0000000-0000255.0123.parquet"


class Worker:
    """What a chain does with its orders, on rows of which some bring it down."""

    def __init__(self, book: AttemptBook, rows: int, guilty: set[int]) -> None:
        self.book, self.rows, self.guilty = book, rows, guilty
        self.falls = 0

    def attempt(self, refusals: list[str]) -> set[int] | None:
        """Work on the unit as process number `falls`; None when it fell."""
        orders = self.book.begin(STAGE, UNIT, self.rows, "node", self.falls)
        if orders.refusal:
            refusals.append(orders.refusal)
            return set()
        left = set(range(self.rows)) - orders.poison.keys()
        done: list[int] = []
        for first, behind in orders.parts or ((0, self.rows),):
            self.book.narrow(STAGE, UNIT, first, behind)
            inside = [row for row in range(first, behind) if row in left]
            if self.guilty & set(inside):
                self.falls += 1
                return None
            done += inside
        assert sorted(done) == sorted(left), "every row is tried once, and only once"
        self.book.end(STAGE, UNIT)
        return left


@pytest.mark.parametrize("guilty", [0, 1, 100, 254, 255])
@pytest.mark.parametrize("rows", [256, 300])
def test_one_guilty_row_costs_four_workers(rows, guilty):
    worker = Worker(AttemptBook(), rows, {guilty})
    while (done := worker.attempt([])) is None:
        pass
    assert done == set(range(rows)) - {guilty}
    assert worker.falls == worker.book.falls == 4
    assert worker.book.records[UNIT].poison == {guilty: "worker_crash"}


@given(rows=st.integers(1, 80), data=st.data())
@settings(max_examples=200, deadline=None)
def test_just_the_guilty_rows_are_quarantined(rows, data):
    guilty = data.draw(st.sets(st.integers(0, rows - 1), max_size=min(4, rows)))
    worker = Worker(AttemptBook(), rows, guilty)
    refusals: list[str] = []
    while (done := worker.attempt(refusals)) is None:
        assert worker.falls <= 6 * len(guilty)
    assert not refusals
    assert done == set(range(rows)) - guilty


@given(kills=st.lists(st.integers(0, 15), max_size=3))
@settings(max_examples=50, deadline=None)
def test_kills_from_outside_blame_no_row(kills):
    """Up to three kills that have nothing to do with the rows leave all of them as they are."""
    book = AttemptBook()
    for number, position in enumerate(kills):
        orders = book.begin(STAGE, UNIT, 256, "node", number)
        parts = orders.parts or ((0, 256),)
        book.narrow(STAGE, UNIT, *parts[position % len(parts)])
    last = book.begin(STAGE, UNIT, 256, "node", 99)
    assert last.refusal is None
    assert not last.poison


def test_what_is_known_outlives_the_book():
    worker = Worker(AttemptBook(), 256, {77})
    for _ in range(3):
        assert worker.attempt([]) is None
    # The next book hears of the falls that were written down, not of the one that nobody saw.
    worker.book.begin(STAGE, UNIT, 256, "node", 98)
    known = worker.book.state_of(UNIT)
    worker.book = AttemptBook([known])
    while (done := worker.attempt([])) is None:
        pass
    assert done == set(range(256)) - {77}
    assert worker.falls <= 5


def test_a_stage_that_always_falls_is_given_up():
    book = AttemptBook()
    for number in range(MOST_FALLS):
        assert book.begin("ReadUnits", UNIT, 256, "node", number, divisible=False) == Orders(falls=number)
    orders = book.begin("ReadUnits", UNIT, 256, "node", 99, divisible=False)
    assert orders.refusal == "given_up"
    assert not orders.poison
    # A later run tries again, twice.
    later = AttemptBook([book.state_of(UNIT)])
    for number in range(2):
        assert not later.begin("ReadUnits", UNIT, 256, "node", 100 + number, divisible=False).refusal
    assert later.begin("ReadUnits", UNIT, 256, "node", 200, divisible=False).refusal == "given_up"


def test_rows_that_fall_everywhere_end_as_a_given_up_unit():
    worker = Worker(AttemptBook(), 256, set(range(256)))
    refusals: list[str] = []
    while not refusals and worker.falls < 1000:
        worker.attempt(refusals)
    assert refusals == ["given_up"]
    assert worker.falls < 50


def test_a_unit_that_ended_did_not_fall():
    book = AttemptBook()
    for number in range(5):
        book.begin(STAGE, UNIT, 256, "node", number)
        book.end(STAGE, UNIT)
    assert UNIT not in book.records
    # The same worker beginning again has not fallen either.
    book.begin(STAGE, UNIT, 256, "node", 1)
    book.begin(STAGE, UNIT, 256, "node", 1)
    assert UNIT not in book.records


def test_a_stop_and_a_drain_hold_up_what_is_not_begun_but_publishing():
    book = AttemptBook()
    book.draining = frozenset({"leaving"})
    assert book.begin(STAGE, UNIT, 4, "leaving", 1).refusal == "draining"
    assert not book.begin("WriteUnits", UNIT, 4, "leaving", 1, last_stage=True).refusal
    assert not book.begin(STAGE, UNIT, 4, "staying", 2).refusal
    book.stopping = True
    assert book.begin(STAGE, "another", 4, "staying", 2).refusal == "stopping"
    assert not book.begin("WriteUnits", UNIT, 4, "staying", 2, last_stage=True).refusal


def test_what_hangs_is_told_once_and_counts_as_a_fall():
    book = AttemptBook()
    book.begin(STAGE, UNIT, 4, "node", 1)
    assert book.overdue(60) == []
    time.sleep(0.05)
    (late,) = book.overdue(0.01)
    assert (late.stage, late.unit, late.rows, late.node, late.pid) == (STAGE, UNIT, (0, 4), "node", 1)
    assert book.overdue(0.01) == []
    assert book.begin(STAGE, UNIT, 4, "node", 2).parts
    assert book.records[UNIT].falls == 1


@pytest.mark.parametrize("actors", [1, 8])
def test_a_stage_whose_workers_never_get_ready_is_found(actors):
    book = AttemptBook()
    for _ in range(actors + MOST_STARTS):
        assert book.starting(STAGE, actors)
        assert book.stillborn() == []
    assert not book.starting(STAGE, actors)
    assert book.stillborn() == [STAGE]


def test_a_large_pool_may_start_all_at_once_and_again():
    book = AttemptBook()
    for _ in range(20):
        assert all(book.starting(STAGE, 64) for _ in range(64))
        book.started(STAGE)
    assert book.stillborn() == []


def test_a_worker_without_a_beat_is_told_once():
    book = AttemptBook()
    book.beat(STAGE, "node", 1)
    book.beat(STAGE, "node", 2)
    assert book.silent(60) == []
    time.sleep(0.05)
    book.beat(STAGE, "node", 2)
    assert book.silent(0.04) == [(STAGE, "node", 1)]
    assert book.silent(0.04) == []
    book.forget()
    assert book.silent(-1) == []
