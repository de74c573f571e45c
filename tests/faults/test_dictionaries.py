"""Row 24 of the fault matrix: the node of dictionary tasks dies."""

import json
import time

import pytest

pytestmark = [pytest.mark.ray, pytest.mark.slow]

COUNT, IMAGES = 40, 12


def notes(folder):
    """Return what the tasks wrote down; one that is just being written is left out."""
    found = []
    for path in (folder / "log").glob("*.json"):
        try:
            found.append(json.loads(path.read_text()))
        except json.JSONDecodeError:
            continue
    return found


def test_a_killed_node_costs_only_the_dictionaries_it_was_learning(start_nodes, write_shard, tmp_path):
    shard = write_shard(tmp_path / "shard.parquet", COUNT * IMAGES, 32)
    nodes = start_nodes()
    job = nodes.start("learn_dictionaries.py", shard, COUNT, IMAGES, tmp_path)
    finished = tmp_path / "dictionaries"
    doomed = nodes.nodes[0].node_id

    def is_learning():
        here = [note for note in notes(tmp_path) if note["node"] == doomed and "end" not in note]
        return any(note["start"] < time.time() - 0.1 for note in here)

    while not (len(list(finished.glob("*.safetensors"))) >= 8 and is_learning()):
        assert job.poll() is None, job.communicate()
        time.sleep(0.02)
    before = {path.name: path.stat().st_mtime_ns for path in finished.glob("*.safetensors")}
    nodes.kill(0)
    killed = time.time()
    out, err = job.communicate(timeout=300)
    assert job.returncode == 0, err
    result = json.loads(out.splitlines()[-1])

    assert len(result["paths"]) == COUNT
    assert {path.name for path in finished.glob("*")} == set(result["paths"])
    assert all((finished / name).stat().st_mtime_ns == stamp for name, stamp in before.items())
    log = notes(tmp_path)
    assert doomed not in {note["node"] for note in log if note["start"] > killed}
    # Begun more than once was only what had been begun on the lost node and had not reached the driver.
    attempts = {}
    for note in log:
        attempts.setdefault(note["first"], []).append(note)
    again = [tries for tries in attempts.values() if len(tries) > 1]
    assert len(attempts) == COUNT
    assert 1 <= len(again) <= 2
    assert all(any(note["node"] == doomed for note in tries) for tries in again)
    serial = sum(note["end"] - note["start"] for note in log if "end" in note)
    print(f"wall {result['wall']:.1f} s, serial {serial:.1f} s, redone {len(again)} of {COUNT}")
