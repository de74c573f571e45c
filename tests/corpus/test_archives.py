"""The job that turns public data sets into shards, on tiny archives and folders."""

import hashlib
import io
import json
import tarfile

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from pydantic import ValidationError

from acsr_ray.artifacts import load_artifact
from acsr_ray.corpus.archives import PrepareCorpusSettings, prepare_corpus, shift_off_grid
from acsr_ray.corpus.cifar10 import CLASS_NAMES, RECORD_BYTES, extract_batches
from acsr_ray.corpus.fetching import FetchError
from acsr_ray.corpus.images import DecodeLimits, decode_image
from acsr_ray.corpus.labelled import image_bytes, label_names
from acsr_ray.corpus.sources import CorpusError, find_source
from acsr_ray.corpus.writing import ShardWriter

TRAIN_ROWS, TEST_ROWS = 40, 20
BATCHES = {**{f"data_batch_{n}.bin": TRAIN_ROWS for n in range(1, 6)}, "test_batch.bin": TEST_ROWS}


@pytest.fixture(scope="module")
def batches():
    """The six batches of a tiny CIFAR-10: pixels by image id, labels 0..9 in turn."""
    generator = np.random.default_rng(0)
    files, pixels = {}, {}
    for name, rows in BATCHES.items():
        images = generator.integers(0, 256, (rows, 32, 32, 3), dtype=np.uint8)
        labels = np.arange(rows, dtype=np.uint8) % 10
        planes = images.transpose(0, 3, 1, 2).reshape(rows, -1)
        files[name] = np.concatenate([labels[:, None], planes], 1).tobytes()
        pixels.update({f"{name[:-4]}/{row:05d}": image for row, image in enumerate(images)})
    return files, pixels


def write_archive(path, files, folder="cifar-10-batches-bin", mode="w:gz"):
    with tarfile.open(path, mode) as tar:
        for name, content in sorted(files.items(), key=lambda item: item[1]):
            member = tarfile.TarInfo(f"{folder}/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


@pytest.fixture
def archive(tmp_path, batches):
    files = {**batches[0], "readme.html": b"<p>", "batches.meta.txt": b"airplane\n"}
    return write_archive(tmp_path / "cifar.tar.gz", files)


def settings(dataset="cifar10", **fields):
    return PrepareCorpusSettings(dataset=dataset, **fields)


def read_split(folder, split):
    """Return {image_id: (pixels, label)} in the order of the rows, and the schema."""
    rows, schema = {}, None
    for path in sorted(folder.glob(f"{split}-*.parquet")):
        table = pq.read_table(path)
        schema = table.schema
        images = (decode_image(data, DecodeLimits()) for data in image_bytes(table["image"]))
        for key, image, label in zip(
            table["image_id"].to_pylist(), images, table["label"].to_pylist(), strict=True
        ):
            assert key not in rows
            rows[key] = (image, label)
    return rows, schema


def test_every_pixel_of_the_archive_arrives(tmp_path, archive, batches):
    summary = prepare_corpus(settings(source=archive, output=tmp_path / "out", shard_rows=70))
    assert {key: summary[key] for key in ("train", "validation", "test", "unreadable")} == {
        "train": 180,
        "validation": 20,
        "test": 20,
        "unreadable": 0,
    }
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == [
        "manifest.json",
        "test-00000-of-00001.parquet",
        "train-00000-of-00003.parquet",
        "train-00001-of-00003.parquet",
        "train-00002-of-00003.parquet",
        "validation-00000-of-00001.parquet",
    ]
    seen = {}
    for split in ("train", "validation", "test"):
        rows, schema = read_split(tmp_path / "out", split)
        assert label_names(schema) == CLASS_NAMES
        # The official order within a split.
        assert list(rows) == sorted(rows)
        assert all(key.startswith("test_batch") == (split == "test") for key in rows)
        counts = np.bincount([label for _, label in rows.values()])
        assert len(set(counts.tolist())) == 1
        seen.update(rows)
    assert seen.keys() == batches[1].keys()
    for key, (pixels, label) in seen.items():
        np.testing.assert_array_equal(pixels, batches[1][key])
        assert label == int(key[-5:]) % 10
    manifest = load_artifact(tmp_path / "out", "corpus")
    assert manifest["images_per_class"]["test"] == [2] * 10
    assert manifest["image_sizes"] == {"32x32": 220}
    assert manifest["source"]["official_archive"] is False
    assert manifest["source"]["archive_sha256"] == hashlib.sha256(archive.read_bytes()).hexdigest()
    # The corpus is one that the other jobs read.
    assert len(find_source(str(tmp_path / "out"))) == 5


def test_a_folder_of_batches_gives_the_shards_of_the_archive(tmp_path, archive, batches):
    folder = tmp_path / "extracted" / "cifar-10-batches-bin"
    folder.mkdir(parents=True)
    for name, content in batches[0].items():
        (folder / name).write_bytes(content)
    prepare_corpus(settings(source=archive, output=tmp_path / "a"))
    prepare_corpus(settings(source=folder.parent, output=tmp_path / "b"))
    prepare_corpus(settings(source=folder.parent, output=tmp_path / "c", seed=1))
    digests = [json.loads((tmp_path / name / "manifest.json").read_text())["files"] for name in "abc"]
    assert digests[0] == digests[1]
    assert digests[0]["test-00000-of-00001.parquet"] == digests[2]["test-00000-of-00001.parquet"]
    assert digests[0]["train-00000-of-00001.parquet"] != digests[2]["train-00000-of-00001.parquet"]


def test_a_download_is_checked_and_not_kept(tmp_path, archive):
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    summary = prepare_corpus(settings(output=tmp_path / "out", url=archive.as_uri(), sha256=digest))
    assert summary["train"] == 180
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cifar.tar.gz", "out"]


def test_a_download_of_another_digest_leaves_nothing(tmp_path, archive):
    with pytest.raises(FetchError, match="nothing was kept"):
        prepare_corpus(settings(output=tmp_path / "deep" / "out", url=archive.as_uri()))
    assert [path.name for path in tmp_path.iterdir()] == ["cifar.tar.gz"]


def test_the_python_version_is_never_unpickled(tmp_path):
    # A pickle that would write a file when loaded.
    trap = tmp_path / "trap"
    payload = b"cbuiltins\nopen\n(S'" + str(trap).encode() + b"'\nS'w'\ntR."
    files = {name: payload for name in ("batches.meta", "data_batch_1", "test_batch")}
    path = write_archive(tmp_path / "python.tar.gz", files, "cifar-10-batches-py")
    with pytest.raises(CorpusError, match=r"Python version.*pickles.*binary version"):
        prepare_corpus(settings(source=path, output=tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["python.tar.gz"]


def test_members_of_an_archive_cannot_leave_the_folder(tmp_path, batches):
    path = write_archive(tmp_path / "a.tar.gz", batches[0], "../../..")
    prepare_corpus(settings(source=path, output=tmp_path / "x" / "out"))
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file() and path.suffix == ".bin") == []


def special(name, kind, target=""):
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


@pytest.mark.parametrize(
    ("kind", "target"),
    [
        (tarfile.SYMTYPE, "{secret}"),
        (tarfile.SYMTYPE, "../../secret"),
        (tarfile.SYMTYPE, "data_batch_1.bin"),
        (tarfile.LNKTYPE, "{secret}"),
        (tarfile.LNKTYPE, "nowhere"),
        (tarfile.CHRTYPE, ""),
        (tarfile.BLKTYPE, ""),
        (tarfile.FIFOTYPE, ""),
        (tarfile.DIRTYPE, ""),
    ],
)
@pytest.mark.parametrize("name", ["test_batch.bin", "/test_batch.bin", "a/../../test_batch.bin"])
def test_batches_that_are_no_plain_files_are_refused(tmp_path, batches, kind, target, name):
    secret = tmp_path / "secret"
    secret.write_bytes(batches[0]["test_batch.bin"])
    path = write_archive(tmp_path / "a.tar", _damaged(batches[0], "test_batch.bin", None), mode="w")
    with tarfile.open(path, "a") as tar:
        tar.addfile(special(name, kind, target.format(secret=secret)))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(CorpusError, match=r"test_batch\.bin twice, or as a link, a device or a folder"):
        prepare_corpus(settings(source=path, output=tmp_path / "out"))
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["../canary", "{folder}/canary", "canary", "x/../../../../canary"])
@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
def test_what_else_an_archive_holds_is_never_written(tmp_path, batches, name, kind):
    path = write_archive(tmp_path / "a.tar", batches[0], mode="w")
    with tarfile.open(path, "a") as tar:
        tar.addfile(special(name.format(folder=tmp_path), kind, "/etc/passwd"))
    assert prepare_corpus(settings(source=path, output=tmp_path / "x" / "out"))["test"] == 20
    assert not [found for found in tmp_path.rglob("*") if "canary" in found.name]


def test_a_link_does_not_lead_a_later_file_astray(tmp_path, batches):
    # The folder of the batches is a link to a folder outside, and then the batches come.
    outside = tmp_path / "outside"
    outside.mkdir()
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        tar.addfile(special("cifar-10-batches-bin", tarfile.SYMTYPE, str(outside)))
        for name, content in batches[0].items():
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    prepare_corpus(settings(source=path, output=tmp_path / "out"))
    assert list(outside.iterdir()) == []


def test_a_batch_that_is_there_twice_is_refused(tmp_path, batches):
    path = write_archive(tmp_path / "a.tar", batches[0], mode="w")
    with tarfile.open(path, "a") as tar:
        member = tarfile.TarInfo("elsewhere/data_batch_2.bin")
        member.size = RECORD_BYTES
        tar.addfile(member, io.BytesIO(b"\0" * RECORD_BYTES))
    with pytest.raises(CorpusError, match=r"data_batch_2\.bin twice"):
        prepare_corpus(settings(source=path, output=tmp_path / "out"))


def test_an_archive_that_unpacks_to_too_much_is_refused(tmp_path, batches):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        member = tarfile.TarInfo("zeros")
        member.size = 2**40
        tar.addfile(member)
    with pytest.raises(CorpusError, match="holds more than"):
        prepare_corpus(settings(source=path, output=tmp_path / "out"))
    path = write_archive(tmp_path / "b.tar", {f"{number}": b"" for number in range(1001)}, mode="w")
    with pytest.raises(CorpusError, match="holds more than"):
        prepare_corpus(settings(source=path, output=tmp_path / "out"))


def test_a_pickle_with_the_name_of_a_batch_is_data(tmp_path, batches):
    trap = tmp_path / "trap"
    payload = b"cbuiltins\nopen\n(S'" + str(trap).encode() + b"'\nS'w'\ntR."
    path = write_archive(tmp_path / "a.tar.gz", {**batches[0], "test_batch.bin": payload, "x.pkl": payload})
    with pytest.raises(CorpusError, match="multiple of a record"):
        prepare_corpus(settings(source=path, output=tmp_path / "out"))
    assert not trap.exists()


@hypothesis_settings(deadline=None, max_examples=150)
@given(position=st.floats(0, 1), values=st.binary(min_size=1, max_size=8))
def test_a_damaged_archive_is_refused_or_read(tmp_path_factory, position, values):
    folder = tmp_path_factory.mktemp("damaged")
    path = write_archive(folder / "a.tar", {"data_batch_1.bin": b"x" * 700, "y": b"y"}, mode="w")
    data = bytearray(path.read_bytes())
    start = int(position * 2500)
    data[start : start + len(values)] = values
    path.write_bytes(data)
    with pytest.raises(CorpusError):
        extract_batches(path, folder)


def _damaged(files, name, content):
    return {**files, name: content} if content is not None else {k: v for k, v in files.items() if k != name}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("data_batch_3.bin", None, "it has no data_batch_3.bin"),
        ("data_batch_3.bin", b"", "has 0 bytes"),
        ("data_batch_3.bin", b"x" * 5000, f"multiple of a record's {RECORD_BYTES}"),
        ("test_batch.bin", b"\x0a" + b"x" * (RECORD_BYTES - 1), "has label 10"),
        ("test_batch.bin", b"\x00" * RECORD_BYTES, "split test has no image of automobile, bird"),
    ],
)
def test_damaged_batches_are_refused(tmp_path, batches, name, content, message):
    path = write_archive(tmp_path / "a.tar.gz", _damaged(batches[0], name, content))
    with pytest.raises(CorpusError, match=message):
        prepare_corpus(settings(source=path, output=tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar.gz"]


def test_archives_cut_off_are_refused(tmp_path, archive):
    data = archive.read_bytes()
    for content in (data[: len(data) // 2], b"no archive", b""):
        archive.write_bytes(content)
        with pytest.raises(CorpusError, match="not a readable tar archive"):
            prepare_corpus(settings(source=archive, output=tmp_path / "out"))


def test_the_shift_leaves_the_grid_and_reflects(smooth_pixels):
    pixels = smooth_pixels(1, 32, 32, seed=2)[0]
    shifted = shift_off_grid(pixels)
    np.testing.assert_array_equal(shifted[3:, 3:], pixels[:29, :29])
    np.testing.assert_array_equal(shifted[3:, :3], pixels[:29, 3:0:-1])
    np.testing.assert_array_equal(shifted[:3, 3:], pixels[3:0:-1, :29])


@pytest.mark.parametrize("grid_shift", [False, True])
def test_a_cifar_copy_in_jpeg_files(tmp_path, smooth_pixels, encoded, caplog, grid_shift):
    pixels = smooth_pixels(60, 32, 32, seed=0)
    for number, image in enumerate(pixels):
        split, count = ("test", number) if number < 20 else ("train", number)
        folder = tmp_path / "in" / split / CLASS_NAMES[number % 10]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{count}.jpg").write_bytes(encoded(image, "JPEG", quality=90))
    prepare_corpus(
        settings(
            source=tmp_path / "in", output=tmp_path / "out", grid_shift=grid_shift, validation_share=0.25
        )
    )
    assert ("--grid-shift" in caplog.text) != grid_shift
    rows, _ = read_split(tmp_path / "out", "test")
    assert len(rows) == 20
    for key, (image, _) in rows.items():
        stored = decode_image((tmp_path / "in" / f"{key}.jpg").read_bytes(), DecodeLimits())
        np.testing.assert_array_equal(image, shift_off_grid(stored) if grid_shift else stored)


@pytest.fixture
def filter_folder(tmp_path, smooth_pixels, encoded):
    """Two classes of twenty images of 24 x 30 pixels, one of them broken and one a mislabelled text."""
    for name in ("drug", "gun"):
        folder = tmp_path / "in" / name
        folder.mkdir(parents=True)
        for number, pixels in enumerate(smooth_pixels(20, 24, 30, seed=len(name))):
            (folder / f"{number:02d}.png").write_bytes(encoded(pixels))
    (tmp_path / "in" / "drug" / "03.png").write_bytes(b"text")
    (tmp_path / "in" / "gun" / "04.png").write_bytes(encoded(pixels)[:200])
    return tmp_path / "in"


def test_a_content_filter_folder_with_unreadable_files(tmp_path, filter_folder):
    output = tmp_path / "out"
    summary = prepare_corpus(
        settings("content_filter", source=filter_folder, output=output, image_size=16, shard_megabytes=0.005)
    )
    assert summary["unreadable"] == 2
    assert summary["train"] + summary["validation"] + summary["test"] == 38
    manifest = load_artifact(output, "corpus")
    listed = {(item["image_id"], item["reason"]) for item in manifest["unreadable"]}
    assert listed == {("drug/03", "unsupported_format"), ("gun/04", "decode_error")}
    assert manifest["image_sizes"] == {"16x16": 38}
    assert manifest["settings"]["image_size"] == 16
    # Shards are cut by bytes as well as by rows.
    assert len(list(output.glob("train-*"))) > 2
    rows, schema = read_split(output, "train")
    assert label_names(schema) == ("drug", "gun")
    assert len(rows) == summary["train"]
    assert all(image.shape == (16, 16, 3) for image, _ in rows.values())
    assert all(key.startswith(("drug", "gun")[label]) for key, (_, label) in rows.items())


def test_imagenet_folders(tmp_path, filter_folder):
    for split in ("train", "val"):
        (tmp_path / "net" / split).mkdir(parents=True)
        for name in ("drug", "gun"):
            (tmp_path / "net" / split / name).symlink_to(filter_folder / name)
    options = {"source": tmp_path / "net", "synsets": ("gun", "drug"), "validation_share": 0.2}
    summary = prepare_corpus(settings("imagenet10", output=tmp_path / "out", **options))
    assert summary["unreadable"] == 4
    rows, schema = read_split(tmp_path / "out", "test")
    assert label_names(schema) == ("gun", "drug")
    assert all(key.split("/")[1] == ("gun", "drug")[label] for key, (_, label) in rows.items())
    assert {image.shape for image, _ in rows.values()} == {(64, 64, 3)}


@pytest.mark.parametrize("name", ["imagenet10", "content_filter"])
def test_what_needs_an_account_is_not_downloaded(tmp_path, name):
    with pytest.raises(CorpusError, match="cannot be downloaded without an account: --source"):
        prepare_corpus(settings(name, output=tmp_path / "out"))


@pytest.mark.parametrize(
    ("dataset", "fields", "message"),
    [
        ("cifar10", {"image_size": 64}, "CIFAR-10 is 32 x 32"),
        ("imagenet10", {"synsets": ("a", "a")}, "two different classes"),
        ("imagenet10", {}, "must have the folders train and val"),
        ("content_filter", {"output": "in/out"}, "lies inside the source"),
        ("content_filter", {"output": "in"}, "exists already"),
    ],
)
def test_settings_that_cannot_work(tmp_path, filter_folder, dataset, fields, message):
    output = tmp_path / fields.get("output", "deep/out")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(CorpusError, match=message):
        prepare_corpus(settings(dataset, **{"source": filter_folder, **fields, "output": output}))
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "fields", [{"validation_share": 0}, {"validation_share": 1}, {"sha256": "abc"}, {"shard_rows": 0}]
)
def test_values_out_of_range(tmp_path, fields):
    with pytest.raises(ValidationError):
        settings(output=tmp_path, **fields)


def test_shards_hold_at_most_the_rows_and_bytes_asked_for(tmp_path, smooth_pixels):
    pixels = smooth_pixels(7, 16, 16, seed=0)
    for name, limits, expected in (
        ("rows", {"max_rows": 3, "max_bytes": 10**9}, [3, 3, 1]),
        ("bytes", {"max_rows": 100, "max_bytes": 1}, [1] * 7),
        ("exact", {"max_rows": 7, "max_bytes": 10**9}, [7]),
    ):
        writer = ShardWriter(tmp_path / name, "train", ["x"], **limits)
        for number, image in enumerate(pixels):
            writer.add(image, 0, str(number))
        paths = writer.close()
        assert [pq.read_metadata(path).num_rows for path in paths] == expected
        assert sorted((tmp_path / name).iterdir()) == paths
        assert paths[-1].name == f"train-{len(expected) - 1:05d}-of-{len(expected):05d}.parquet"
