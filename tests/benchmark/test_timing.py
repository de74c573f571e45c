"""Turns, medians and processes of the benchmark."""

import os

import pytest
import torch

from acsr_ray.benchmark.timing import THREAD_VARIABLES, alternate, in_processes


def test_sides_take_turns_and_the_first_turn_does_not_count():
    calls = []

    def side(name, seconds):
        values = iter(seconds)
        return lambda: calls.append(name) or next(values)

    medians = alternate({"a": side("a", [99, 1, 5, 3]), "b": side("b", [99, 8, 7, 9])}, repeats=3)
    assert medians == {"a": 3, "b": 8}
    assert calls == ["a", "b"] * 4


def side_of(name, seconds):
    """Return a side that says where it ran by leaving a file."""

    def run():
        with open(f"{name}.{os.getpid()}", "a") as file:
            file.write(f"{torch.get_num_threads()} {os.environ['OMP_NUM_THREADS']}\n")
        return seconds

    return run


@pytest.mark.timeout(120)
def test_processes_run_at_once_with_one_thread_and_the_slowest_counts(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    names = [str(tmp_path / "a"), str(tmp_path / "b")]
    with in_processes(side_of, [(names[0], 0.25), (names[1], 4.0)]) as side:
        assert side() == 4.0
        assert side() == 4.0
    assert os.environ["OMP_NUM_THREADS"] == "7"
    assert "NUMEXPR_NUM_THREADS" in THREAD_VARIABLES
    files = sorted(tmp_path.iterdir())
    assert [file.name[0] for file in files] == ["a", "b"]
    assert str(os.getpid()) not in {file.name.split(".")[1] for file in files}
    assert all(file.read_text() == "1 1\n" * 2 for file in files)
