"""Outcomes read back from files, and the summary of each cell, against numbers worked out by hand."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from acsr_ray.evaluation.cells import Chunk
from acsr_ray.evaluation.grid import Grid
from acsr_ray.evaluation.plan import AttackUnit, DefendUnit, EvaluationSet, Plan
from acsr_ray.evaluation.results import Key, collect

LABELS = np.array([0, 1, 2, 1, 0])
PREDICTIONS = {
    ("clean", 0): [0, 1, 2, 1, 1],
    ("PGD", 0): [0, 1, 0, 1, 2],
    ("PGD", 7): [0, 2, 0, 1, 0],
}
FLOATS = {0: [0, 2, 0, 1, 2], 7: [0, 0, 0, 0, 2]}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A plan of two chunks and two seeds, and its files, all by hand."""
    output = tmp_path_factory.mktemp("sweep")
    grid = Grid.model_validate(
        {
            "title": "x",
            "data": [{"name": "toys", "test": ["unused"]}],
            "targets": [{"name": "net", "location": "unused"}],
            "attacks": [{"name": "PGD", "attack": {"name": "pgd", "epsilon": 8 / 255}}],
            "defenses": [{"name": "JPEG 75", "config": {"name": "jpeg"}, "family": "JPEG"}],
            "seeds": [0, 7],
        }
    )
    chunks, attacks, defends = [], [], []
    for index, rows in enumerate((slice(0, 3), slice(3, 5))):
        keys = np.arange(5)[rows]
        chunks.append(Chunk(np.zeros((len(keys), 8, 8, 3), np.uint8), LABELS[rows], keys))
        for name, seed in PREDICTIONS:
            unit = f"{name}-{seed}-{index}"
            attacked = None if name == "clean" else f"attack-{seed}-{index}"
            attack = None if name == "clean" else grid.attacks[0]
            defends.append(
                DefendUnit(unit, 0, index, grid.targets[0], attack, grid.defenses[0], seed, attacked)
            )
            predictions = np.array(PREDICTIONS[name, seed])[rows]
            write(output / "outcomes" / f"{unit}.parquet", outcome(keys, predictions, 0.1 * seed))
            if attacked:
                attacks.append(AttackUnit(attacked, 0, index, grid.attacks[0], grid.targets[0], None, seed))
                floats = np.array(FLOATS[seed])[rows]
                write(output / "adversarial" / f"{attacked}.parquet", attack_table(keys, floats, seed))
    loaded = EvaluationSet(grid.data[0], "test", tuple(chunks), ("a", "b"), ("x", "y", "z"))
    return Plan(tuple(attacks), tuple(defends)), [loaded], output


def outcome(keys, predictions, shift):
    probabilities = np.full((len(keys), 3), 0.2)
    probabilities[np.arange(len(keys)), predictions] = 0.6
    return {
        "key": keys,
        "label": LABELS[keys].astype(np.int32),
        "prediction": predictions.astype(np.int32),
        "confidence": (0.5 + 0.01 * keys + shift).astype(np.float32),
        "probabilities": list(probabilities.astype(np.float32)),
        "psnr": (30 + keys + shift).astype(np.float32),
        "ssim": (0.9 + 0 * keys).astype(np.float32),
        "seconds": (0.1 * (1 + keys)).astype(np.float32),
    }


def attack_table(keys, floats, seed):
    return {
        "key": keys,
        "image": [b"png"] * len(keys),
        "float_prediction": floats.astype(np.int32),
        "linf": (0.01 * (1 + keys) + seed).astype(np.float32),
        "l2": (0.1 * keys + seed).astype(np.float32),
        "relative_l2": (0.001 * keys + seed).astype(np.float32),
        "attack_seconds": (0.5 + 0 * keys).astype(np.float32),
        "scaled_back": keys % 2 == 0,
    }


def write(path, columns):
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.table(columns), path)


def test_every_row_is_read_once_and_named(written):
    plan, sets, output = written
    table = collect(plan, sets, output).table
    assert table.num_rows == 3 * 5
    named = {(row["attack"], row["seed"], row["key"]) for row in table.to_pylist()}
    assert len(named) == 15
    row = next(r for r in table.to_pylist() if (r["attack"], r["seed"], r["key"]) == ("PGD", 7, 4))
    expected = {
        "data": "toys",
        "split": "test",
        "target": "net",
        "defense": "JPEG 75",
        "family": "JPEG",
        "knowledge": "gray_box",
        "budget": "PGD linf 8/255 x20",
        "attacked_by": "attack-7-1",
        "prediction": 0,
        "float_prediction": 2,
    }
    assert {name: row[name] for name in expected} == expected
    clean = [row for row in table.to_pylist() if row["attack"] == "clean"]
    assert {row["linf"] for row in clean} == {None}
    assert {row["attacked_by"] for row in clean} == {None}


def test_an_image_counts_if_it_is_right_under_every_seed(written):
    results = collect(*written)
    cell = results.get("toys", "net", "PGD", "JPEG 75")
    assert cell.correct.tolist() == [True, False, False, True, False]
    assert cell.float_correct.tolist() == [True, False, False, False, False]
    assert str(cell.accuracy).startswith("40.0 [")
    assert cell.accuracy.count == 5
    assert cell.float_accuracy.value == pytest.approx(0.2)
    clean = results.get("toys", "net", "clean", "JPEG 75")
    assert clean.correct.tolist() == [True, True, True, True, False]
    assert clean.float_correct.all()
    assert results.cells.keys() == {Key("toys", "net", name, "JPEG 75", "test") for name in ("clean", "PGD")}
    assert results.get("toys", "net", "PGD", "none") is None
    assert results.get("toys", "net", "clean", "JPEG 75", "validation") is None


def test_scores_and_norms_are_the_first_seeds(written):
    cell = collect(*written).get("toys", "net", "PGD", "JPEG 75")
    np.testing.assert_array_equal(cell.images, np.arange(5))
    np.testing.assert_array_equal(cell.labels, LABELS)
    np.testing.assert_allclose(cell.confidence, 0.5 + 0.01 * np.arange(5), atol=1e-6)
    np.testing.assert_array_equal(cell.probabilities.argmax(1), PREDICTIONS["PGD", 0])
    np.testing.assert_allclose(cell.linf, 0.01 * np.arange(1, 6), atol=1e-6)
    np.testing.assert_allclose(cell.l2, 0.1 * np.arange(5), atol=1e-6)
    np.testing.assert_allclose(cell.psnr, 30 + np.arange(5), atol=1e-5)
    assert cell.seconds == pytest.approx(0.3)
    assert cell.attack_seconds == pytest.approx(0.5)
    assert cell.scaled_back == pytest.approx(0.6)
    assert (cell.budget, cell.first_file) == ("PGD linf 8/255 x20", "attack-0-0")


def test_the_order_of_units_does_not_matter(written):
    plan, sets, output = written
    backwards = Plan(plan.attacks, plan.defends[::-1])
    one, two = collect(plan, sets, output), collect(backwards, sets, output)
    for key, cell in one.cells.items():
        for name, value in vars(cell).items():
            np.testing.assert_array_equal(vars(two.cells[key])[name], value)


def test_some_images_of_a_cell(written):
    cell = collect(*written).get("toys", "net", "PGD", "JPEG 75")
    some = cell.head(np.array([0, 3, 99]))
    assert len(some) == 2
    assert some.accuracy.value == 1
    assert some.correct.tolist() == [True, True]
    np.testing.assert_array_equal(some.probabilities, cell.probabilities[[0, 3]])
    assert (some.budget, some.key) == (cell.budget, cell.key)
    assert len(cell) == 5


def test_a_missing_file_is_not_passed_over(written, tmp_path):
    plan, sets, _ = written
    with pytest.raises(FileNotFoundError):
        collect(plan, sets, tmp_path)
