"""What counts as a corpus: files, folders of shards, folders of images; and what is refused."""

from pathlib import Path

import pytest

from acsr_ray.corpus.containers import open_parquet
from acsr_ray.corpus.sources import CorpusError, ImageFolder, absolute_uri, find_source


def put(path, data=b"x"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def test_one_file(tmp_path, write_shard):
    path = write_shard(tmp_path / "some.name.parquet")
    (shard,) = find_source(str(path))
    assert shard.relative == "some.name"
    with open_parquet(shard.uri) as file:
        assert file.metadata.num_rows == 6


def test_a_folder_of_shards_is_sorted_and_hidden_files_are_ignored(tmp_path, write_shard):
    for name in ("b/2.parquet", "b/1.parquet", "a.parquet", "c/d/0.parquet"):
        write_shard(tmp_path / name, 1)
    for name in (".hidden.parquet", "_staging/x.parquet", ".git/y.parquet", "b/_z.parquet", "_SUCCESS"):
        write_shard(tmp_path / name, 1)
    put(tmp_path / "notes.txt")
    put(tmp_path / "cover.png")
    shards = find_source(str(tmp_path))
    assert [shard.relative for shard in shards] == ["a", "b/1", "b/2", "c/d/0"]


def test_hidden_parents_of_the_root_do_not_matter(tmp_path, write_shard):
    write_shard(tmp_path / ".data" / "_private" / "a.parquet", 1)
    assert len(find_source(str(tmp_path / ".data" / "_private"))) == 1


def test_version_changes_with_the_content(tmp_path, write_shard):
    path = write_shard(tmp_path / "a.parquet", 2)
    (before,) = find_source(str(path))
    (again,) = find_source(str(path))
    assert before == again
    write_shard(path, 5)
    (after,) = find_source(str(path))
    assert after.version != before.version
    assert after.uri == before.uri


def test_image_folder_with_classes(tmp_path):
    root = tmp_path / "photos"
    for name in ("cat/1.JPG", "cat/deep/2.png", "ant/3.webp", "top.bmp", "odd.gif", "ant/_DSC1.jpg"):
        put(root / name)
    for name in ("readme.md", "cat/notes.txt", ".cache/4.png", "cat/.thumb.png"):
        put(root / name)
    folder = find_source(str(root))
    assert isinstance(folder, ImageFolder)
    assert folder.name == "photos"
    assert folder.class_names == ("ant", "cat")
    assert folder.num_skipped == 2
    labels = {file.path: folder.label(file) for file in folder.files}
    assert labels == {
        "ant/3.webp": 0,
        "ant/_DSC1.jpg": 0,
        "cat/1.JPG": 1,
        "cat/deep/2.png": 1,
        "odd.gif": None,
        "top.bmp": None,
    }
    assert list(labels) == sorted(labels)


def test_image_folder_without_classes(tmp_path):
    put(tmp_path / "b.png")
    put(tmp_path / "a.jpeg")
    folder = find_source(str(tmp_path))
    assert [file.path for file in folder.files] == ["a.jpeg", "b.png"]
    assert folder.class_names == ()
    assert [folder.label(file) for file in folder.files] == [None, None]


@pytest.mark.parametrize(
    ("names", "location", "message"),
    [
        ((), "nowhere", "does not exist"),
        (("a.csv",), "a.csv", "neither a .parquet or .tar file nor a folder"),
        (("a.png",), "a.png", "neither a .parquet or .tar file nor a folder"),
        (("in/a.csv", "in/.b.parquet", "in/.c/d.png"), "in", "neither Parquet shards nor tars nor images"),
    ],
)
def test_what_is_not_a_corpus_is_refused(tmp_path, names, location, message):
    for name in names:
        put(tmp_path / name)
    with pytest.raises(CorpusError, match=message) as error_info:
        find_source(str(tmp_path / location))
    assert location in str(error_info.value)


def test_empty_folder_is_refused(tmp_path):
    with pytest.raises(CorpusError, match="neither"):
        find_source(str(tmp_path))


def test_absolute_uri(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert absolute_uri("a/b") == str(tmp_path.resolve() / "a" / "b")
    assert absolute_uri("s3://bucket/a") == "s3://bucket/a"
    assert "~" not in absolute_uri("~/a")


def test_other_filesystems_of_fsspec(write_shard, tmp_path):
    import fsspec

    data = write_shard(tmp_path / "a.parquet", 3).read_bytes()
    memory = fsspec.filesystem("memory")
    memory.pipe("/corpus-test/x/a.parquet", data)
    memory.pipe("/corpus-test/_skip/b.parquet", data)
    try:
        (shard,) = find_source("memory://corpus-test")
        assert shard.relative == "x/a"
        with open_parquet(shard.uri) as file:
            assert file.metadata.num_rows == 3
    finally:
        memory.rm("/corpus-test", recursive=True)


@pytest.fixture
def memory():
    """An object store: a key is a text, not a path."""
    import fsspec

    store = fsspec.filesystem("memory")
    yield store
    store.rm("/keys-test", recursive=True)


KEYS = [
    "a.parquet",
    "A.parquet",
    "x//a.parquet",
    "x/a.parquet",
    "../a.parquet",
    "x/../a.parquet",
    "./a.parquet",
    "back\\slash.parquet",
    "new\nline.parquet",
    "n\0ul.parquet",
    "\u00e9.parquet",
    "e\u0301.parquet",
    "x" * 1000 + ".parquet",
]


def test_hostile_keys_keep_apart_and_reach_no_path(memory, write_shard, tmp_path):
    data = write_shard(tmp_path / "a.parquet", 1).read_bytes()
    for key in KEYS:
        memory.pipe(f"/keys-test/{key}", data)
    shards = find_source("memory://keys-test")
    assert len(shards) == len(KEYS)
    assert len({shard.relative for shard in shards}) == len(KEYS)
    assert {"a", "A", "x/a", "\u00e9"} < {shard.relative for shard in shards}
    for shard in shards:
        assert Path("/out", shard.relative).resolve().is_relative_to("/out")
        assert len(shard.relative.encode()) < 255
        with open_parquet(shard.uri) as file:
            assert file.metadata.num_rows == 1


def test_images_of_hostile_keys_are_all_there(memory):
    for key in ("a.png", "x//a.png", "x/a.png", "../a.png"):
        memory.pipe(f"/keys-test/{key}", b"x")
    folder = find_source("memory://keys-test")
    assert sorted(file.path for file in folder.files) == ["../a.png", "a.png", "x//a.png", "x/a.png"]


def test_a_single_shard_or_folder_with_an_unsafe_name(tmp_path, write_shard):
    (shard,) = find_source(str(write_shard(tmp_path / ("y" * 200 + ".parquet"), 1)))
    assert shard.relative.startswith("y" * 60 + "~")
    put(tmp_path / "back\\slash" / "1.png")
    assert find_source(str(tmp_path / "back\\slash")).name.startswith("back-slash~")
