"""The pipeline on Ray: every row once and in order, the same bytes however it is run, kill and resume."""

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from acsr_ray.artifacts import ArtifactError, json_digest
from acsr_ray.columns import OUTCOME, STATUS
from acsr_ray.config import FailedError, parse_job
from acsr_ray.corpus.delta_types import DeltaSchemaError
from acsr_ray.corpus.images import DecodeLimits, decode_image, encode_png, to_pixels, to_unit_range
from acsr_ray.corpus.sources import CorpusError
from acsr_ray.distributed.purify import purify_corpus
from acsr_ray.distributed.purify_settings import PurifyCorpusSettings, deciding_settings
from acsr_ray.distributed.runtime import RaySettings
from acsr_ray.purification.options import PurifyOptions
from acsr_ray.purification.purifier import Purifier

pytestmark = pytest.mark.ray

ROWS, SIDE = 60, 16


def write_corpus(path: Path, rows: int = ROWS, seed: int = 0) -> Path:
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 256, (rows, SIDE // 4, SIDE // 4, 3), dtype=np.uint8)
    pixels = coarse.repeat(4, axis=1).repeat(4, axis=2)
    cells = [{"bytes": encode_png(image), "path": f"{i}.png"} for i, image in enumerate(pixels)]
    table = pa.table(
        {
            "image_id": [f"id-{i}" for i in range(rows)],
            "image": pa.array(cells, pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
            "label": pa.array(generator.integers(0, 3, rows), pa.int64()),
        }
    ).replace_schema_metadata({"huggingface": "{}"})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=25)
    return path


def settings(source: Path, output: Path, bundle: Path, **changes: object) -> PurifyCorpusSettings:
    fields = {
        "input": str(source),
        "output": str(output),
        "bundle": str(bundle),
        "unit_rows": 20,
        **changes,
    }
    return PurifyCorpusSettings.model_validate(fields)


def read_output(output: Path) -> pa.Table:
    return pa.concat_tables(pq.read_table(path) for path in sorted((output / "data").glob("*.parquet")))


def records(output: Path) -> list[dict]:
    """Return the records of an output's runs, oldest first."""
    return [json.loads(path.read_text()) for path in sorted(output.glob("_acsr/runs/*/record.json"))]


def check_record(record: dict, rows: pa.Table) -> None:
    """Check that a record counts what the columns of the rows that its run made hold."""
    frame = rows.to_pandas()
    assert record["images"] == len(frame)
    assert record["statuses"] == frame.acsr_status.value_counts().to_dict()
    assert record["reasons"] == frame.acsr_reason.value_counts().to_dict()
    there = frame.dropna(subset=["acsr_class"]).astype({"acsr_class": int, "acsr_cluster": int})
    names = there.acsr_class.astype(str) + "/" + there.acsr_cluster.astype(str)
    assert record["clusters"] == names.value_counts().to_dict()
    for name in ("residual", "distance"):
        edges, counts = record[name]["edges"], record[name]["counts"]
        values = rows[f"acsr_{name}"].drop_null().to_numpy().astype(np.float64)
        values = np.minimum(values, np.nextafter(edges[-1], 0))
        assert counts == np.histogram(values, edges)[0].tolist(), name
    assert record["timeline"][-1][1] == len(frame)


def image_digests(output: Path) -> list[str]:
    cells = read_output(output)["image"].to_pylist()
    return [hashlib.sha256(cell["bytes"]).hexdigest() for cell in cells]


def test_every_row_once_in_order_with_every_column(tmp_path, tiny_bundle, ray_local):
    source = write_corpus(tmp_path / "in" / "a.parquet")
    summary = purify_corpus(settings(tmp_path / "in", tmp_path / "out", tiny_bundle))
    before, after = pq.read_table(source), read_output(tmp_path / "out")
    assert summary["images"] == ROWS
    assert summary["statuses"] == {"purified": ROWS}
    assert after.column_names == [*before.column_names, *OUTCOME.names]
    assert after["image_id"].to_pylist() == before["image_id"].to_pylist()
    assert after["label"].equals(before["label"])
    assert after.schema.metadata[b"huggingface"] == b"{}"  # it names no features, so none of ours are added
    shapes = {decode_image(c["bytes"], DecodeLimits()).shape for c in after["image"].to_pylist()}
    assert shapes == {(SIDE, SIDE, 3)}
    changed = [
        a["bytes"] != b["bytes"]
        for a, b in zip(after["image"].to_pylist(), before["image"].to_pylist(), strict=True)
    ]
    assert all(changed)


@pytest.mark.slow
def test_a_second_run_does_nothing_and_a_changed_shard_is_redone(tmp_path, tiny_bundle, ray_local):
    write_corpus(tmp_path / "in" / "a.parquet", 30)
    write_corpus(tmp_path / "in" / "b.parquet", 20, seed=1)
    run = settings(tmp_path / "in", tmp_path / "out", tiny_bundle)
    purify_corpus(run)
    data = tmp_path / "out" / "data"
    stamps = {path.name: path.stat().st_mtime_ns for path in data.iterdir()}
    assert "nothing to do" in purify_corpus(run)["this run"]
    assert {path.name: path.stat().st_mtime_ns for path in data.iterdir()} == stamps

    write_corpus(tmp_path / "in" / "b.parquet", 20, seed=2)
    assert purify_corpus(run)["this run"] == "20 images in 1 units"
    names = {path.name for path in data.iterdir()}
    assert len(names) == len(stamps)
    assert {name for name in names if name.startswith("a.")} < stamps.keys()
    assert {name for name in names if name.startswith("b.")}.isdisjoint(stamps)


@pytest.mark.slow
def test_batch_size_actors_and_units_do_not_change_a_byte(tmp_path, tiny_bundle, ray_local):
    write_corpus(tmp_path / "a.parquet", 30)
    variants = [
        {"batch_size": 1, "ray": RaySettings(actors=1)},
        {"batch_size": 7, "ray": RaySettings(actors=2)},
        {"batch_size": 64, "ray": RaySettings(actors=1), "unit_rows": 30},
    ]
    digests = []
    for number, changes in enumerate(variants):
        output = tmp_path / f"out-{number}"
        purify_corpus(settings(tmp_path / "a.parquet", output, tiny_bundle, **changes))
        digests.append(image_digests(output))
    assert len(set(digests[0])) == 30
    assert digests[1] == digests[0]
    assert digests[2] == digests[0]


def test_options_give_the_pixels_of_the_purifier(tmp_path, make_unrolled_bundle, ray_local):
    import torch

    bundle = make_unrolled_bundle(tmp_path / "bundle", "filters")
    source = write_corpus(tmp_path / "a.parquet", 30)
    options = {"strength": "auto", "top_k": 2}
    run = settings(source, tmp_path / "out", bundle, **options)
    purify_corpus(run)
    purifier = Purifier.load(bundle, options=PurifyOptions(**options))
    before, after = pq.read_table(source), read_output(tmp_path / "out")
    for old, new in zip(before["image"].to_pylist(), after["image"].to_pylist(), strict=True):
        pixels = decode_image(old["bytes"], DecodeLimits())
        with torch.no_grad():
            purified = purifier(torch.from_numpy(to_unit_range(pixels))[None])
        assert (decode_image(new["bytes"], DecodeLimits()) == to_pixels(purified[0].numpy())).all()
    # Options spelled out as they are by default are the same run; others are another one.
    for named in (None, "unrolled"):
        assert "nothing to do" in purify_corpus(run.model_copy(update={"reconstruction": named}))["this run"]
    for changes in ({"strength": 1.0}, {"top_k": 1}, {"reconstruction": "cbpdn"}):
        with pytest.raises(CorpusError, match=next(iter(changes))):
            purify_corpus(run.model_copy(update=changes))


def test_the_fingerprint_is_as_before_where_no_option_is_given(tmp_path, tiny_bundle):
    def fingerprint(**changes):
        return json_digest(
            deciding_settings(settings(tmp_path / "a", tmp_path / "b", tiny_bundle, **changes))
        )

    plain = deciding_settings(settings(tmp_path / "a", tmp_path / "b", tiny_bundle))
    assert sorted(plain) == ["algorithm_version", "bundle_digest", "decode", "image_column", "keep_original"]
    assert fingerprint(reconstruction=None, strength=1, top_k=1) == fingerprint()
    assert fingerprint(reconstruction="cbpdn") == fingerprint()
    assert fingerprint(batch_size=7) == fingerprint()
    changes = ({}, {"strength": "auto"}, {"strength": 1.5}, {"top_k": 2}, {"top_k": 2, "strength": 1.5})
    assert len({fingerprint(**given) for given in changes}) == len(changes)


def test_a_bundle_of_another_default_is_another_run(tmp_path, make_unrolled_bundle):
    def deciding(bundle, **changes):
        return deciding_settings(settings(tmp_path / "a", tmp_path / "b", bundle, **changes))

    # The same files, which purify otherwise where no reconstruction is named.
    learnt, paper = (
        make_unrolled_bundle(tmp_path / name, reconstruction=name) for name in ("unrolled", "cbpdn")
    )
    assert deciding(learnt) != deciding(paper)
    for bundle, own, other in ((learnt, "unrolled", "cbpdn"), (paper, "cbpdn", "unrolled")):
        assert deciding(bundle, reconstruction=own) == deciding(bundle)
        assert deciding(bundle, reconstruction=other) != deciding(bundle)


@pytest.mark.parametrize("begun", [False, True])
def test_a_bundle_without_a_network_is_refused_before_anything_is_written(tmp_path, tiny_bundle, begun):
    source, output = write_corpus(tmp_path / "a.parquet", 4), tmp_path / "out"
    if begun:
        output.mkdir()
    with pytest.raises(ArtifactError, match="tiny has no unrolled reconstruction"):
        purify_corpus(settings(source, output, tiny_bundle, reconstruction="unrolled"))
    assert not list(output.glob("*"))
    assert output.exists() == begun


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ([], PurifyOptions()),
        (["--strength", "auto"], PurifyOptions(strength="auto")),
        (["--strength", "1.5", "--top-k", "3"], PurifyOptions(strength=1.5, top_k=3)),
        (["--reconstruction", "cbpdn"], PurifyOptions(reconstruction="cbpdn")),
        (["--reconstruction", "None"], PurifyOptions()),
    ],
)
def test_options_on_the_command_line(arguments, options):
    assert parse_job(PurifyCorpusSettings, "purify_corpus", arguments).options == options


@pytest.mark.parametrize("arguments", [["--strength", "0"], ["--strength", "weak"], ["--top-k", "0"]])
def test_options_that_mean_nothing_are_refused(arguments, capsys):
    with pytest.raises(SystemExit):
        parse_job(PurifyCorpusSettings, "purify_corpus", arguments)
    assert arguments[0][2:] in capsys.readouterr().err.replace("_", "-")


def test_damaged_rows_are_quarantined_and_the_rest_is_done(tmp_path, tiny_bundle, ray_local):
    source = write_corpus(tmp_path / "a.parquet", 24)
    table = pq.read_table(source)
    cells = table["image"].to_pylist()
    good = cells[3]["bytes"]
    damage = {3: good[: len(good) // 2], 7: b"", 11: b"this is text", 15: None}
    for row, data in damage.items():
        cells[row] = {"bytes": data, "path": cells[row]["path"]}
    pq.write_table(table.set_column(1, "image", pa.array(cells, table.schema.field("image").type)), source)
    plan = {"schema_version": 1, "images": 24}
    (tmp_path / "out" / "_acsr").mkdir(parents=True)
    (tmp_path / "out" / "_acsr" / "plan.json").write_text(json.dumps(plan))
    summary = purify_corpus(settings(source, tmp_path / "out", tiny_bundle, batch_size=8))
    assert summary["statuses"] == {"purified": 20, "quarantined": 4}
    assert summary["quarantined"] == {
        "decode_error": 1,
        "empty": 1,
        "unsupported_format": 1,
        "null_image": 1,
    }
    after = read_output(tmp_path / "out").to_pylist()
    assert [row["image_id"] for row in after] == [f"id-{i}" for i in range(24)]
    for number, row in enumerate(after):
        assert (row["image"] is None) == (number in damage)
        assert (row["acsr_reason"] is not None) == (number in damage)
        assert (row["acsr_residual"] is None) == (number in damage)
    kept = pa.concat_tables(
        pq.read_table(path) for path in sorted((tmp_path / "out/_acsr/quarantine").glob("*.parquet"))
    ).to_pylist()
    assert {row["row"]: row["bytes"] for row in kept} == damage

    (record,) = records(tmp_path / "out")
    check_record(record, read_output(tmp_path / "out"))
    assert record["corpus"] == {key: summary[key] for key in ("images", "statuses", "quarantined")}
    assert (record["outcome"], record["detail"], record["units"], record["retries"]) == ("done", "", 2, 0)
    assert record["plan"] == plan
    assert (record["input"], record["output"]) == (str(source), str(tmp_path / "out"))
    assert record["settings"]["unit_rows"] == 20
    assert record["settings"]["batch_size"] == 8
    # 16 decoded rows of the first unit in two batches, four of the second in one; encoder and solver.
    assert record["batch_fill"] == round(20 / 24, 4)
    assert record["stage_seconds"].keys() == {
        *("ReadUnits", "DecodeImages", "EncodeImages", "SelectClusters", "PurifyImages", "WriteUnits")
    }
    assert 0 < sum(record["stage_seconds"].values()) < 4 * record["elapsed_s"]
    assert set(record["unit_names"]) == {path.name for path in (tmp_path / "out/data").iterdir()}
    progress = json.loads((tmp_path / "out/_acsr/progress.json").read_text())
    assert (progress["outcome"], progress["images_done"], progress["images_planned"]) == ("done", 24, 24)
    assert (progress["run"], progress["quarantined"]) == (record["run"], 4)

    # A run that has nothing to do has a record of its own.
    purify_corpus(settings(source, tmp_path / "out", tiny_bundle))
    first, second = records(tmp_path / "out")
    assert first == record
    assert (second["outcome"], second["images"], second["corpus"]) == ("done", 0, first["corpus"])


def test_other_settings_over_an_output_are_refused(tmp_path, tiny_bundle, ray_local):
    write_corpus(tmp_path / "a.parquet", 4)
    run = settings(tmp_path / "a.parquet", tmp_path / "out", tiny_bundle)
    purify_corpus(run)
    for changes in ({"limit": 2}, {"unit_rows": 3}, {"keep_original": True}):
        with pytest.raises(CorpusError, match=next(iter(changes))):
            purify_corpus(run.model_copy(update=changes))
    with pytest.raises(CorpusError, match="purified before"):
        purify_corpus(settings(tmp_path / "out" / "data", tmp_path / "twice", tiny_bundle))


def test_a_folder_of_photos_keeps_each_size(tmp_path, tiny_bundle, ray_local):
    from PIL import Image

    generator = np.random.default_rng(0)
    sizes = {"cat/a.png": ("RGB", (40, 31)), "cat/b.png": ("RGBA", (17, 23)), "dog/c.png": ("L", (33, 9))}
    for name, (mode, size) in sizes.items():
        shape = (size[1], size[0], len(mode)) if len(mode) > 1 else (size[1], size[0])
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, shape, dtype=np.uint8), mode).save(path)
    purify_corpus(settings(tmp_path / "photos", tmp_path / "out", tiny_bundle))
    rows = read_output(tmp_path / "out").to_pylist()
    assert [row["image"]["path"] for row in rows] == sorted(sizes)
    assert [row["label"] for row in rows] == [0, 0, 1]
    for row in rows:
        width, height = sizes[row["image"]["path"]][1]
        pixels = decode_image(row["image"]["bytes"], DecodeLimits())
        assert pixels.shape == (height, width, 3)


@pytest.mark.slow
def test_tars_become_parquet_and_a_hostile_one_is_left_out(tmp_path, tiny_bundle, ray_local):
    table = pq.read_table(write_corpus(tmp_path / "a.parquet", 6)).to_pylist()
    (tmp_path / "in").mkdir()
    with tarfile.open(tmp_path / "in" / "good.tar", "w") as tar:
        for number, row in enumerate(table):
            parts = {"png": row["image"]["bytes"], "cls": b"%d" % row["label"], "npy": b"left out"}
            if number == 4:
                parts["png"] = b"no image"
            if number == 5:
                del parts["png"]
            for extension, data in parts.items():
                info = tarfile.TarInfo(f"x/{number:03d}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    with tarfile.open(tmp_path / "in" / "link.tar", "w") as tar:
        info = tarfile.TarInfo("0.png")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(info)
    run = settings(tmp_path / "in", tmp_path / "out", tiny_bundle, unit_rows=4)
    summary = purify_corpus(run)
    assert summary["statuses"] == {"purified": 4, "quarantined": 2}
    ((uri, told),) = summary["refused shards"].items()
    assert uri.endswith("link.tar")
    assert told.startswith("unsafe_member: ")
    names = sorted(path.name for path in (tmp_path / "out" / "data").iterdir())
    assert [name[: -len(".01234567.parquet")] for name in names] == [
        "good.rows-0000000-0000003",
        "good.rows-0000004-0000005",
    ]
    after = read_output(tmp_path / "out")
    assert after.column_names == ["__key__", "image", "json", "txt", "cls", *OUTCOME.names]
    assert after["__key__"].to_pylist() == [f"x/{number:03d}" for number in range(6)]
    assert after["cls"].to_pylist() == [row["label"] for row in table]
    reasons = [None] * 4 + ["unsupported_format", "null_image"]
    assert after["acsr_reason"].to_pylist() == reasons
    # The pixels are those that the same images get as Parquet.
    purify_corpus(settings(tmp_path / "a.parquet", tmp_path / "same", tiny_bundle))
    assert [cell["bytes"] for cell in after["image"].to_pylist()[:4]] == [
        cell["bytes"] for cell in read_output(tmp_path / "same")["image"].to_pylist()[:4]
    ]
    assert "nothing to do" in purify_corpus(run)["this run"]


@pytest.mark.slow
def test_a_killed_driver_is_resumed_without_loss_or_repetition(tmp_path, tiny_bundle):
    source = write_corpus(tmp_path / "in" / "a.parquet", 120)
    output = tmp_path / "out"
    command = [
        *(sys.executable, "-m", "acsr_ray.cli", "purify-corpus", "--input", str(source.parent)),
        *("--output", str(output), "--bundle", str(tiny_bundle), "--unit-rows", "4"),
        *("--ray.actors", "1", "--ray.object-store-megabytes", "100"),
    ]
    first = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 120
    while len(list(output.glob("data/*.parquet"))) < 3:
        assert first.poll() is None, "finished before it could be killed"
        assert time.monotonic() < deadline, "nothing was published"
        time.sleep(0.02)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    done = {path.name: path.stat().st_ino for path in (output / "data").glob("*.parquet")}
    assert 3 <= len(done) < 30, "the kill came too late to prove anything"
    assert not list((output / "_acsr").glob("snapshots/*"))
    for path in (output / "data").glob("*.parquet"):
        assert pq.read_table(path).num_rows == 4

    second = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert second.returncode == 0, second.stderr
    assert "nothing to do" not in second.stdout
    after = read_output(output)
    assert after["image_id"].to_pylist() == [f"id-{i}" for i in range(120)]
    assert set(after[STATUS].to_pylist()) == {"purified"}
    now = {path.name: path.stat().st_ino for path in (output / "data").glob("*.parquet")}
    assert {name: now[name] for name in done} == done, "a finished unit was written again"
    assert not list((output / "_acsr" / "staging").glob("*"))
    killed, resumed = records(output)
    assert (killed["outcome"], resumed["outcome"]) == ("running", "done")
    assert resumed["units"] == len(now) - len(done)
    check_record(
        resumed, pa.concat_tables(pq.read_table(output / "data" / name) for name in now.keys() - done)
    )
    assert resumed["corpus"]["images"] == 120


@pytest.mark.slow
def test_readers_never_see_old_and_new_rows_together(tmp_path, tiny_bundle, ray_local, monkeypatch):
    write_corpus(tmp_path / "in" / "a.parquet", 40)
    run = settings(tmp_path / "in", tmp_path / "out", tiny_bundle)
    purify_corpus(run)
    before = read_output(tmp_path / "out")["image"].to_pylist()
    write_corpus(tmp_path / "in" / "a.parquet", 40, seed=5)

    def interrupted(self, snapshot, still_ours):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("acsr_ray.corpus.ledger.Ledger.commit", interrupted)
        with pytest.raises(KeyboardInterrupt):
            purify_corpus(run)
    assert read_output(tmp_path / "out")["image"].to_pylist() == before
    assert "nothing to do" in purify_corpus(run)["this run"]
    after = read_output(tmp_path / "out")
    assert after.num_rows == 40
    assert all(new != old for new, old in zip(after["image"].to_pylist(), before, strict=True))


@pytest.mark.slow
def test_a_delta_table_follows_night_after_night(tmp_path, tiny_bundle, ray_local):
    deltalake = pytest.importorskip("deltalake")
    write_corpus(tmp_path / "in" / "a.parquet", 30)
    write_corpus(tmp_path / "in" / "b.parquet", 20, seed=1)
    run = settings(tmp_path / "in", tmp_path / "out", tiny_bundle, wave_units=2)
    purify_corpus(run.model_copy(update={"delta": True}))
    table = deltalake.DeltaTable(str(tmp_path / "out"))
    versions = [table.version()]
    assert versions == [1]

    # Nobody has to remember that it is a table.
    write_corpus(tmp_path / "in" / "b.parquet", 20, seed=2)
    purify_corpus(run)
    purify_corpus(run)
    table.update_incremental()
    versions.append(table.version())
    assert versions == [1, 2]
    found, expected = table.to_pyarrow_table(), read_output(tmp_path / "out")
    assert found.schema.names == expected.schema.names

    def by_image(rows):
        return sorted(rows.to_pylist(), key=lambda row: row["image"]["bytes"])

    assert by_image(found) == by_image(expected)

    # What a table cannot have is told at the end, and is purified all the same.
    more = pq.read_table(tmp_path / "in" / "a.parquet").append_column(
        "at", pa.array([1] * 30, pa.time32("s"))
    )
    pq.write_table(more, tmp_path / "in" / "c.parquet")
    with pytest.raises(FailedError, match=r"all is purified, but 1 shards .* c: column 'at' is time32"):
        purify_corpus(run)
    data = sorted((tmp_path / "out" / "data").glob("*.parquet"))
    assert sum(pq.read_metadata(path).num_rows for path in data) == 80
    table.update_incremental()
    assert table.to_pyarrow_table().num_rows == 50
    with pytest.raises(DeltaSchemaError, match="'at' is time32"):
        purify_corpus(settings(tmp_path / "in" / "c.parquet", tmp_path / "other", tiny_bundle, delta=True))
