"""The benchmark as a job: table, JSON, the night, and what it refuses."""

import json

import pytest
import torch

from acsr_ray.benchmark.job import BenchmarkSettings, benchmark
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
        if row["peer"]:
            assert row["ratio"] == pytest.approx(row["peer_seconds"] / row["seconds"])
        if row["flop"]:
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
    with pytest.raises(ConfigError, match="no image of 21 pixels"):
        crops(1, 21, shard=str(shard))


def test_a_gpu_that_is_not_there_is_refused():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(ConfigError, match="no GPU"):
        benchmark(BenchmarkSettings(device="cuda"))
