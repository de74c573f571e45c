"""Attack-evaluation sweeps on Ray: calibrate, attack, defend; every unit a task with a fingerprint.

```
CACHE/calibrations/<fingerprint>.json     budget of one (data, target, attack)
CACHE/adversarial/<fingerprint>.parquet   one attacked chunk; every defence reads the same one
CACHE/outcomes/<fingerprint>.parquet      one chunk, defended and classified
OUT/results.parquet, tables/, figures/, report.html, grid.json
```
Files are published atomically, so a killed sweep goes on where it stopped, and equals an uninterrupted one.
"""

import io
import json
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch
from pydantic import Field

from acsr_ray.artifacts import atomic_write, write_json
from acsr_ray.attacks.spec import AttackConfig
from acsr_ray.attacks.torchattacks_adapter import resolve_options
from acsr_ray.config import AcsrError, Device, JobSettings
from acsr_ray.distributed.runtime import RaySettings, ray_session
from acsr_ray.distributed.unit_runner import SweepError, UnitRunner
from acsr_ray.evaluation.attackers import check_attackable
from acsr_ray.evaluation.cells import (
    Chunk,
    attack_unit,
    calibrate_unit,
    defend_unit,
    fingerprint,
    target_of,
)
from acsr_ray.evaluation.defenses import build_defense, defense_digest
from acsr_ray.evaluation.extras import load_extra
from acsr_ray.evaluation.grid import Grid, GridError, SweepAttack, SweepTarget, read_grid
from acsr_ray.evaluation.plan import EvaluationSet, Plan, load_set, plan_units, unit_chunk
from acsr_ray.evaluation.presets import preset_grid
from acsr_ray.evaluation.recipes import Variant
from acsr_ray.evaluation.results import collect
from acsr_ray.evaluation.write_up import Calibration, write_results

logger = logging.getLogger(__name__)

TableName = Literal[
    "1",
    "2",
    "3",
    "4",
    "4-128",
    "5",
    "adaptive",
    "graybox",
    "purifier",
    "purifier-b0",
    "purifier-imagenet",
    "purifier-filter",
    "purifier-ablations",
    "purifier-adaptive",
]
CACHED = ("calibrations", "adversarial", "outcomes")
REPORT_LIBRARIES = ("skimage.metrics", "matplotlib.figure")


class SweepAttacksSettings(JobSettings):
    """Evaluate defences under attacks: a YAML grid, or a table or figure of the paper; tables and report."""

    grid: Path | None = None
    """YAML file of the grid. Give either this, or `table`, or `figure`."""
    table: TableName | None = None
    """Preset: a table of the paper (4 at 64 pixels, 4-128 at 128), `adaptive` (by what the attacker knows),
    `graybox` (all defences at equal clean accuracy); of the trained reconstruction, `purifier` (against cheap
    defences on three targets), `purifier-imagenet`, `purifier-filter` (a content filter that it was not
    trained for), `purifier-b0` (at calibrated budgets), `purifier-ablations`, and `purifier-adaptive`
    (attackers who know it)."""
    figure: Literal["2", "3", "4"] | None = None
    """Preset: a figure of the paper."""
    variant: Variant = "small"
    """`small` for two CPU cores (quarter-width targets, few images), `full` for GPUs."""
    data: Path = Path(".data")
    """Presets: folder that holds the data sets' folders (`cifar10/`, `imagenet10-64/`, `moderation5/`)."""
    artifacts: Path = Path(".runs/eval")
    """Presets: folder that holds targets, bundles and trained defences."""
    bundle: str = "cifar10-small"
    """Presets: bundle that purifies CIFAR-10, by directory or packaged name."""
    images: int | None = Field(None, ge=1)
    """Test images per data set, in place of the preset's or grid's number."""
    output: Path
    """Folder of results, and of units where there is no `cache`; on storage that all nodes share."""
    cache: Path | None = None
    """Folder of units (calibrations, attacked images, outcomes), to share them between sweeps; on storage
    that all nodes share, and used from one machine at a time."""
    device: Device = "auto"
    """Where units compute; auto takes the cluster's GPUs if there are any."""
    task_gpus: float = Field(0.25, gt=0, le=1)
    """GPU share of a unit when units compute on GPUs."""
    task_cpus: float = Field(1.0, gt=0)
    """CPUs of a unit; it uses as many threads, at least one."""
    ray: RaySettings = RaySettings()
    """Where Ray runs."""


def sweep_attacks(settings: SweepAttacksSettings) -> dict[str, Any]:
    """Run a sweep, write its tables, figures and report, and return what they are.

    Raises:
        GridError: the grid cannot be run.
        SweepError: some units failed.
    """
    # Needed at the end of every unit and of the sweep; hours may lie between.
    for module in REPORT_LIBRARIES:
        load_extra(module)
    grid = _grid_of(settings)
    _check_defenses(grid)
    started = time.perf_counter()
    with ray_session(settings.ray):
        runner = UnitRunner(
            settings.cache or settings.output,
            settings.device,
            task_cpus=settings.task_cpus,
            task_gpus=settings.task_gpus,
            folders=CACHED,
        )
        sets = _load_sets(grid)
        targets = {entry.name: target_of(entry, "cpu").digest for entry in grid.targets}
        defenses = {entry.name: defense_digest(entry.config) for entry in grid.defenses}
        budgets, calibrations = _calibrate(runner, grid, sets, targets)
        plan = plan_units(grid, sets, targets, defenses, budgets)
        logger.info(
            "%d images, %d units of attack, %d of defence",
            sum(len(loaded) for loaded in sets if loaded.split == "test"),
            len(plan.attacks),
            len(plan.defends),
        )
        _run_plan(runner, plan, sets)
    write_json(settings.output / "grid.json", grid.describe())
    results = collect(plan, sets, runner.cache)
    atomic_write(settings.output / "results.parquet", parquet_bytes(results.table))
    written = write_results(grid, sets, results, runner.cache, settings.output, calibrations)
    return {
        "units": len(plan.attacks) + len({unit.fingerprint for unit in plan.defends}),
        "from the cache": runner.cached,
        "minutes": round((time.perf_counter() - started) / 60, 1),
        "warnings": len(written.warnings),
        "report": str(written.report.resolve()),
    }


def _grid_of(settings: SweepAttacksSettings) -> Grid:
    chosen = [value for value in (settings.grid, settings.table, settings.figure) if value is not None]
    if len(chosen) != 1:
        raise SweepError("give exactly one of --grid, --table and --figure")
    if settings.grid is not None:
        grid = read_grid(settings.grid)
    else:
        name = f"table {settings.table}" if settings.table else f"figure {settings.figure}"
        grid = preset_grid(name, settings.variant, settings.data, settings.artifacts, settings.bundle)
    if settings.images is None:
        return grid
    data = tuple(entry.model_copy(update={"images": settings.images}) for entry in grid.data)
    return grid.model_copy(update={"data": data})


def _check_defenses(grid: Grid) -> None:
    """Raise for an attack that is not there, for a defence that cannot be built or that does not allow one.

    Built here, though units build their own: they do so only after hours of attacks.
    """
    for attack in grid.attacks:
        if attack.attack.is_torchattacks:
            resolve_options(attack.attack)
    for entry in grid.defenses:
        try:
            defense = build_defense(entry.config)
        except AcsrError as error:
            raise GridError(f"defence {entry.name}: {error}") from error
        for attack in grid.attacks:
            met = attack.defenses is None or entry.name in attack.defenses
            if (attack.adaptive and met) or entry.name == attack.through:
                check_attackable(attack, defense)


def _load_sets(grid: Grid) -> list[EvaluationSet]:
    seed, sets = grid.seeds[0], []
    for data in grid.data:
        sets.append(load_set(data, "test", seed, grid.chunk))
        if data.validation:
            sets.append(load_set(data, "validation", seed, grid.chunk))
    return sets


def _calibrate(
    runner: UnitRunner, grid: Grid, sets: Sequence[EvaluationSet], digests: Mapping[str, str]
) -> tuple[dict[tuple[str, str, str], AttackConfig], list[Calibration]]:
    """Return the calibrated attack of each (data, target, attack) that asks for it, and how that went."""
    # Entries of equal settings share one calibration.
    wanted: dict[str, list[tuple[EvaluationSet, SweepTarget, SweepAttack]]] = {}
    for loaded in sets:
        if loaded.split != "validation":
            continue
        for target in grid.targets_of(loaded.data.name):
            for attack in grid.attacks:
                if attack.calibrate_to is None:
                    continue
                parts = [
                    "calibrate",
                    list(loaded.digests),
                    digests[target.name],
                    attack.attack.identity(),
                    attack.calibrate_to,
                    grid.seeds[0],
                ]
                wanted.setdefault(fingerprint(parts), []).append((loaded, target, attack))
    whole = {id(loaded): loaded.whole() for loaded in sets if loaded.split == "validation"}
    chunks = {number: ray.put(chunk) for number, chunk in whole.items()} if wanted else {}

    def submit(key: str) -> "ray.ObjectRef[Any]":
        loaded, target, attack = wanted[key][0]
        return runner.task(_calibrate_task).remote(
            chunks[id(loaded)], attack, target, grid.seeds[0], runner.device, runner.threads
        )

    paths = {key: runner.cache / "calibrations" / f"{key}.json" for key in wanted}
    runner.run("calibrations", list(wanted), paths.__getitem__, submit)
    found, outcomes = {}, []
    for key, loaded, target, attack in (
        (key, *entry) for key, entries in wanted.items() for entry in entries
    ):
        content = json.loads(paths[key].read_bytes())
        config = AttackConfig.from_description(content["attack"])
        logger.info(
            "%s, %s, %s: calibrated to %s, validation accuracy %.1f %% %s",
            loaded.data.name,
            target.name,
            attack.name,
            config.label,
            100 * content["accuracy"],
            content["note"],
        )
        found[loaded.data.name, target.name, attack.name] = config
        outcomes.append(
            Calibration(
                loaded.data.name,
                target.name,
                attack.name,
                config.label,
                content["wanted"],
                content["accuracy"],
                content["note"],
            )
        )
    return found, outcomes


def _run_plan(runner: UnitRunner, plan: Plan, sets: Sequence[EvaluationSet]) -> None:
    chunks = [[ray.put(chunk) for chunk in loaded.chunks] for loaded in sets]
    attacks = {unit.fingerprint: unit for unit in plan.attacks}
    defends = {unit.fingerprint: unit for unit in plan.defends}
    adversarial, outcomes = runner.cache / "adversarial", runner.cache / "outcomes"

    def submit_attack(key: str) -> "ray.ObjectRef[Any]":
        unit = attacks[key]
        return runner.task(_attack_task).remote(
            chunks[unit.set_index][unit.chunk_index],
            len(unit_chunk(sets, unit)),
            unit.attack,
            unit.crafted_on,
            unit.defense.config if unit.defense else None,
            unit.seed,
            runner.device,
            runner.threads,
        )

    def submit_defend(key: str) -> "ray.ObjectRef[Any]":
        unit = defends[key]
        attacked = None if unit.attacked_by is None else str(adversarial / f"{unit.attacked_by}.parquet")
        return runner.task(_defend_task).remote(
            chunks[unit.set_index][unit.chunk_index],
            len(unit_chunk(sets, unit)),
            attacked,
            unit.target,
            unit.defense.config,
            runner.device,
            runner.threads,
        )

    # Costly units first, so that the last to start is a short one.
    order = sorted(attacks, key=lambda key: -_expected_cost(attacks[key].attack))
    runner.run("attacks", order, lambda key: adversarial / f"{key}.parquet", submit_attack)
    runner.run("defences", list(defends), lambda key: outcomes / f"{key}.parquet", submit_defend)


def _expected_cost(entry: SweepAttack) -> int:
    steps = entry.attack.queries if entry.attack.name == "square" else entry.attack.num_steps
    return steps * (20 if entry.adaptive or entry.through else 1) * entry.eot_samples


def _prepare(threads: int) -> None:
    torch.set_num_threads(threads)
    # A unit must not depend on whether a purifier, which switches TF32 off, ran in its process before.
    torch.backends.cudnn.allow_tf32 = False


def _calibrate_task(
    chunk: Chunk, entry: SweepAttack, target: SweepTarget, seed: int, device: str, threads: int
) -> bytes:
    _prepare(threads)
    assert entry.calibrate_to is not None  # chosen by the caller
    found, wanted = calibrate_unit(chunk, entry.attack, entry.calibrate_to, target, seed=seed, device=device)
    content = {
        "attack": found.config.describe(),
        "wanted": wanted,
        "accuracy": found.accuracy,
        "note": found.note,
        "evaluations": [[step.epsilon, step.accuracy] for step in found.evaluations],
    }
    return json.dumps(content).encode()


def _attack_task(
    chunk: Chunk,
    count: int,
    entry: SweepAttack,
    crafted_on: SweepTarget,
    defense: Any,  # noqa: ANN401
    seed: int,
    device: str,
    threads: int,
) -> bytes:
    _prepare(threads)
    table = attack_unit(chunk.head(count), entry, crafted_on, defense, seed=seed, device=device)
    return parquet_bytes(table)


def _defend_task(
    chunk: Chunk,
    count: int,
    attacked: str | None,
    target: SweepTarget,
    defense: Any,  # noqa: ANN401
    device: str,
    threads: int,
) -> bytes:
    _prepare(threads)
    table = None if attacked is None else pq.read_table(attacked)
    return parquet_bytes(defend_unit(chunk.head(count), table, target, defense, device=device))


def parquet_bytes(table: pa.Table) -> bytes:
    """Return a table as the bytes of a Parquet file."""
    sink = io.BytesIO()
    pq.write_table(table, sink)
    return sink.getvalue()
