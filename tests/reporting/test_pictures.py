"""Pictures: the purified image of the row and the original that it was made of, or the reason for none."""

import shutil
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from acsr_ray.columns import PURIFIED
from acsr_ray.corpus.images import DecodeLimits, decode_image
from acsr_ray.corpus.isolated import IsolatedDecoder
from acsr_ray.corpus.units import UnitPlan
from acsr_ray.reporting.pictures import SIDE, Located, _centre, _file, take_pictures
from acsr_ray.reporting.sampling import places, scan

LIMITS = DecodeLimits(max_side=4000)


@pytest.fixture(autouse=True, scope="module")
def one_decoder():
    """The isolated decoder, but one for all tests: each is a process, which takes a second to start."""
    with IsolatedDecoder(LIMITS) as decoder, pytest.MonkeyPatch.context() as patch:
        patch.setattr("acsr_ray.reporting.pictures.IsolatedDecoder", lambda *_: nullcontext(decoder))
        yield


def shoot(purified, source=None, rows=None):
    """Return the pictures of the purified rows, by path."""
    output = purified.ledger.output
    found = scan(output, places(purified.ledger.snapshot()), "image")
    wanted = [row for row in found if row.status == PURIFIED][:rows]
    pictures = take_pictures(
        output, "image", wanted, Located(str(purified.corpus), source), LIMITS, frozenset(wanted)
    )
    assert set(pictures) <= set(wanted)
    return list(pictures.values())


def stored(folder, column="image"):
    """Return the decoded images of a folder of shards, by (stem, row of the shard)."""
    images = {}
    for path in folder.glob("*.parquet"):
        if path.name.startswith("broken"):
            continue
        for row, cell in enumerate(pq.read_table(path)[column].to_pylist()):
            if cell and cell["bytes"] and not cell["bytes"].startswith(b"SECRET"):
                images[path.stem, row] = decode_image(cell["bytes"], LIMITS)
    return images


@pytest.fixture
def own(purify, write_shard, tmp_path):
    """An output of one small shard that a test may spoil."""
    write_shard(tmp_path / "in" / "a.parquet", count=8)
    return purify(tmp_path / "in", str(tmp_path / "out"))


def test_pictures_are_the_pixels_of_input_and_output(own):
    before = stored(own.corpus)
    after = [decode_image(cell["bytes"], LIMITS) for cell in own.tables()[0]["image"].to_pylist()]
    pictures = shoot(own)
    assert len(pictures) == 8
    for picture in pictures:
        assert not picture.missing
        np.testing.assert_array_equal(picture.before, before["a", picture.row.number])
        np.testing.assert_array_equal(picture.after, after[picture.row.position])


def test_rows_of_later_units_and_row_groups_find_their_own_original(purified, hostile_corpus):
    before = stored(hostile_corpus)
    pictures = shoot(purified)
    assert len(pictures) == 54
    by_uri = {}
    for picture in pictures:
        stem = picture.row.place.entry.uri.rsplit("/", 1)[-1].removesuffix(".parquet")
        by_uri.setdefault(stem, set()).add(picture.row.number)
        np.testing.assert_array_equal(picture.before, before[stem, picture.row.number])
    assert {stem: len(numbers) for stem, numbers in by_uri.items()} == dict.fromkeys(by_uri, 27)


def test_a_shard_that_changed_or_went_gives_no_original(own, write_shard):
    write_shard(own.corpus / "a.parquet", count=9, seed=5)
    assert {picture.missing for picture in shoot(own)} == {"the shard has changed since"}
    (own.corpus / "a.parquet").write_bytes(b"PAR1")
    assert all(picture.before is None for picture in shoot(own))
    (own.corpus / "a.parquet").unlink()
    assert {picture.missing for picture in shoot(own)} == {"the input is no longer there, or cannot be read"}


def test_a_corpus_that_was_moved_is_found_where_it_is_given(own, tmp_path):
    shutil.move(own.corpus, tmp_path / "elsewhere")
    assert all(picture.before is None for picture in shoot(own))
    pictures = shoot(own, source=str(tmp_path / "elsewhere"))
    assert all(picture.before is not None for picture in pictures)


def test_another_corpus_is_not_taken_for_the_original(
    own, tmp_path, smooth_pixels, encoded, hf_table, write_parquet
):
    table = hf_table([encoded(image) for image in smooth_pixels(8, 16, 20, seed=9)])
    write_parquet(tmp_path / "other" / "a.parquet", table)
    pictures = shoot(own, source=str(tmp_path / "other"))
    assert {picture.missing for picture in pictures} == {"not the image that was purified"}
    shifted = pq.read_table(own.corpus / "a.parquet").slice(1)
    write_parquet(tmp_path / "shifted" / "a.parquet", shifted)
    pictures = shoot(own, source=str(tmp_path / "shifted"), rows=7)
    assert {picture.missing for picture in pictures} == {"not the image that was purified"}


def test_files_of_a_folder_are_found_and_nothing_beside_it(purify, smooth_pixels, encoded, tmp_path):
    images = smooth_pixels(3, 16, 16, seed=3)
    for number, image in enumerate(images):
        path = tmp_path / "in" / "sub" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(image))
    purified = purify(tmp_path / "in", str(tmp_path / "out"))
    for picture, image in zip(shoot(purified), images, strict=True):
        np.testing.assert_array_equal(picture.before, image)
    (tmp_path / "in" / "sub" / "1.png").unlink()
    missing = [picture.missing for picture in shoot(purified)]
    assert missing == ["", "the file is no longer there, or cannot be read", ""]

    (tmp_path / "secret.png").write_bytes(encoded(images[0]))
    for path in ("../secret.png", "sub/../../secret.png", str(tmp_path / "secret.png"), "a::b", None, ""):
        assert _file(str(tmp_path / "in"), path) == (None, "not the image that was purified")


def test_a_shard_of_another_kind_is_read_by_its_units(own):
    """As tars are, whose rows have no places of their own; here it is Parquet under another name."""
    before = stored(own.corpus)
    path = own.corpus / "a.parquet"
    rows = scan(own.ledger.output, places(own.ledger.snapshot()), "image")
    chosen = [rows[2], rows[3], rows[7]]
    entry = replace(chosen[0].place.entry, uri=str(path.rename(own.corpus / "a.other")))
    chosen = [replace(row, place=replace(row.place, entry=entry)) for row in chosen]
    source = Located(str(own.corpus), plan=UnitPlan(unit_rows=3))
    taken = take_pictures(own.ledger.output, "image", chosen, source, LIMITS, frozenset(chosen))
    assert [row.number for row in taken] == [2, 3, 7]
    for row, picture in taken.items():
        np.testing.assert_array_equal(picture.before, before["a", row.number])


def test_an_original_that_was_kept_needs_no_input(purify, write_shard, tmp_path):
    write_shard(tmp_path / "in" / "a.parquet", count=4)
    purified = purify(tmp_path / "in", str(tmp_path / "out"), keep_original=True)
    before = stored(purified.corpus)
    (tmp_path / "in" / "a.parquet").unlink()
    for picture in shoot(purified):
        np.testing.assert_array_equal(picture.before, before["a", picture.row.number])


def test_a_large_image_shows_its_middle(purify, smooth_pixels, encoded, hf_table, write_parquet, tmp_path):
    image = smooth_pixels(1, 40, 64, seed=2)[0]
    image = np.tile(image, (5, 1, 1))[:, :60]
    write_parquet(tmp_path / "in" / "a.parquet", hf_table([encoded(image[:60]), encoded(image[:16, :16])]))
    purified = purify(tmp_path / "in", str(tmp_path / "out"))
    large, small = shoot(purified)
    assert not small.is_part
    assert (large.height, large.width) == (60, 60)
    whole = np.arange(300 * 200 * 3, dtype=np.uint32).astype(np.uint8).reshape(300, 200, 3)
    np.testing.assert_array_equal(_centre(whole), whole[70 : 70 + SIDE, 20 : 20 + SIDE])


def test_a_purified_image_that_was_touched_is_left_out(own):
    (path,) = (own.output / "data").glob("*.parquet")
    table = pq.read_table(path)
    cells = table["image"].to_pylist()
    cells[2]["bytes"] = b"no image"
    kind = table.schema.field("image")
    pq.write_table(
        table.set_column(table.column_names.index("image"), kind, pa.array(cells, kind.type)), path
    )
    assert [picture.row.position for picture in shoot(own)] == [0, 1, 3, 4, 5, 6, 7]
