"""The sample: always the same, of few files, over all clusters, and never an image that was refused."""

from collections import Counter
from dataclasses import replace

import pytest

from acsr_ray.columns import CLASS, CLUSTER, DISTANCE, PURIFIED, QUARANTINED, REASON, RESIDUAL, STATUS
from acsr_ray.corpus.snapshot import Receipt, ShardEntry, Snapshot
from acsr_ray.reporting import sampling
from acsr_ray.reporting.sampling import (
    SHOWN_UNITS,
    Place,
    SampledRow,
    choose,
    list_refused,
    montage,
    places,
    scan,
    spread,
)


@pytest.fixture
def rows(purified):
    return scan(purified.ledger.output, places(purified.ledger.snapshot()), "image")


def made_up(units=40, each=30):
    """Rows of units with three clusters, one of them rare; changes grow with the row."""
    entry = ShardEntry("/in/a.parquet", "v", "c", (), "f")
    found = []
    for unit in range(units):
        place = Place("a", entry, Receipt(f"{unit:03d}.parquet", each, {}, {}, first=unit * each))
        for row in range(each):
            number = unit * each + row
            cluster = 2 if number % 97 == 0 else number % 2
            found.append(
                SampledRow(place, row, f"{number}", PURIFIED, None, 0, cluster, 1000.0 - number, number / 1e4)
            )
    return found


def test_numbers_are_those_of_the_output(purified, rows):
    expected = [row for table in purified.tables() for row in table.to_pylist()]
    assert len(rows) == len(expected) == 60
    for row, true in zip(rows, expected, strict=True):
        assert (row.status, row.reason) == (true[STATUS], true[REASON])
        assert (row.class_id, row.cluster_id) == (true[CLASS], true[CLUSTER])
        assert (row.distance, row.residual) == (true[DISTANCE], true[RESIDUAL])
        if true["image"] is not None:
            assert row.path == true["image"]["path"]
        assert row.number == true["id"] - 1000


def test_no_image_is_read_for_the_numbers(purified, monkeypatch):
    read = []
    original = sampling.open_parquet.__wrapped__

    def watched(uri):
        for file in original(uri):
            real = file.read
            file.read = lambda columns, real=real: read.extend(columns) or real(columns=columns)
            yield file

    from contextlib import contextmanager

    monkeypatch.setattr(sampling, "open_parquet", contextmanager(watched))
    units = places(purified.ledger.snapshot())
    scan(purified.ledger.output, units, "image")
    list_refused(purified.ledger.output, units)
    assert "image.path" in read
    assert not {"image", "image.bytes", "bytes"} & set(read)


def test_a_file_that_is_gone_or_damaged_is_left_out(purify, hostile_corpus, tmp_path):
    purified = purify(hostile_corpus, str(tmp_path / "out"))
    units = places(purified.ledger.snapshot())
    first, second = (purified.output / "data" / place.receipt.name for place in units[:2])
    first.unlink()
    second.write_bytes(second.read_bytes()[:100])
    rows = scan(purified.ledger.output, units, "image")
    assert {row.place.receipt.name for row in rows} == {place.receipt.name for place in units[2:]}


def test_refused_rows_are_listed_by_key(purified, hostile):
    listed = list_refused(purified.ledger.output, places(purified.ledger.snapshot()))
    assert Counter(row.reason for row in listed) == {"null_image": 2, "empty": 2, "unsupported_format": 2}
    assert {row.number for row in listed} == {3, 7, 11}
    assert any(hostile in (row.path or "") for row in listed)
    assert all(row.shard.endswith(".parquet") for row in listed)


def test_extremes_and_every_cluster_are_chosen():
    rows = made_up()
    chosen = choose(rows, 24)
    assert {why: len(own) for why, own in chosen.items()} == {
        "largest": 6, "farthest": 3, "smallest": 3, "typical": 12,
    }  # fmt: skip
    assert [row.path for row in chosen["largest"]] == [str(1199 - n) for n in range(6)]
    assert [row.path for row in chosen["farthest"]] == ["0", "1", "2"]
    # What was shown is not shown again.
    assert [row.path for row in chosen["smallest"]] == ["3", "4", "5"]
    every = [row for own in chosen.values() for row in own]
    assert len({row.path for row in every}) == 24
    assert len({row.place.receipt.name for row in every}) <= SHOWN_UNITS
    assert {row.key for row in chosen["typical"]} == {(0, 0), (0, 1), (0, 2)}


def test_the_choice_does_not_depend_on_the_order_of_rows():
    one, other = choose(made_up(), 24), choose(made_up()[::-1], 24)
    paths = [{why: [row.path for row in own] for why, own in chosen.items()} for chosen in (one, other)]
    assert paths[0] == paths[1]


def test_only_purified_rows_are_chosen(rows):
    chosen = choose(rows, 200)
    every = [row for own in chosen.values() for row in own]
    assert len(every) == 54
    assert all(row.status != QUARANTINED for row in every)
    assert choose(rows, 0) == {}


def test_strips_show_the_most_used_clusters_from_files_that_are_read_anyway():
    rows = made_up(units=4)
    strips = montage(rows, frozenset({"000.parquet", "001.parquet"}), {(0, 1): 9, (0, 0): 5, (0, 2): 1}, 2, 4)
    assert list(strips) == [(0, 1), (0, 0)]
    assert all(len(own) == 4 for own in strips.values())
    assert {row.place.receipt.name for own in strips.values() for row in own} <= {
        "000.parquet",
        "001.parquet",
    }


def test_units_are_spread_over_the_output():
    units = list(range(1000))
    assert spread(units, 5) == [0, 250, 500, 749, 999]
    assert spread(units[:3], 5) == [0, 1, 2]


def test_units_of_the_run_are_taken_where_they_are_known(purified):
    snapshot = purified.ledger.snapshot()
    names = [place.receipt.name for place in places(snapshot)]
    assert names == sorted(purified.ledger.published())
    assert [place.receipt.name for place in places(snapshot, [names[1], "gone"])] == [names[1]]
    assert len(places(snapshot, ["gone"])) == len(names)
    assert places(Snapshot()) == []


def test_equal_numbers_are_no_reason_for_another_choice():
    rows = [replace(row, residual=0.5, distance=1.0) for row in made_up(units=8)]
    one, other = choose(rows, 8), choose(rows[::-1], 8)
    assert [row.path for row in one["largest"]] == [row.path for row in other["largest"]]
    # As if at random, not the first of the corpus.
    assert [row.path for row in one["farthest"]] != ["0"]
