"""The order of training: complete, shuffled, the same for any number of workers and from any step on."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from acsr_ray.training.order import Order, Step, Window, lanes_of


def rows_of_steps(order: Order, lanes, epoch: int, first: int = 0) -> list[dict[int, list[tuple[int, int]]]]:
    """Follow the events as a worker does: per step, the (unit, row) of each lane."""
    held: dict[int, list[tuple[int, int]]] = {lane: [] for lane in lanes}
    steps = []
    for event in order.events(lanes, epoch, first):
        if isinstance(event, Window):
            rows = [(unit, row) for unit in event.units for row in range(order.unit_rows[unit])]
            held[event.lane] += [rows[position] for position in event.order]
        else:
            assert isinstance(event, Step)
            steps.append({lane: held[lane][: order.lane_batch] for lane in lanes})
            held = {lane: rows[order.lane_batch :] for lane, rows in held.items()}
    return steps


orders = st.builds(
    Order,
    unit_rows=st.lists(st.integers(1, 9), min_size=16, max_size=40).map(tuple),
    batch_size=st.sampled_from([4, 8]),
    lanes=st.sampled_from([1, 2, 4]),
    window_rows=st.integers(1, 40),
    seed=st.integers(0, 5),
)


def has_steps(order: Order) -> bool:
    try:
        return min(order.steps(epoch) for epoch in range(4)) > 0
    except ValueError:
        return False


@given(orders.filter(has_steps), st.integers(0, 3))
def test_no_row_comes_twice_and_few_are_left_out(order, epoch):
    steps = rows_of_steps(order, range(order.lanes), epoch)
    assert len(steps) == order.steps(epoch)
    taken = [row for step in steps for rows in step.values() for row in rows]
    assert all(len(rows) == order.lane_batch for step in steps for rows in step.values())
    assert len(set(taken)) == len(taken) == order.steps(epoch) * order.batch_size
    known = {(unit, row) for unit, rows in enumerate(order.unit_rows) for row in range(rows)}
    assert set(taken) <= known
    # At most a unit per lane but the shortest, and less than a batch.
    assert len(known) - len(taken) < (order.lanes - 1) * max(order.unit_rows) + order.batch_size


@given(orders.filter(has_steps), st.sampled_from([1, 2, 4]))
def test_a_global_batch_is_the_same_for_any_number_of_workers(order, workers):
    if order.lanes % workers:
        with pytest.raises(ValueError, match="do not divide"):
            lanes_of(0, workers, order.lanes)
        return
    alone = rows_of_steps(order, range(order.lanes), epoch=1)
    parts = [rows_of_steps(order, lanes_of(rank, workers, order.lanes), epoch=1) for rank in range(workers)]
    together = [
        {lane: rows for part in parts for lane, rows in part[step].items()} for step in range(len(alone))
    ]
    assert together == alone


@given(orders.filter(has_steps), st.data())
def test_any_step_can_be_found_again_without_reading_what_came_before(order, data):
    first = data.draw(st.integers(0, order.steps(2)))
    whole = rows_of_steps(order, range(order.lanes), epoch=2)
    assert rows_of_steps(order, range(order.lanes), epoch=2, first=first) == whole[first:]
    loaded = [event for event in order.events(range(order.lanes), 2, first) if isinstance(event, Window)]
    assert all(len(window.order) for window in loaded)


def test_epochs_and_seeds_differ_and_repeat():
    def taken(seed, epoch):
        return rows_of_steps(Order((5,) * 20, 10, 2, 15, seed), (0, 1), epoch)

    assert taken(0, 0) == taken(0, 0)
    assert taken(0, 0) != taken(0, 1)
    assert taken(0, 0) != taken(1, 0)


def test_rows_are_shuffled_across_the_units_of_a_window_but_not_beyond():
    order = Order((10,) * 8, batch_size=10, lanes=1, window_rows=40, seed=3)
    units = [unit for step in rows_of_steps(order, (0,), 0) for unit, _ in step[0]]
    first, second = set(units[:40]), set(units[40:])
    assert len(first) == len(second) == 4
    assert not first & second
    # A batch of ten from four shuffled units holds more than two of them.
    assert all(len(set(units[start : start + 10])) > 2 for start in range(0, 80, 10))


@pytest.mark.parametrize(
    ("unit_rows", "batch", "lanes", "message"),
    [((5,) * 8, 10, 4, "do not divide"), ((5,) * 3, 8, 4, "as many units"), ((1,) * 8, 32, 4, "do not fill")],
)
def test_what_cannot_work_is_refused(unit_rows, batch, lanes, message):
    with pytest.raises(ValueError, match=message):
        Order(unit_rows, batch, lanes, 10, 0).steps(0)


def test_a_window_is_not_longer_than_it_must_be():
    order = Order((7,) * 12, batch_size=4, lanes=1, window_rows=20, seed=0)
    windows = list(order.windows(0, 0, order.deal(0)[0]))
    assert [len(window.order) for window in windows] == [21, 21, 21, 21]
    assert all(sorted(window.order.tolist()) == list(range(21)) for window in windows)
    assert not np.array_equal(windows[0].order, windows[1].order)


def test_equal_units_are_dealt_evenly():
    order = Order((8,) * 12, batch_size=16, lanes=4, window_rows=16, seed=1)
    assert {len(lane) for lane in order.deal(0)} == {3}
    assert order.steps(0) == 6
