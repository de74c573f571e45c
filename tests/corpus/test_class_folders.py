"""Image folders: listing, geometry of the centre square, flat test folders, refusals."""

import numpy as np
import pytest

from acsr_ray.corpus.class_folders import centre_square, read_class_folder, read_split_folder, square_reader
from acsr_ray.corpus.images import ImageError
from acsr_ray.corpus.samples import Sample
from acsr_ray.corpus.sources import CorpusError

CLASSES = {"n1": "ant", "n2": "bee"}


@pytest.fixture
def fill(tmp_path, smooth_pixels, encoded):
    """Write PNG files of 10 x 12 pixels below tmp_path."""

    def write(folder: str, names, side: int = 10) -> None:
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        for seed, name in enumerate(names):
            (tmp_path / folder / name).write_bytes(encoded(smooth_pixels(1, side, side + 2, seed=seed)[0]))

    return write


def _names(count, prefix="i"):
    return [f"{prefix}{number:02d}.png" for number in range(count)]


def _split(folder, **options):
    return read_split_folder(
        folder, CLASSES, **{"image_size": 8, "validation_share": 0.2, "seed": 0, **options}
    )


@pytest.mark.parametrize(("height", "width"), [(20, 30), (30, 20), (25, 25), (7, 90)])
@pytest.mark.parametrize("size", [8, 16, 64])
def test_the_square_is_the_centre(height, width, size):
    # A horizontal and a vertical ramp: the centre of the square must be the centre of the image.
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0] = np.linspace(0, 255, width)[None, :]
    pixels[..., 1] = np.linspace(0, 255, height)[:, None]
    square = centre_square(pixels, size)
    assert square.shape == (size, size, 3)
    assert square.dtype == np.uint8
    middle = square.reshape(-1, 3).mean(0)
    assert abs(middle[0] - 127.5) < 6
    assert abs(middle[1] - 127.5) < 6
    # The shorter side is kept whole, the longer one is cut in proportion.
    for channel, axis, length in ((0, 1, width), (1, 0, height)):
        line = square[..., channel].mean(1 - axis)
        expected = 255 * min(height, width) / length
        assert line[-1] - line[0] == pytest.approx(expected, abs=0.25 * expected)


def test_pixels_of_the_right_size_are_left_alone(smooth_pixels):
    pixels = smooth_pixels(1, 9, 9, seed=0)[0]
    assert centre_square(pixels, 9) is pixels


def test_extreme_shapes_are_refused_before_they_fill_the_memory():
    with pytest.raises(ImageError, match="too_large"):
        centre_square(np.zeros((1, 2000, 3), np.uint8), 64)


def test_a_split_folder_is_listed(tmp_path, fill):
    for name in CLASSES:
        fill(f"train/{name}", _names(10, "t"))
        fill(f"val/{name}", _names(3, "v"))
    fill("train/other", _names(2))
    (tmp_path / "train" / "n1" / "readme.txt").write_text("no image")
    (tmp_path / "train" / "n1" / "._t00.png").write_bytes(b"left by a Mac")
    found = _split(tmp_path)
    assert found.class_names == ("ant", "bee")
    assert {name: len(split) for name, split in found.splits.items()} == {
        "train": 16,
        "validation": 4,
        "test": 6,
    }
    ids = {s.image_id for split in found.splits.values() for s in split}
    assert len(ids) == 26
    assert {"train/n1/t00", "val/n2/v02"} <= ids
    assert all(s.image_id.split("/")[1] == tuple(CLASSES)[s.label] for s in found.splits["train"])
    assert found.read(found.splits["test"][0]).shape == (8, 8, 3)
    assert _split(tmp_path).splits == found.splits
    assert _split(tmp_path, seed=1).splits != found.splits


def test_a_flat_test_folder_takes_its_labels_from_a_csv(tmp_path, fill):
    for name in CLASSES:
        fill(f"train/{name}", _names(5))
    fill("val", _names(4, "v"))
    labels = tmp_path / "truth.csv"
    labels.write_text("ImageId,PredictionString\nv00,n2 1 2 3 4\nv01.png,n1\nv02,n9 5 5 5 5\nv03,n2 \n")
    found = _split(tmp_path, test_labels=labels)
    assert {s.image_id: s.label for s in found.splits["test"]} == {"val/v00": 1, "val/v01": 0, "val/v03": 1}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("v00,n1\n", "no label of 1 files"),
        ("v00\nv01\n", "two columns"),
        ("", "two columns"),
        (None, "not a readable CSV"),
    ],
)
def test_bad_label_files_are_refused(tmp_path, fill, content, message):
    for name in CLASSES:
        fill(f"train/{name}", _names(5))
    fill("val", _names(2, "v"))
    labels = tmp_path / "truth.csv"
    if content is not None:
        labels.write_text(content)
    with pytest.raises(CorpusError, match=message):
        _split(tmp_path, test_labels=labels)


def test_split_folders_that_cannot_be_used(tmp_path, fill):
    with pytest.raises(CorpusError, match="must have the folders train and val"):
        _split(tmp_path)
    fill("train/n1", _names(3))
    fill("val", _names(1))
    with pytest.raises(CorpusError, match="n2 does not exist"):
        _split(tmp_path)
    (tmp_path / "train" / "n2").mkdir()
    with pytest.raises(CorpusError, match="n2 has no image"):
        _split(tmp_path)
    fill("train/n2", _names(3))
    with pytest.raises(CorpusError, match="val has no class sub-folders; --test-labels"):
        _split(tmp_path)


def test_a_class_folder_is_split_fourteen_three_three(tmp_path, fill):
    for name, count in (("neutral", 40), ("alcohol", 20)):
        fill(name, _names(count))
    found = read_class_folder(tmp_path, image_size=8, seed=0)
    assert found.class_names == ("alcohol", "neutral")
    sizes = {name: sorted(s.label for s in split) for name, split in found.splits.items()}
    assert sizes == {
        "train": [0] * 14 + [1] * 28,
        "validation": [0] * 3 + [1] * 6,
        "test": [0] * 3 + [1] * 6,
    }
    ids = [s.image_id for split in found.splits.values() for s in split]
    assert len(set(ids)) == 60
    assert read_class_folder(tmp_path, image_size=8, seed=0).splits == found.splits


def test_class_folders_that_cannot_be_used(tmp_path, fill):
    fill("only", _names(2))
    with pytest.raises(CorpusError, match="two at least; it has 1"):
        read_class_folder(tmp_path, image_size=8, seed=0)
    (tmp_path / "void").mkdir()
    with pytest.raises(CorpusError, match="void has no image"):
        read_class_folder(tmp_path, image_size=8, seed=0)
    fill("train", _names(2))
    with pytest.raises(CorpusError, match="split already"):
        read_class_folder(tmp_path, image_size=8, seed=0)


def test_names_that_differ_in_the_suffix_alone_are_refused(tmp_path, fill):
    fill("a", ["x.png", "x.jpg"])
    fill("b", ["x.png"])
    with pytest.raises(CorpusError, match=r"a/x.jpg and x.png have the same name"):
        read_class_folder(tmp_path, image_size=8, seed=0)


def test_files_that_cannot_be_read_are_the_image_s_fault(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG but no more")
    read = square_reader(8)
    for name in ("broken.png", "gone.png"):
        with pytest.raises(ImageError, match="decode_error"):
            read(Sample("x", 0, tmp_path / name))
