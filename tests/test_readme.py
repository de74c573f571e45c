"""The commands of README.md: those that a laptop can run are run, the others say why not."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from acsr_ray.corpus.ledger import Ledger

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()
NOT_RUN = "# not run here: "
SET_UP = "python3 -m venv .venv && "
"""The two one-line commands make an environment and take minutes; CI's own run is the second of them."""


def blocks(language: str, text: str = TEXT) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


RUNNABLE = [text for text in blocks("bash") if not text.startswith((NOT_RUN, SET_UP))]


def test_every_block_is_run_or_says_why_not():
    assert [text.split("\n")[0] for text in blocks("bash") if text.startswith(SET_UP)] == [
        "python3 -m venv .venv && .venv/bin/pip install -q -e '.[attacks]' && "
        ".venv/bin/python jobs/purify_corpus.py --demo",
        "python3 -m venv .venv && .venv/bin/pip install -q -e '.[dev]' && .venv/bin/python -m pytest -n 2",
    ]
    for text in blocks("bash"):
        if text.startswith(NOT_RUN):
            assert len(text.split("\n")[0]) > len(NOT_RUN) + 5
    assert len(RUNNABLE) >= 5
    # The first screen has both commands.
    assert "\n".join(TEXT.splitlines()[:24]).count(SET_UP) == 2


def test_every_block_of_the_other_page_says_why_it_is_not_run():
    found = blocks("bash", (ROOT / "jobs/deploy/README.md").read_text())
    assert found
    for text in found:
        assert text.startswith(NOT_RUN)
        assert len(text.split("\n")[0]) > len(NOT_RUN) + 5


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_the_commands_of_an_operator(tmp_path, smooth_pixels, encoded, hf_table, write_parquet):
    """In the order of the page, in one folder, as somebody would who follows it."""
    tools = tmp_path / ".venv" / "bin"
    tools.mkdir(parents=True)
    for name, told in (("python", ""), ("acsr-ray", " -m acsr_ray.cli")):
        (tools / name).write_text(f'#!/bin/sh\nexec "{sys.executable}"{told} "$@"\n')
        (tools / name).chmod(0o755)
    (tmp_path / "jobs").symlink_to(ROOT / "jobs")
    (tmp_path / "shards").mkdir()
    for shard in range(2):
        cells = [encoded(image) for image in smooth_pixels(6, 32, 32, shard)]
        write_parquet(tmp_path / "shards" / f"part-{shard}.parquet", hf_table([*cells, b"no image"]))
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    environment.pop("RAY_ADDRESS", None)
    for text in RUNNABLE:
        done = subprocess.run(
            ["bash", "-e", "-c", text], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
    ledger = Ledger(str(tmp_path / "out"))
    rows = sum(pq.read_metadata(tmp_path / "out/data" / name).num_rows for name in ledger.published())
    assert rows == 14
    pages = sorted((tmp_path / "out/_acsr/runs").rglob("report.html"))
    assert "unsupported_format" in pages[0].read_text()


def test_the_library_in_one_line_and_as_a_module():
    classifier = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, 10))
    names = {"torch": torch, "images": torch.rand(2, 3, 32, 32), "labels": torch.tensor([1, 2])}
    names["classifier"] = classifier
    run = [text for text in blocks("python") if "Purifier.load(" in text]
    assert len(run) == 2
    for text in run:
        exec(compile(text, "README.md", "exec"), names)
    assert names["purified"].shape == names["attacked"].shape == (2, 3, 32, 32)
    assert names["predictions"].shape == (2, 10)


def test_two_encoders_beside_each_other(tmp_path, monkeypatch, capsys):
    """What is shown for the results of a sweep."""
    (block,) = [text for text in blocks("python") if "mcnemar" in text]
    names = re.findall(r'"(PGDAT[^"]*)"', block)
    rows = [
        {"key": key, "target": name, "attack": "pgd", "label": 1, "prediction": int(key < 12 + 6 * better)}
        for better, name in enumerate(reversed(names))
        for key in range(20)
    ]
    (tmp_path / "out/table1").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "out/table1/results.parquet")
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), {})
    told = capsys.readouterr().out
    # Six images that only one of them has right: exactly, 2 / 2^6.
    assert told.startswith("pgd ")
    assert float(told.split()[-1]) == pytest.approx(2 / 2**6)


def test_every_python_block_is_run_by_some_test():
    """Here, in `tests/purification/test_readers.py` (readers) and `tests/corpus/test_delta.py`."""
    marks = ("Purifier.load(", "mcnemar", "DeltaTable", "load_dataset", "duckdb.sql", "pd.read_parquet")
    for text in blocks("python"):
        assert any(mark in text for mark in marks), text
