"""The benchmark as a job: table, JSON, the night, and what it refuses."""

import json

import numpy as np
import pytest
import torch

from acsr_ray.benchmark import learning, pictures
from acsr_ray.benchmark.job import BenchmarkSettings, benchmark
from acsr_ray.benchmark.learning import benchmark_cdl
from acsr_ray.benchmark.pictures import crops
from acsr_ray.benchmark.report import Ceilings, Row, to_table
from acsr_ray.config import ConfigError
from acsr_ray.corpus.writing import write_shard


def test_parts_become_a_table_and_json(tmp_path, capsys):
    path = tmp_path / "b.json"
    settings = BenchmarkSettings(
        parts=("unrolled", "selection", "codec"),
        sizes=(16,),
        device="cpu",
        cores=1,
        repeats=1,
        json_file=path,
    )
    threads = torch.get_num_threads()
    summary = benchmark(settings)
    assert torch.get_num_threads() == threads
    content = json.loads(path.read_text())
    assert [row["part"] for row in content["rows"]] == ["unrolled"] * 3 + ["selection"] + ["codec"] * 2
    for row in content["rows"]:
        assert row["images_per_second"] == pytest.approx(1 / row["seconds"])
        if row["what"] != "encoder":
            assert row["ratio"] == pytest.approx(row["peer_seconds"] / row["seconds"])
        if row["what"] == "network, float32":
            share = row["flop"] / row["seconds"] / content["ceilings"]["flops"]
            assert row["share_of_matmul"] == pytest.approx(share)
    # 1e8 images in 8 hours, by encoder and network of one core.
    encoder, network = (
        next(row["seconds"] for row in content["rows"] if row["what"] == what)
        for what in ("encoder", "network, float32")
    )
    (night,) = content["night"].values()
    assert int(night.split()[0]) == pytest.approx(1e8 * (encoder + network) / 28800, abs=1)
    assert summary["measurements"] == 6
    assert capsys.readouterr().out.count("| codec |") == 2


def test_cells_of_a_row():
    row = Row("solver", "x", 32, 8, 0.002, "peer", 0.05, flop=1e6, bytes=4e6, note="n")
    table = to_table([row, Row("codec", "y", 0, 1, 1.0)], Ceilings(1e9, 1e10), "t")
    assert table.rows[0] == (
        *("solver", "x", "32", "500", "2", "peer", "50", "25"),
        *("1", "50 %", "4", "20 %", "n"),
    )
    assert table.rows[1][5:12] == ("-",) * 7


def test_images_come_from_the_photos_or_a_shard(tmp_path):
    assert crops(3, 40).shape == (3, 40, 40, 3)
    assert (crops(3, 40) == crops(3, 40)).all()
    assert (crops(3, 40) != crops(3, 40, seed=1)).any()
    pixels = crops(4, 20, seed=5)
    shard = tmp_path / "a.parquet"
    write_shard(shard, pixels, torch.zeros(4, dtype=torch.int64).numpy(), tuple("abcd"), ("photo",))
    assert (crops(4, 20, shard=str(shard)) == pixels).all()
    train, held_out = (crops(2, 20, shard=str(shard), part=part) for part in ("train", "held out"))
    assert (train == pixels[:2]).all()
    assert (held_out == pixels[[2, 3]]).all()
    with pytest.raises(ConfigError, match="no image of 21 pixels"):
        crops(1, 21, shard=str(shard))


def test_the_photos_two_sets_have_no_pixel_in_common(monkeypatch):
    where = np.arange(40 * 60 * 3).reshape(40, 60, 3)
    monkeypatch.setattr(pictures, "_whole_photos", lambda shard: (where, where + where.size))
    train, held_out = (set(crops(50, 12, part=part).ravel().tolist()) for part in ("train", "held out"))
    assert len(train) > 1000
    assert len(held_out) > 1000
    assert not train & held_out


@pytest.mark.parametrize("peer", ["none", "sporco"])
def test_cdl_is_timed_to_the_objective_of_the_peer(peer, monkeypatch):
    if peer == "sporco":
        pytest.importorskip("sporco")
    monkeypatch.setitem(learning.IMAGES, 16, 12)
    monkeypatch.setitem(learning.HELD_OUT, 16, 4)
    row = benchmark_cdl(16, shard=None, device="cpu", peer=peer, epochs=1)
    assert (row.part, row.images, row.seconds > 0) == ("cdl", 12, True)
    assert (row.ratio is None) == (peer == "none")
    if peer == "sporco":
        ours, theirs = (float(part.split()[-1]) for part in row.note.split(", "))
        assert ours <= theirs


def test_a_gpu_that_is_not_there_is_refused():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(ConfigError, match="no GPU"):
        benchmark(BenchmarkSettings(device="cuda"))
