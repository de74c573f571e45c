"""The stages called in sequence on a shard, without Ray: rows, columns, schema and bytes of the output."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from acsr_ray.columns import (
    CLASS,
    CLUSTER,
    DISTANCE,
    ORIGINAL,
    OUTCOME,
    PURIFIED,
    QUARANTINED,
    REASON,
    RESIDUAL,
    STATUS,
    TRAVELLING,
    UNIT,
)
from acsr_ray.corpus.images import DecodeLimits, decode_image, to_pixels, to_unit_range
from acsr_ray.corpus.ledger import Ledger
from acsr_ray.corpus.sources import CorpusError
from acsr_ray.corpus.units import plan_units
from acsr_ray.purification.options import PurifyOptions
from acsr_ray.purification.purifier import Purifier
from acsr_ray.purification.stages import (
    DecodeImages,
    EncodeImages,
    PurifyImages,
    ReadUnits,
    SelectClusters,
    WriteUnits,
)

LIMITS = DecodeLimits(max_side=64)
FINGERPRINT = "f" * 64
DETAILS = (CLASS, CLUSTER, DISTANCE, RESIDUAL)


@pytest.fixture
def run(tiny_bundle, tmp_path):
    """Push a corpus through all stages; returns the output tables in name order and the ledger."""

    def call(
        source,
        *,
        image_column="image",
        batch_size=64,
        keep_original=False,
        unit_rows=250,
        out="out",
        bundle=tiny_bundle,
        options=None,
    ):
        import torch

        bundle, output = str(bundle), str(tmp_path / out)
        stages = (
            ReadUnits(),
            DecodeImages(image_column, LIMITS),
            EncodeImages(bundle, "cpu", batch_size, threads=1, options=options),
            SelectClusters(bundle, threads=1, options=options),
            PurifyImages(bundle, "cpu", batch_size, threads=1, options=options),
            WriteUnits(output, FINGERPRINT, image_column, keep_original),
        )
        units = plan_units(
            str(source), image_column=image_column, unit_rows=unit_rows, unit_megabytes=32, limit=None
        )
        names = []
        for unit in units:
            table = pa.table({UNIT: [unit.to_json()]})
            for stage in stages:
                before = table
                rows = table.num_rows
                table = stage(table)
                if not isinstance(stage, ReadUnits | WriteUnits):
                    assert table.num_rows == rows
                    kept = [name for name in before.column_names if name in table.column_names]
                    assert kept == before.column_names
            assert table["rows"].to_pylist() == [unit.num_rows]
            names += table["name"].to_pylist()
        assert torch.is_grad_enabled()
        ledger = Ledger(output)
        assert ledger.published() == set(names)
        return [pq.read_table(Path(ledger.output) / "data" / name) for name in names], ledger

    return call


@pytest.fixture
def damaged(smooth_pixels, encoded, hf_table):
    """A table of 12 rows of two sizes, six of them damaged in one way each."""
    small = [encoded(image) for image in smooth_pixels(4, 16, 16, seed=1)]
    wide = [encoded(image) for image in smooth_pixels(2, 12, 30, seed=2)]
    truncated = encoded(smooth_pixels(1, 40, 40, seed=3)[0])[:600]
    large = encoded(smooth_pixels(1, 10, 65, seed=4)[0])
    gif = encoded(smooth_pixels(1, 8, 8, seed=5)[0], "GIF")
    cells = [
        None,
        small[0],
        wide[0],
        b"",
        small[1],
        truncated,
        large,
        small[2],
        gif,
        b"text",
        wide[1],
        small[3],
    ]
    return hf_table(cells)


EXPECTED = {
    0: "null_image",
    3: "empty",
    5: "decode_error",
    6: "too_large",
    8: "unsupported_format",
    9: "unsupported_format",
}


def test_columns_order_and_schema(run, damaged, write_parquet, tmp_path):
    (table,), _ = run(write_parquet(tmp_path / "a.parquet", damaged))
    assert table.column_names == [*damaged.column_names, *OUTCOME.names]
    assert not set(TRAVELLING) & set(table.column_names)
    for field in (*damaged.schema, *OUTCOME):
        assert table.schema.field(field.name).type == field.type
    described = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
    assert list(described) == table.column_names
    for name in ("id", "label", "caption"):
        assert table[name].equals(damaged[name]), name


def test_statuses_and_reasons(run, damaged, write_parquet, tmp_path):
    (table,), ledger = run(write_parquet(tmp_path / "a.parquet", damaged))
    statuses = [QUARANTINED if row in EXPECTED else PURIFIED for row in range(12)]
    assert table[STATUS].to_pylist() == statuses
    assert table[REASON].to_pylist() == [EXPECTED.get(row) for row in range(12)]
    for name in ("image", *DETAILS):
        valid = table[name].is_valid().to_pylist()
        assert valid == [row not in EXPECTED for row in range(12)], name
    (name,) = ledger.published()
    receipt = ledger.receipt(name)
    assert receipt.rows == 12
    assert receipt.statuses == {PURIFIED: 6, QUARANTINED: 6}
    assert receipt.reasons == {
        "null_image": 1,
        "empty": 1,
        "decode_error": 1,
        "too_large": 1,
        "unsupported_format": 2,
    }


def test_pixels_are_those_of_the_purifier(run, damaged, write_parquet, tmp_path, tiny_bundle):
    import torch

    (table,), _ = run(write_parquet(tmp_path / "a.parquet", damaged))
    purifier = Purifier.load(tiny_bundle)
    for row in range(12):
        if row in EXPECTED:
            continue
        before = damaged["image"][row].as_py()
        after = table["image"][row].as_py()
        assert after["path"] == before["path"]
        pixels = decode_image(before["bytes"], LIMITS)
        with torch.no_grad():
            outcome = purifier.purify(torch.from_numpy(to_unit_range(pixels))[None])
        got = decode_image(after["bytes"], LIMITS)
        assert got.shape == pixels.shape
        assert (got == to_pixels(outcome.images[0].numpy())).all()
        assert (got != pixels).any()
        assert table[CLASS][row].as_py() == outcome.class_id.item()
        assert table[CLUSTER][row].as_py() == outcome.cluster_id.item()
        assert table[DISTANCE][row].as_py() == outcome.distance.item()
        assert table[RESIDUAL][row].as_py() == pytest.approx(outcome.residual.item())


@pytest.fixture(scope="module")
def kinds(tiny_bundle, make_unrolled_bundle, tmp_path_factory):
    folder = tmp_path_factory.mktemp("kinds")
    built = {name: make_unrolled_bundle(folder / name, name) for name in ("global", "thresholds", "filters")}
    return {"cbpdn": tiny_bundle, **built}


@pytest.mark.parametrize(
    ("kind", "given"),
    [
        ("cbpdn", {"top_k": 3, "strength": 2.0}),
        ("global", {}),
        ("global", {"strength": "auto"}),
        ("thresholds", {"top_k": 2}),
        ("filters", {"top_k": 9, "strength": 0.5}),
        ("filters", {"reconstruction": "cbpdn", "strength": "auto", "top_k": 2}),
    ],
)
def test_options_give_the_pixels_of_the_purifier(run, kinds, damaged, write_parquet, tmp_path, kind, given):
    import torch

    options = PurifyOptions(**given)
    source = write_parquet(tmp_path / "a.parquet", damaged)
    (table,), _ = run(source, bundle=kinds[kind], options=options)
    purifier = Purifier.load(kinds[kind], options=options)
    for row in set(range(12)) - EXPECTED.keys():
        pixels = decode_image(damaged["image"][row].as_py()["bytes"], LIMITS)
        with torch.no_grad():
            outcome = purifier.purify(torch.from_numpy(to_unit_range(pixels))[None])
        got = decode_image(table["image"][row].as_py()["bytes"], LIMITS)
        assert (got == to_pixels(outcome.images[0].numpy())).all()
        assert table[CLASS][row].as_py() == outcome.class_id.item()
        assert table[CLUSTER][row].as_py() == outcome.cluster_id.item()
        assert table[DISTANCE][row].as_py() == outcome.distance.item()
    assert [row for row in range(12) if table["image"][row].as_py() is None] == list(EXPECTED)
    # One image per call, and few rows per unit.
    small, _ = run(source, bundle=kinds[kind], options=options, batch_size=1, unit_rows=5, out="small")
    assert pa.concat_tables(small).to_pylist() == table.to_pylist()


def test_a_unit_without_images_and_with_options(run, kinds, write_parquet, hf_table, tmp_path):
    source = write_parquet(tmp_path / "a.parquet", hf_table([None, b"x"]))
    (table,), _ = run(source, bundle=kinds["filters"], options=PurifyOptions(top_k=2, strength="auto"))
    assert table[STATUS].to_pylist() == [QUARANTINED] * 2


def test_quarantine_says_where_and_why(run, damaged, write_parquet, tmp_path):
    path = write_parquet(tmp_path / "a.parquet", damaged)
    _, ledger = run(path, unit_rows=4)
    rows = []
    for name in sorted(ledger.published()):
        file = Path(ledger.output) / "_acsr" / "quarantine" / name
        rows += pq.read_table(file).to_pylist() if file.exists() else []
    assert [list(row) for row in rows] == [["shard", "row", "path", "reason", "bytes"]] * 6
    assert {row["row"]: row["reason"] for row in rows} == EXPECTED
    for row in rows:
        assert row["shard"].endswith("/a.parquet")
        assert row["path"] == damaged["image"][row["row"]].as_py()["path"]
        assert row["bytes"] == damaged["image"][row["row"]].as_py()["bytes"]


@pytest.mark.parametrize("unit_rows", [1, 5])
def test_unit_size_changes_no_row(run, damaged, write_parquet, tmp_path, unit_rows):
    path = write_parquet(tmp_path / "a.parquet", damaged, row_group_size=5)
    whole, _ = run(path, out="whole")
    parts, _ = run(path, out="parts", unit_rows=unit_rows)
    assert len(parts) == -(-12 // unit_rows)
    assert pa.concat_tables(parts).to_pylist() == whole[0].to_pylist()


def test_batch_size_changes_no_byte(run, write_parquet, hf_table, smooth_pixels, encoded, tmp_path):
    cells = [encoded(image) for image in smooth_pixels(70, 16, 16, seed=9)]
    cells[3:3] = [encoded(image) for image in smooth_pixels(4, 9, 21, seed=10)]
    cells[8] = b"damaged"
    path = write_parquet(tmp_path / "a.parquet", hf_table(cells))
    tables = [run(path, batch_size=size, out=f"out-{size}")[0][0] for size in (1, 7, 64)]
    assert len(set(tables[0][CLASS].to_pylist())) > 2
    assert tables[0].to_pylist() == tables[1].to_pylist() == tables[2].to_pylist()


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
def test_plain_binary_stays_plain_binary_under_any_name(run, write_parquet, damaged, tmp_path, kind):
    cells = [cell["bytes"] for cell in damaged["image"].to_pylist()]
    table = pa.table({"photo": pa.array(cells, kind), "image": ["not an image"] * 12})
    (purified,), _ = run(write_parquet(tmp_path / "a.parquet", table), image_column="photo")
    assert purified.column_names == ["photo", "image", *OUTCOME.names]
    assert purified.schema.field("photo").type == kind
    assert purified["image"].equals(table["image"])
    assert purified[REASON].to_pylist() == [EXPECTED.get(row) for row in range(12)]
    assert decode_image(purified["photo"][2].as_py(), LIMITS).shape == (12, 30, 3)


def test_structs_keep_their_other_fields(run, write_parquet, damaged, tmp_path):
    kind = pa.struct([("path", pa.string()), ("bytes", pa.large_binary()), ("width", pa.int16())])
    cells = [
        {"path": cell["path"], "bytes": cell["bytes"], "width": row}
        for row, cell in enumerate(damaged["image"].to_pylist())
    ]
    cells[4] = None
    table = pa.table({"image": pa.array(cells, kind)})
    (purified,), _ = run(write_parquet(tmp_path / "a.parquet", table))
    assert purified.schema.field("image").type == kind
    assert purified["image"][7].as_py()["width"] == 7
    assert purified["image"][7].as_py()["path"] == "7.png"
    assert purified["image"][4].as_py() is None
    assert purified[REASON][4].as_py() == "null_image"


def test_keep_original(run, damaged, write_parquet, tmp_path):
    (table,), _ = run(write_parquet(tmp_path / "a.parquet", damaged), keep_original=True)
    assert table.column_names == [*damaged.column_names, *OUTCOME.names, ORIGINAL]
    assert table.schema.field(ORIGINAL).type == damaged.schema.field("image").type
    for row, cell in enumerate(table[ORIGINAL].to_pylist()):
        assert cell == (None if row in EXPECTED else damaged["image"][row].as_py())


def test_a_unit_with_no_usable_image(run, write_parquet, hf_table, tmp_path):
    (table,), _ = run(write_parquet(tmp_path / "a.parquet", hf_table([None, b"", b"x"])))
    assert table[STATUS].to_pylist() == [QUARANTINED] * 3
    assert table["image"].null_count == 3
    assert table["id"].to_pylist() == [1000, 1001, 1002]


def test_an_image_folder(run, tmp_path, smooth_pixels, encoded):
    root = tmp_path / "photos"
    for name, side in (("ant/1.png", 16), ("bee/2.png", 9), ("bee/3.gif", 8)):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        fmt = "GIF" if name.endswith("gif") else "PNG"
        (root / name).write_bytes(encoded(smooth_pixels(1, side, side, seed=side)[0], fmt))
    (table,), _ = run(root)
    assert table.column_names == ["image", "label", *OUTCOME.names]
    assert table["label"].to_pylist() == [0, 1, 1]
    assert table[REASON].to_pylist() == [None, None, "unsupported_format"]
    assert table["image"][1].as_py()["path"] == "bee/2.png"


def test_an_image_folder_under_another_column_name(run, tmp_path, smooth_pixels, encoded):
    """Refused when planned, or obeyed; it may not fail inside a stage."""
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "1.png").write_bytes(encoded(smooth_pixels(1, 8, 8, seed=0)[0]))
    try:
        (table,), _ = run(tmp_path / "photos", image_column="photo")
    except CorpusError:
        return
    assert "photo" in table.column_names


@pytest.mark.parametrize("name", TRAVELLING)
def test_columns_named_like_ours_are_refused_or_survive(run, tmp_path, write_parquet, hf_table, name):
    """A shard may bring a column `_width`; that may not fail inside a stage."""
    table = hf_table([b"x"]).append_column(name, pa.array([640]))
    try:
        (purified,), _ = run(write_parquet(tmp_path / "a.parquet", table))
    except CorpusError as refused:
        message = str(refused)
    else:
        message = name if purified[name].to_pylist() == [640] else "lost"
    assert name in message


def test_stages_leave_their_input_alone(tiny_bundle, damaged, write_parquet, tmp_path):
    path = write_parquet(tmp_path / "a.parquet", damaged)
    (unit,) = plan_units(str(path), image_column="image", unit_rows=99, unit_megabytes=32, limit=None)
    decoded = DecodeImages("image", LIMITS)(ReadUnits()(pa.table({UNIT: [unit.to_json()]})))
    before = decoded.to_pylist()
    encoded = EncodeImages(str(tiny_bundle), "cpu", 8, threads=1)(decoded)
    PurifyImages(str(tiny_bundle), "cpu", 8, threads=1)(SelectClusters(str(tiny_bundle), threads=1)(encoded))
    assert decoded.to_pylist() == before


def test_a_solver_that_fails_is_recorded(tiny_bundle, damaged, write_parquet, tmp_path):
    path = write_parquet(tmp_path / "a.parquet", damaged)
    (unit,) = plan_units(str(path), image_column="image", unit_rows=99, unit_megabytes=32, limit=None)
    bundle = str(tiny_bundle)
    table = DecodeImages("image", LIMITS)(ReadUnits()(pa.table({UNIT: [unit.to_json()]})))
    table = SelectClusters(bundle, threads=1)(EncodeImages(bundle, "cpu", 8, threads=1)(table))
    stage = PurifyImages(bundle, "cpu", 8, threads=1)
    stage.purifier.solver.atoms.fill_(float("nan"))
    table = stage(table)
    assert table[REASON].to_pylist() == [EXPECTED.get(row, "solver_fallback") for row in range(12)]
    assert table[STATUS].to_pylist() == [QUARANTINED if row in EXPECTED else PURIFIED for row in range(12)]
    WriteUnits(str(tmp_path / "out"), FINGERPRINT, "image", False)(table)
    ledger = Ledger(str(tmp_path / "out"))
    (name,) = ledger.published()
    assert "solver_fallback" not in ledger.receipt(name).reasons
    assert pq.read_table(Path(ledger.output) / "data" / name)["image"].null_count == 6


def test_a_unit_with_too_many_pixels_is_refused_as_a_whole(monkeypatch, hf_table, encoded, smooth_pixels):
    from acsr_ray.purification import stages

    table = hf_table([encoded(pixels) for pixels in smooth_pixels(6, 16, 16, 0)])
    monkeypatch.setattr(stages, "UNIT_BYTES", 4 * 16 * 16 * 3)
    decode = stages.DecodeImages("image", DecodeLimits())
    with pytest.raises(stages.UnitTooLargeError, match="6 rows"):
        decode(table)
    assert decode(table.slice(0, 4))["acsr_status"].to_pylist() == ["purified"] * 4
    monkeypatch.setattr(stages, "UNIT_BYTES", 1)
    assert decode(table.slice(0, 1))["acsr_status"].to_pylist() == ["purified"]
