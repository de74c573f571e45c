"""What a chain's stages cost: room in batches is that of the batches made, seconds are those of the stage."""

import time

import numpy as np
import pyarrow as pa
import pytest

from acsr_ray.columns import HEIGHT, PIXELS, WIDTH
from acsr_ray.purification import stages
from acsr_ray.purification.metering import Meter, batch_room
from acsr_ray.purification.stages import batches_by_size

SIZES = [(4, 4), (4, 6), None, (4, 4), (9, 9), (4, 4), None, (4, 6), (4, 4), (4, 4)]


def decoded():
    pixels = [None if size is None else bytes(3 * size[0] * size[1]) for size in SIZES]
    heights, widths = ([None if size is None else size[i] for size in SIZES] for i in range(2))
    return pa.table(
        {
            PIXELS: pa.array(pixels, pa.large_binary()),
            HEIGHT: pa.array(heights, pa.int32()),
            WIDTH: pa.array(widths, pa.int32()),
        }
    )


class Sleeps:
    """A stage that takes its time, and batches of a size."""

    def __init__(self, seconds=0.0, batch_size=None):
        self.seconds = seconds
        if batch_size:
            self.batch_size = batch_size

    def __call__(self, table):
        time.sleep(self.seconds)
        if self.seconds > 0.05:
            raise ValueError("too long")
        return table


@pytest.mark.parametrize("batch_size", [1, 2, 3, 64])
def test_room_is_that_of_the_batches(batch_size, monkeypatch):
    monkeypatch.setattr(stages, "BATCH_PIXELS", 160)  # one 9 x 9 image, ten of 4 x 4
    table = decoded()
    given = room = 0
    for rows, images in batches_by_size(table, batch_size):
        height, width = images.shape[2:]
        given += len(rows)
        room += max(1, min(batch_size, 160 // (height * width)))
    assert batch_room(table, batch_size) == (given, room)
    assert given == 8


def test_calls_are_measured_until_they_are_read():
    meter, table = Meter(), decoded()
    for _ in range(3):
        assert meter.call(Sleeps(0.02, batch_size=3), table) is table
    facts = meter.read()
    assert facts.seconds["Sleeps"] == pytest.approx(0.06, rel=0.9)
    assert facts.seconds["Sleeps"] >= 0.06
    # Calls for (4, 4): 3 + 2 of 3, for (4, 6) 2 of 3, for (9, 9) 1 of 3.
    assert (facts.rows_given, facts.rows_room) == (3 * 8, 3 * 12)
    assert meter.read().seconds == {}
    assert meter.read().rows_room == 0


def test_a_stage_that_raises_has_cost_something_too():
    meter = Meter()
    with pytest.raises(ValueError, match="too long"):
        meter.call(Sleeps(0.06), decoded())
    facts = meter.read()
    assert facts.seconds["Sleeps"] >= 0.06
    assert facts.rows_room == 0, "the stage has no batches"


def test_a_table_without_images():
    empty = decoded().slice(2, 1)
    assert batch_room(empty, 64) == (0, 0)
    assert np.sum(batch_room(empty.slice(0, 0), 64)) == 0
