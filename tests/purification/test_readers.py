"""The output as other tools read it: every column as it was, Hugging Face, DuckDB and pandas."""

import json
import re
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from acsr_ray.columns import ORIGINAL, OUTCOME, UNIT
from acsr_ray.corpus.images import DecodeLimits, decode_image
from acsr_ray.corpus.schema import IMAGE_TYPE
from acsr_ray.corpus.units import plan_units
from acsr_ray.purification.stages import (
    DecodeImages,
    EncodeImages,
    PurifyImages,
    ReadUnits,
    SelectClusters,
    WriteUnits,
)

README = Path(__file__).parents[2] / "README.md"
SECTION = "### Read the output with other tools"
ROWS = 6


@pytest.fixture(scope="module")
def purify(tiny_bundle):
    """Purify a corpus without Ray."""

    def call(source, output, *, keep_original=False):
        bundle = str(tiny_bundle)
        stages = (
            ReadUnits(),
            DecodeImages("image", DecodeLimits()),
            EncodeImages(bundle, "cpu", 64, threads=1),
            SelectClusters(bundle, threads=1),
            PurifyImages(bundle, "cpu", 64, threads=1),
            WriteUnits(str(output), "f" * 64, "image", keep_original),
        )
        plan = {"image_column": "image", "unit_rows": 4, "unit_megabytes": 32, "limit": None}
        for unit in plan_units(str(source), **plan):
            table = pa.table({UNIT: [unit.to_json()]})
            for stage in stages:
                table = stage(table)
        return output / "data"

    return call


def value(dtype):
    return {"dtype": dtype, "_type": "Value"}


COLUMNS = {
    "tags": (
        pa.array([["a", "b"], [], None, ["c"], ["d"], ["e"]]),
        {"feature": value("string"), "_type": "List"},
    ),
    "boxes": (
        pa.array(
            [{"x": 1.5, "deep": [{"y": row}]} for row in range(ROWS)],
            pa.struct([("x", pa.float64()), ("deep", pa.list_(pa.struct([("y", pa.int8())])))]),
        ),
        {"x": value("float64"), "deep": {"feature": {"y": value("int8")}, "_type": "List"}},
    ),
    "nanoseconds": (pa.array(range(10**18, 10**18 + ROWS), pa.timestamp("ns")), value("timestamp[ns]")),
    "zoned": (
        pa.array([*range(ROWS - 1), None], pa.timestamp("ms", tz="Europe/Berlin")),
        value("timestamp[ms, tz=Europe/Berlin]"),
    ),
    "coded": (pa.array(["x", "y", None, "x", "x", "y"]).dictionary_encode(), None),
    "large": (pa.array(["ü" * 50] * ROWS, pa.large_string()), value("large_string")),
    "vector": (
        pa.array([[1.0, 2.0]] * ROWS, pa.list_(pa.float32(), 2)),
        {"feature": value("float32"), "length": 2, "_type": "List"},
    ),
    "unsigned": (pa.array([2**64 - 1] * ROWS, pa.uint64()), value("uint64")),
    "half": (pa.array([1.5] * ROWS, pa.float16()), value("float16")),
    "decimal": (pa.array([1] * ROWS, pa.decimal128(10, 2)), value("decimal128(10, 2)")),
    "day": (pa.array([1] * ROWS, pa.date32()), value("date32")),
    "blob": (pa.array([b"\x00\xff"] * ROWS), value("binary")),
}


@pytest.fixture(scope="module")
def rich(hf_table, encoded, smooth_pixels, tmp_path_factory):
    """A shard with columns of many kinds, one of them images that are not to be purified."""
    images = [encoded(image) for image in smooth_pixels(ROWS, 16, 16, seed=1)]
    table = hf_table([*images[:2], b"damaged", *images[3:]])
    content = json.loads(table.schema.metadata[b"huggingface"])
    features = content["info"]["features"]
    for name, (values, feature) in COLUMNS.items():
        field = pa.field(name, values.type, nullable=name != "day", metadata={"note": name})
        table = table.append_column(field, values)
        if feature:
            features[name] = feature
    cells = [{"bytes": data, "path": None} for data in images]
    table = table.append_column("thumbnail", pa.array(cells, IMAGE_TYPE))
    features["thumbnail"] = {"_type": "Image"}
    content["info"]["license"] = "mine"
    path = tmp_path_factory.mktemp("rich") / "a.parquet"
    metadata = {"huggingface": json.dumps(content), "other": "kept"}
    pq.write_table(table.replace_schema_metadata(metadata), path, row_group_size=4)
    return path


@pytest.mark.parametrize("keep_original", [False, True])
def test_every_other_column_comes_out_as_it_went_in(rich, purify, tmp_path, keep_original):
    before = pq.read_table(rich)
    files = sorted(purify(rich, tmp_path / "out", keep_original=keep_original).iterdir())
    assert len(files) == 2
    added = [*OUTCOME.names, *([ORIGINAL] if keep_original else [])]
    for path, start in zip(files, (0, 4), strict=True):
        after = pq.read_table(path)
        part = before.slice(start, after.num_rows)
        assert after.column_names == [*before.column_names, *added]
        for field in before.schema:
            assert after.schema.field(field.name).equals(field, check_metadata=True)
            if field.name != "image":
                assert after[field.name].combine_chunks().equals(part[field.name].combine_chunks()), (
                    field.name
                )
        assert after.schema.metadata[b"other"] == b"kept"
        info = json.loads(after.schema.metadata[b"huggingface"])["info"]
        own = json.loads(before.schema.metadata[b"huggingface"])["info"]
        assert info["license"] == "mine"
        assert list(info["features"]) == [*own["features"], *added]
        assert {name: info["features"][name] for name in own["features"]} == own["features"]
        if keep_original:
            assert info["features"][ORIGINAL] == own["features"]["image"]


def test_hugging_face_datasets(rich, purify, tmp_path):
    datasets = pytest.importorskip("datasets")
    data = purify(rich, tmp_path / "out", keep_original=True)
    options = {"data_files": f"{data}/**/*.parquet", "split": "train", "cache_dir": str(tmp_path / "cache")}
    found = datasets.load_dataset("parquet", **options)
    assert found.num_rows == ROWS
    before = datasets.Features.from_arrow_schema(pq.read_schema(rich))
    assert {name: found.features[name] for name in before} == before
    assert list(found.features) == [*before, *OUTCOME.names, ORIGINAL]
    assert isinstance(found.features[ORIGINAL], datasets.Image)
    assert isinstance(found.features["label"], datasets.ClassLabel)
    assert found.features["acsr_residual"] == datasets.Value("float32")
    assert found[0]["image"].size == found[0][ORIGINAL].size == (16, 16)
    assert found[2]["image"] is None
    assert found["acsr_reason"][2] == "unsupported_format"
    streamed = datasets.load_dataset("parquet", streaming=True, **options)
    assert streamed.features == found.features
    assert [row["id"] for row in streamed] == list(range(1000, 1000 + ROWS))


def blocks() -> list[str]:
    """Return the Python blocks of the README's section."""
    _, _, rest = README.read_text().partition(f"{SECTION}\n")
    section = re.split(r"^#{2,3} ", rest, maxsplit=1, flags=re.MULTILINE)[0]
    return re.findall(r"^```python\n(.*?)^```", section, re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def corpus(purify, encoded, smooth_pixels, tmp_path_factory):
    """`shards/` and `out/` as the README has them: two shards, a damaged image in each."""
    folder = tmp_path_factory.mktemp("readers")
    for number, name in enumerate(("a.parquet", "split=train/b.parquet")):
        images = [encoded(image) for image in smooth_pixels(ROWS, 16, 16, seed=number)]
        images[3] = b"" if number else b"damaged"
        cells = [{"bytes": data, "path": f"{number}-{row}.png"} for row, data in enumerate(images)]
        columns = {
            "image_id": [f"{number}-{row}" for row in range(ROWS)],
            "image": pa.array(cells, IMAGE_TYPE),
            "label": list(range(ROWS)),
        }
        path = folder / "shards" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(columns), path)
    purify(folder / "shards", folder / "out")
    return folder


@pytest.mark.skipif(not blocks(), reason=f"the README has no section {SECTION!r}")
def test_what_the_readme_shows(corpus, monkeypatch, capsys):
    pytest.importorskip("duckdb")
    monkeypatch.chdir(corpus)
    shown = {}
    for block in blocks():
        if "from datasets import" not in block:  # its own test is above
            exec(compile(block, str(README), "exec"), shown)
    counts = {("quarantined", "empty"): 1, ("quarantined", "unsupported_format"): 1, ("purified", None): 10}
    assert {row[:2]: row[2] for row in shown["counts"].fetchall()} == counts
    assert "0-3.png" in capsys.readouterr().out
    assert pq.read_table("train.parquet").num_rows == 10

    pixels = {f"{n}-{row}": n for n in (0, 1) for row in range(ROWS)}
    changed = shown["changed"].fetchall()
    assert len(changed) == 10
    assert all(more[1] >= less[1] for more, less in pairwise(changed))
    assert {row[0] for row in changed} == pixels.keys() - {"0-3", "1-3"}
    for _, residual, before, after in changed:
        x, y = (decode_image(data, DecodeLimits()).astype(float) for data in (before, after))
        assert (((y - x) ** 2).sum() / (x**2).sum()) ** 0.5 == pytest.approx(residual, rel=0.05)

    pairs = shown["pairs"].fetchall()
    assert [row[:2] for row in pairs] == [
        (shard, row) for shard in ("a", "split=train/b") for row in range(ROWS)
    ]
    for shard, row, before, after, status in pairs:
        assert before["path"] == f"{int(shard != 'a')}-{row}.png"
        assert (after is None) == (row == 3) == (status == "quarantined")
        assert after is None or after["path"] == before["path"]

    assert len(shown["rows"]) == 12
    assert "split" not in shown["rows"]
    assert len(shown["both"]) == 10
    assert all(row.image["path"] == row.image_before["path"] for row in shown["both"].itertuples())
