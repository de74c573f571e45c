"""Tars become the rows that a straightforward reader finds; what cannot be told apart is refused."""

import io
import json
import logging
import os
import tarfile
from pathlib import Path
from typing import ClassVar

import fsspec
import pytest
from fsspec.spec import AbstractBufferedFile, AbstractFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st

from acsr_ray.corpus.container_errors import ContainerError
from acsr_ray.corpus.sources import CorpusError, find_source
from acsr_ray.corpus.tar_members import TarLimits
from acsr_ray.corpus.units import ShardChangedError, plan_units, read_unit
from acsr_ray.corpus.webdataset import index_tar, read_samples

COLUMNS = ["__key__", "image", "json", "txt", "cls"]
IMAGES = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm", "jp2", "avif")


def write_tar(path, members, form=tarfile.PAX_FORMAT, mtime=0.0):
    """Write (name, bytes) members, None for a folder, with the standard library."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.mtime = mtime
            if data is None:
                info.type = tarfile.DIRTYPE
                tar.addfile(info)
            else:
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


def plan(location, unit_rows=250, unit_megabytes=32.0, limit=None, image_column="image"):
    return plan_units(
        str(location),
        image_column=image_column,
        unit_rows=unit_rows,
        unit_megabytes=unit_megabytes,
        limit=limit,
    )


def rows_of(units):
    return [row for unit in units for row in read_unit(unit).to_pylist()]


def reference(path):
    """Read a benign tar as simply as it can be done."""
    samples = {}
    with tarfile.open(path) as tar:
        for member in tar:
            folder, _, base = member.name.rpartition("/")
            stem, dot, extension = base.partition(".")
            if member.isfile() and stem and dot:
                key = f"{folder}/{stem}" if folder else stem
                sample = samples.setdefault(key, {})
                sample[extension.lower()] = member.name, tar.extractfile(member).read()
    rows = []
    for key, parts in samples.items():
        image = next((parts[name] for name in IMAGES if name in parts), None)
        cell = image and {"path": image[0], "bytes": image[1]}
        row = {"__key__": key, "image": cell}
        row |= {name: parts[name][1].decode() if name in parts else None for name in ("json", "txt")}
        rows.append(row | {"cls": int(parts["cls"][1]) if "cls" in parts else None})
    return rows


TEXTS = st.text(max_size=40).map(str.encode)
PART = st.text("aZ09_-éß字 ", min_size=1, max_size=12)
LONG = st.integers(90, 200).map("n".__mul__)
KEYS = st.tuples(st.lists(PART.filter(str.strip), max_size=2), PART | LONG).map(
    lambda k: "/".join([*k[0], k[1]])
)
SAMPLES = st.fixed_dictionaries(
    {},
    optional={
        "json": st.dictionaries(st.text(max_size=5), st.integers(), max_size=3).map(
            lambda d: json.dumps(d).encode()
        ),
        "txt": TEXTS,
        "cls": st.integers(-(2**63), 2**63 - 1).map(lambda n: f" {n}\n".encode()),
        "npy": st.binary(max_size=1500),
        "seg.png": st.binary(max_size=20),
        "jpg": st.binary(max_size=1500),
    },
)
FORMS = st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])


@settings(deadline=None, max_examples=25)
@given(
    corpus=st.dictionaries(KEYS, SAMPLES, max_size=12),
    form=FORMS,
    rows=st.integers(1, 5),
    limit=st.none() | st.integers(1, 15),
    strange=st.lists(st.sampled_from(["dir", "README", ".hidden.png", "._a.jpg"]), max_size=3),
    image=st.sampled_from(["JPG", "jpg", "png", "webp"]),
)
def test_rows_are_those_of_a_straightforward_reader(
    tmp_path_factory, corpus, form, rows, limit, strange, image
):
    members = [(name, None if name == "dir" else b"x") for name in strange]
    for key, sample in corpus.items():
        # A compound image only counts where there is no plain one, which the reference does not know.
        parts = {k: v for k, v in sample.items() if k != "seg.png" or "jpg" in sample}
        members += [(f"{key}.{image if k == 'jpg' else k}", data) for k, data in parts.items()]
    if form == tarfile.USTAR_FORMAT:
        members = [(name, data) for name, data in members if len(name.encode()) <= 100]
    path = write_tar(tmp_path_factory.mktemp("tar") / "a.tar", members, form, mtime=1.5)
    expected = reference(path)[:limit]
    if not expected:
        with pytest.raises(CorpusError, match="has no rows"):
            plan(path, rows)
        return
    units = plan(path, rows, limit=limit)
    assert rows_of(units) == expected
    assert all(unit.num_rows <= rows for unit in units)
    assert [unit.first for unit in units] == list(range(0, len(expected), rows))
    halves = [half for unit in units for half in (unit.halves() if unit.num_rows > 1 else [unit])]
    assert rows_of(halves) == expected
    if limit is None:
        index = index_tar(str(path), 1)
        assert [run.first for run in index.runs] == list(range(len(expected)))


def test_columns_are_the_same_whatever_samples_have(tmp_path):
    write_tar(tmp_path / "in" / "a.tar", [("0.png", b"x")])
    write_tar(tmp_path / "in" / "b.tar", [("0.txt", b"x")])
    first, second = (read_unit(unit) for unit in plan(tmp_path / "in"))
    assert first.column_names == COLUMNS
    assert first.schema.equals(second.schema, check_metadata=True)
    features = json.loads(first.schema.metadata[b"huggingface"])["info"]["features"]
    assert list(features) == COLUMNS
    assert features["image"] == {"_type": "Image"}


def test_members_of_no_column_are_counted_in_one_line(tmp_path, caplog):
    members = [
        ("0.jpg", b"x"),
        ("0.npy", b"y"),
        ("0.seg.png", b"z"),
        ("README", b""),
        ("1.jpg", b""),
        ("1.npy", b""),
    ]
    path = write_tar(tmp_path / "a.tar", members)
    with caplog.at_level(logging.INFO):
        rows = rows_of(plan(path))
    assert [row["image"]["path"] for row in rows] == ["0.jpg", "1.jpg"]
    assert [record.message for record in caplog.records] == [
        f"4 members of {find_source(str(path))[0].uri} are left out: 2 'npy', 1 '', 1 'seg.png'"
    ]


def test_a_compound_image_counts_where_there_is_no_plain_one(tmp_path):
    members = [("0.seg.png", b"mask"), ("0.jpg", b"photo"), ("1.left.jpg", b"left")]
    rows = rows_of(plan(write_tar(tmp_path / "a.tar", members)))
    assert [row["image"]["bytes"] for row in rows] == [b"photo", b"left"]


AMBIGUOUS = {
    "two images": ([("0.jpg", b""), ("0.png", b"")], "several_images"),
    "two compound images": ([("0.left.jpg", b""), ("0.right.jpg", b"")], "several_images"),
    # Names with dots, all of which are one sample to a WebDataset reader.
    "dots in names": ([("n014.1.jpg", b""), ("n014.2.jpg", b"")], "several_images"),
    "one name twice": ([("0.jpg", b"a"), ("0.jpg", b"b")], "duplicate_member"),
    "cases": ([("0.txt", b"a"), ("0.TXT", b"b")], "duplicate_member"),
    "a key again": ([("0.jpg", b""), ("1.jpg", b""), ("0.jpg", b"")], "scattered_sample"),
    "parts apart": ([("0.jpg", b""), ("1.jpg", b""), ("0.txt", b"")], "scattered_sample"),
    "sorted by extension": (
        [(f"{n}.{e}", b"1") for e in ("cls", "jpg") for n in range(3)],
        "scattered_sample",
    ),
    "long text": ([("0.txt", b"x" * 2**20)], "too_large"),
    "large image": ([("0.jpg", b"x" * 2 * 2**20)], "too_large"),
    "many members": ([(f"0.x{n}", b"") for n in range(5)], "too_large"),
}
SMALL = TarLimits(max_text_megabytes=0.5, max_member_megabytes=1.0, max_sample_members=4)


@pytest.mark.parametrize("case", AMBIGUOUS)
def test_what_cannot_be_told_or_held_is_refused(tmp_path, case):
    members, code = AMBIGUOUS[case]
    with pytest.raises(ContainerError) as error_info:
        index_tar(str(write_tar(tmp_path / "a.tar", members)), 100, limits=SMALL)
    assert error_info.value.code == code
    assert "a.tar" in str(error_info.value)


def test_what_is_left_out_may_be_large(tmp_path):
    path = write_tar(tmp_path / "a.tar", [("0.mp4", b"x" * 2 * 2**20), ("0.jpg", b"y")])
    assert index_tar(str(path), 100, limits=SMALL).num_bytes == 1


@pytest.mark.parametrize(
    "member",
    [("0.txt", b"\xff"), ("0.json", b"\xc3"), ("0.cls", b"cat"), ("0.cls", b""), ("0.cls", b"%d" % 2**63)],
)
def test_a_text_that_is_none_is_refused_where_it_is_read(tmp_path, member):
    path = write_tar(tmp_path / "a.tar", [("9.jpg", b"x"), member])
    fine, broken = plan(path, 1)
    assert read_unit(fine).num_rows == 1
    with pytest.raises(ContainerError) as error_info:
        read_unit(broken)
    assert error_info.value.code == "bad_text"


def test_units_of_large_samples_have_fewer_rows(tmp_path):
    members = [(f"{n}.{e}", b"x" * 1000) for n in range(12) for e in ("jpg", "txt")]
    path = write_tar(tmp_path / "a.tar", members)
    # Eight decoded bytes are reckoned for one.
    units = plan(path, unit_megabytes=8 * 5000 / 2**20)
    assert [unit.num_rows for unit in units] == [2] * 6
    assert {unit.num_rows for unit in plan(path, unit_megabytes=1e-6)} == {1}


def test_a_sample_without_an_image_is_a_row_with_none(tmp_path):
    rows = rows_of(plan(write_tar(tmp_path / "a.tar", [("0.txt", b"only"), ("1.jpg", b"x")])))
    assert [row["image"] for row in rows] == [None, {"bytes": b"x", "path": "1.jpg"}]


def test_content_changes_with_the_bytes_alone(tmp_path):
    members = [(f"{n}.jpg", b"%d" % n) for n in range(4)]
    path = write_tar(tmp_path / "a.tar", members)
    names = [unit.output_name("f") for unit in plan(path, 2)]
    os.utime(path, (1, 1))
    assert [unit.output_name("f") for unit in plan(path, 2)] == names
    write_tar(path, [*members[:3], ("3.jpg", b"4")])
    assert not {unit.output_name("f") for unit in plan(path, 2)} & set(names)


@pytest.mark.parametrize("size", [1, 5000])
def test_a_tar_that_changed_after_planning_is_not_mixed(tmp_path, size):
    path = write_tar(tmp_path / "a.tar", [(f"{n}.jpg", b"old") for n in range(6)])
    units = plan(path, 2)
    write_tar(path, [(f"{n}.jpg", b"n" * size) for n in range(7)])
    os.utime(path, (1, 1))
    for unit in units:
        with pytest.raises(ShardChangedError):
            read_unit(unit)


def test_a_tar_that_shrank_is_one_that_changed(tmp_path):
    path = write_tar(tmp_path / "a.tar", [(f"{n}.jpg", b"x" * 9000) for n in range(6)])
    unit = plan(path, 2)[-1]
    write_tar(path, [("0.jpg", b"x")])
    with pytest.raises(ShardChangedError):
        read_unit(unit)


MIXED = [
    (["a.tar", "b.parquet"], "1 tars and 1 Parquet shards: give each kind its own folder"),
    (["a.tar", "b.PNG", "c.jpg"], "1 tars and 2 images"),
    (["a.tar", "b.tar.gz"], "1 tars and 1 compressed tars.*unpack them to .tar"),
    (["b.tar.gz", "c.tgz"], "holds neither.*unpack them to .tar"),
]


@pytest.mark.parametrize(("names", "message"), MIXED)
def test_mixed_and_compressed_folders_are_refused(tmp_path, names, message):
    for name in names:
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(CorpusError, match=message):
        find_source(str(tmp_path))


def test_a_compressed_tar_alone_is_refused(tmp_path):
    (tmp_path / "a.tar.gz").write_bytes(b"x")
    with pytest.raises(CorpusError, match=r"neither a .parquet or .tar file.*unpack them"):
        find_source(str(tmp_path / "a.tar.gz"))


def test_a_folder_of_tars_is_sorted_and_marked_files_are_ignored(tmp_path):
    for name in ("b/1.tar", "a.tar", "a-b.tar", "_x.tar", ".hidden.tar", "c.tar.tar"):
        write_tar(tmp_path / name, [("0.jpg", name.encode())])
    (tmp_path / "notes.txt").write_bytes(b"")
    (tmp_path / "sizes.json").write_bytes(b"")
    shards = find_source(str(tmp_path))
    assert [shard.relative for shard in shards] == ["a-b", "a", "b/1", "c.tar"]
    names = [unit.output_name("f") for unit in plan(tmp_path)]
    assert names == sorted(names)


def test_other_image_columns_are_refused(tmp_path):
    path = write_tar(tmp_path / "a.tar", [("0.jpg", b"x")])
    with pytest.raises(CorpusError, match="made of tars, whose column is always 'image'"):
        plan(path, image_column="jpg")


def test_a_name_that_fsspec_would_chain_is_refused(tmp_path):
    path = write_tar(tmp_path / "a::b.tar", [("0.jpg", b"x")])
    with pytest.raises(ContainerError, match="'::'"):
        index_tar(str(path), 1)


class Ranges(AbstractFileSystem):
    """A store of byte ranges, which remembers what it was asked for."""

    protocol = "ranges"
    cachable = False
    root: ClassVar[Path] = Path()
    asked: ClassVar[list[tuple[int, int]]] = []

    def info(self, path, **options):
        path = self._strip_protocol(path)
        size = (self.root / path).stat().st_size
        return {"name": path, "size": size, "type": "file", "ETag": '"1"'}

    def ls(self, path, detail=True, **options):
        return [self.info(path)]

    def _open(self, path, mode="rb", block_size=None, **options):
        return RangeFile(self, path, mode, block_size or 5 * 2**20, **options)


class RangeFile(AbstractBufferedFile):
    def _fetch_range(self, start, end):
        self.fs.asked.append((start, end))
        return (self.fs.root / self.path).read_bytes()[start:end]


def test_large_bodies_are_skipped_and_units_read_their_own_bytes(tmp_path, monkeypatch):
    fsspec.register_implementation("ranges", Ranges, clobber=True)
    monkeypatch.setattr(Ranges, "root", tmp_path)
    monkeypatch.setattr("acsr_ray.corpus.webdataset.READ_AHEAD", 1000)
    members = [(f"{n}.{e}", b"x" * size) for n in range(6) for e, size in (("jpg", 50_000), ("txt", 3))]
    path = write_tar(tmp_path / "a.tar", members, mtime=1.5)
    Ranges.asked.clear()
    units = plan("ranges://a.tar", 2)
    assert sum(end - start for start, end in Ranges.asked) < path.stat().st_size / 5
    Ranges.asked.clear()
    assert rows_of(units[1:2]) == reference(path)[2:4]
    start, end, _ = units[1].span
    assert min(first for first, _ in Ranges.asked) == start
    assert max(last for _, last in Ranges.asked) <= end + 1000


def test_reading_stops_behind_the_last_row_that_is_asked_for(tmp_path):
    path = write_tar(tmp_path / "a.tar", [(f"{n}.jpg", b"%d" % n) for n in range(9)])
    (run,) = index_tar(str(path), 100).runs
    table = read_samples(str(path), (run.start, run.end, 0), 3, 4)
    assert [cell["bytes"] for cell in table["image"].to_pylist()] == [b"3", b"4"]
