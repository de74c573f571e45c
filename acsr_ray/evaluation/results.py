"""Per-image outcomes of a sweep as one Arrow table, and the summary of each cell."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from acsr_ray.evaluation.grid import CLEAN
from acsr_ray.evaluation.intervals import Share, wilson_share
from acsr_ray.evaluation.plan import DefendUnit, EvaluationSet, Plan

ATTACK_COLUMNS = {
    "float_prediction": pa.int32(),
    "linf": pa.float32(),
    "l2": pa.float32(),
    "relative_l2": pa.float32(),
    "attack_seconds": pa.float32(),
    "scaled_back": pa.bool_(),
}
"""What a row has from the attack on it; null for clean images."""


@dataclass(frozen=True)
class Key:
    """Names of one cell."""

    data: str
    target: str
    attack: str
    defense: str
    split: str = "test"


@dataclass(frozen=True)
class Cell:
    """Outcomes of one cell, arrays over its N images in order.

    `correct` (N,) holds where the defended classifier is right under every seed, the attacker's best of all;
    `float_correct` where the attacked model is right on the float images, before rounding to 8 bits (all
    True for clean images). `probabilities` (N, J) and `confidence` (N,) are the first seed's, as are the
    perturbation norms, `psnr` (dB) and `ssim` of the defended image against the clean one.
    """

    key: Key
    images: NDArray[np.int64]
    labels: NDArray[np.int64]
    correct: NDArray[np.bool_]
    float_correct: NDArray[np.bool_]
    confidence: NDArray[np.float64]
    probabilities: NDArray[np.float64]
    psnr: NDArray[np.float64]
    ssim: NDArray[np.float64]
    linf: NDArray[np.float64]
    l2: NDArray[np.float64]
    relative_l2: NDArray[np.float64]
    seconds: float
    attack_seconds: float
    scaled_back: float
    """Share of images whose float result lay outside the budget and was scaled back to it."""
    budget: str
    """Label of the attack as it was run, calibrated; empty for clean images."""
    first_file: str
    """Fingerprint of the unit that attacked the first chunk; empty for clean images."""

    def __len__(self) -> int:
        """Return N."""
        return len(self.labels)

    @property
    def accuracy(self) -> Share:
        """Accuracy with its Wilson interval."""
        return wilson_share(int(self.correct.sum()), len(self))

    @property
    def float_accuracy(self) -> Share:
        """Accuracy of the attacked model on the unrounded images."""
        return wilson_share(int(self.float_correct.sum()), len(self))

    def head(self, images: NDArray[np.int64]) -> "Cell":
        """Return the cell on some of its images, given by key."""
        rows = np.isin(self.images, images)
        arrays: dict[str, Any] = {
            name: value[rows] for name, value in vars(self).items() if isinstance(value, np.ndarray)
        }
        return replace(self, **arrays)


@dataclass(frozen=True)
class Results:
    """All outcomes of a sweep: the table of one row per (cell, seed, image), and cells by name."""

    table: pa.Table

    @cached_property
    def cells(self) -> dict[Key, Cell]:
        """Every cell by its names."""
        names = ["data", "target", "attack", "defense", "split"]
        columns = {name: self.table[name].to_pylist() for name in names}
        groups: dict[Key, list[int]] = {}
        for row, key in enumerate(zip(*columns.values(), strict=True)):
            groups.setdefault(Key(*key), []).append(row)
        return {key: _cell(key, self.table.take(rows)) for key, rows in groups.items()}

    def get(self, data: str, target: str, attack: str, defense: str, split: str = "test") -> Cell | None:
        """Return a cell, None if the sweep had none."""
        return self.cells.get(Key(data, target, attack, defense, split))


def collect(plan: Plan, sets: Sequence[EvaluationSet], output: Path) -> Results:
    """Read every unit of a finished sweep.

    Args:
        plan: the units.
        sets: the splits that the plan was made for.
        output: folder with `outcomes/` and `adversarial/`.
    """
    return Results(pa.concat_tables(_unit_rows(plan, sets, output)).combine_chunks())


def _unit_rows(plan: Plan, sets: Sequence[EvaluationSet], output: Path) -> Iterator[pa.Table]:
    attacked: dict[str, pa.Table] = {}
    for unit in plan.defends:
        rows = pq.read_table(output / "outcomes" / f"{unit.fingerprint}.parquet")
        if unit.attacked_by is None:
            for name, kind in ATTACK_COLUMNS.items():
                rows = rows.append_column(name, pa.nulls(len(rows), kind))
        else:
            if unit.attacked_by not in attacked:
                path = output / "adversarial" / f"{unit.attacked_by}.parquet"
                attacked[unit.attacked_by] = pq.read_table(path, columns=["key", *ATTACK_COLUMNS])
            extra = attacked[unit.attacked_by]
            for name, kind in ATTACK_COLUMNS.items():
                rows = rows.append_column(name, extra[name].cast(kind))
        for name, value in _names(unit, sets).items():
            kind = pa.int64() if name == "seed" else pa.string()
            rows = rows.append_column(name, pa.array([value] * len(rows), kind))
        yield rows


def _names(unit: DefendUnit, sets: Sequence[EvaluationSet]) -> dict[str, Any]:
    loaded = sets[unit.set_index]
    return {
        "data": loaded.data.name,
        "split": loaded.split,
        "target": unit.target.name,
        "attack": unit.attack_name,
        "budget": unit.attack.attack.label if unit.attack else None,
        "attacked_by": unit.attacked_by,
        "knowledge": unit.attack.knowledge if unit.attack else None,
        "defense": unit.defense.name,
        "family": unit.defense.group,
        "seed": unit.seed,
    }


def _cell(key: Key, rows: pa.Table) -> Cell:
    seeds = rows["seed"].to_numpy()
    first = rows.filter(pa.array(seeds == seeds.min())).sort_by("key")
    images = first["key"].to_numpy()
    correct = np.ones(len(images), bool)
    float_correct = np.ones(len(images), bool)
    for seed in np.unique(seeds):
        repeat = rows.filter(pa.array(seeds == seed)).sort_by("key")
        labels = repeat["label"].to_numpy()
        correct &= repeat["prediction"].to_numpy() == labels
        if key.attack != CLEAN:
            float_correct &= repeat["float_prediction"].to_numpy() == labels

    def floats(name: str) -> NDArray[np.float64]:
        return first[name].to_numpy().astype(np.float64)

    attacked = key.attack != CLEAN
    attack_seconds = float(floats("attack_seconds").mean()) if attacked else 0.0
    return Cell(
        key,
        images.astype(np.int64),
        first["label"].to_numpy().astype(np.int64),
        correct,
        float_correct,
        floats("confidence"),
        np.asarray(first["probabilities"].to_pylist(), np.float64),
        floats("psnr"),
        floats("ssim"),
        floats("linf"),
        floats("l2"),
        floats("relative_l2"),
        float(floats("seconds").mean()),
        attack_seconds,
        float(floats("scaled_back").mean()) if attacked else 0.0,
        first["budget"][0].as_py() or "",
        first["attacked_by"][0].as_py() or "",
    )
