"""Batches: the images the order names, with labels and random numbers that belong to them."""

import io

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from acsr_ray.corpus.sources import CorpusError
from acsr_ray.corpus.units import plan_units
from acsr_ray.training.feed import ATTACK, AUGMENTATION, Rows, batches, decode_unit, needed_units
from acsr_ray.training.order import Order, lanes_of

SIZE = 8


def numbered(unit: int, rows: int) -> Rows:
    """Return rows whose every pixel tells unit and row."""
    pixels = np.zeros((rows, SIZE, SIZE, 3), np.uint8)
    pixels[..., 0], pixels[..., 1] = unit, np.arange(rows)[:, None, None]
    return Rows(pixels, np.full(rows, unit % 3), np.arange(rows), 0)


def follow(order, lanes, epochs, first=0):
    events = [
        event for epoch in epochs for event in order.events(lanes, epoch, first if epoch == epochs[0] else 0)
    ]
    fetched = (numbered(unit, order.unit_rows[unit]) for unit in needed_units(events))
    return list(batches(order, lanes, events, fetched))


@pytest.fixture
def order():
    return Order((5, 7, 6, 5, 9, 5, 6, 7, 5, 8, 5, 6), batch_size=8, lanes=4, window_rows=9, seed=2)


def test_every_image_comes_with_its_label_and_origin(order):
    for batch in follow(order, (0, 1, 2, 3), [0, 1]):
        assert batch.images.shape == (8, 3, SIZE, SIZE)
        levels = (batch.images * 255).round().long()
        assert levels[:, 0, 0, 0].tolist() == batch.units.tolist()
        assert levels[:, 1, -1, -1].tolist() == batch.rows.tolist()
        assert batch.labels.tolist() == [unit % 3 for unit in batch.units]


def test_no_image_comes_twice_in_an_epoch(order):
    for epoch in (0, 1):
        origin = [
            pair
            for batch in follow(order, (0, 1, 2, 3), [epoch])
            for pair in zip(batch.units, batch.rows, strict=True)
        ]
        assert len(set(origin)) == len(origin) == 8 * order.steps(epoch)


def test_two_workers_see_what_one_sees(order):
    alone = follow(order, (0, 1, 2, 3), [0, 1])
    halves = [follow(order, lanes_of(rank, 2, 4), [0, 1]) for rank in (0, 1)]
    for whole, first, second in zip(alone, *halves, strict=True):
        assert whole.step == first.step == second.step
        share = order.lane_batch
        for position, lane in enumerate(whole.lanes):
            part = first if lane in first.lanes else second
            at = part.lanes.index(lane)
            assert torch.equal(
                whole.images[position * share : (position + 1) * share],
                part.images[at * share : (at + 1) * share],
            )


def test_random_numbers_belong_to_lane_step_and_purpose(order):
    def numbers(batch, seed=0, purpose=AUGMENTATION):
        return {
            lane: torch.rand(3, generator=generator).tolist()
            for lane, (_, generator) in zip(batch.lanes, batch.by_lane(seed, purpose), strict=True)
        }

    whole, half = follow(order, (0, 1, 2, 3), [0]), follow(order, (1, 3), [0])
    first, again = numbers(whole[1]), numbers(half[1])
    assert again == {lane: first[lane] for lane in (1, 3)}
    assert len({tuple(values) for values in first.values()}) == 4
    assert numbers(whole[0]) != first
    assert numbers(whole[1], purpose=ATTACK) != first
    assert numbers(whole[1], seed=1) != first
    slices = [chosen for chosen, _ in half[0].by_lane(0, ATTACK)]
    assert slices == [slice(0, 2), slice(2, 4)]


def test_numbers_of_all_lanes_belong_to_step_and_purpose(order):
    def numbers(batch, seed=0, purpose=ATTACK):
        return torch.rand(3, generator=batch.shared_generator(seed, purpose)).tolist()

    whole = follow(order, (0, 1, 2, 3), [0])
    first = numbers(whole[1])
    for rank in range(4):
        assert numbers(follow(order, lanes_of(rank, 4, 4), [0])[1]) == first
    assert numbers(follow(order, (0, 1, 2, 3), [0], first=1)[0]) == first
    assert numbers(whole[0]) != first
    assert numbers(follow(order, (0, 1, 2, 3), [1])[1]) != first
    assert numbers(whole[1], purpose=AUGMENTATION) != first
    assert numbers(whole[1], seed=1) != first
    own = [torch.rand(3, generator=generator).tolist() for _, generator in whole[1].by_lane(0, ATTACK)]
    assert first not in own


def test_training_goes_on_at_any_step(order):
    whole = follow(order, (0, 2), [3])
    rest = follow(order, (0, 2), [3], first=2)
    assert [batch.step for batch in rest] == [batch.step for batch in whole[2:]]
    assert all(torch.equal(a.images, b.images) for a, b in zip(rest, whole[2:], strict=True))


def png(level: int) -> bytes:
    sink = io.BytesIO()
    Image.fromarray(np.full((12, 10, 3), level, np.uint8)).save(sink, "PNG")
    return sink.getvalue()


def unit_of(write_parquet, hf_table, path, cells):
    write_parquet(path, hf_table(cells))
    (unit,) = plan_units(str(path), image_column="image", unit_rows=100, unit_megabytes=32.0, limit=None)
    return unit


def test_a_damaged_row_is_replaced_by_its_neighbour_and_counted(tmp_path, write_parquet, hf_table):
    cells = [b"no image", png(10), b"", png(30), None, b"x"]
    rows = decode_unit(unit_of(write_parquet, hf_table, tmp_path / "a.parquet", cells), SIZE)
    assert rows.pixels.shape == (6, SIZE, SIZE, 3)
    assert rows.pixels[:, 0, 0, 0].tolist() == [10, 10, 10, 30, 30, 30]
    assert rows.source.tolist() == [1, 1, 1, 3, 3, 3]
    assert rows.labels.tolist() == [1, 1, 1, 0, 0, 0]
    assert rows.unreadable == 4


def test_a_unit_without_a_readable_image_borrows_from_its_window(tmp_path, write_parquet, hf_table):
    cells = [[b"x", None], [png(10), png(30)]]
    bad, good = (
        decode_unit(unit_of(write_parquet, hf_table, tmp_path / f"{name}.parquet", part), SIZE)
        for name, part in zip("ab", cells, strict=True)
    )
    assert (bad.unreadable, bad.source.tolist()) == (2, [-1, -1])
    order = Order((2, 2), batch_size=4, lanes=1, window_rows=4, seed=0)
    events = list(order.events([0], 0))
    parts = {0: bad, 1: good}
    (batch,) = batches(order, [0], events, (parts[unit] for unit in needed_units(events)))
    assert batch.unreadable == 2
    assert batch.units.tolist() == [1, 1, 1, 1]
    # Image, label and row are still those of one another.
    shown = (batch.images[:, 0, 0, 0] * 255).round().int().tolist()
    assert {*zip(shown, batch.rows.tolist(), batch.labels.tolist(), strict=True)} <= {(10, 0, 0), (30, 1, 1)}
    with pytest.raises(CorpusError, match="not one of 4 images"):
        list(batches(order, [0], events, iter([bad, bad])))


def test_labels_are_needed(tmp_path, write_parquet, hf_table):
    table = hf_table([png(1), png(2)])
    path = write_parquet(tmp_path / "a.parquet", table.drop_columns(["label"]))
    (unit,) = plan_units(str(path), image_column="image", unit_rows=100, unit_megabytes=32.0, limit=None)
    with pytest.raises(CorpusError, match="no column label"):
        decode_unit(unit, SIZE)
    table = table.set_column(table.column_names.index("label"), "label", pa.array([1, None], pa.int64()))
    path = write_parquet(tmp_path / "b.parquet", table)
    (unit,) = plan_units(str(path), image_column="image", unit_rows=100, unit_megabytes=32.0, limit=None)
    with pytest.raises(CorpusError, match="without a label"):
        decode_unit(unit, SIZE)
