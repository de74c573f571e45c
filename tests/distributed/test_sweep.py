"""A sweep on Ray: end to end, from the cache, killed and resumed, and with units that fail."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
import yaml

from acsr_ray.config import AcsrError
from acsr_ray.distributed.runtime import RaySettings
from acsr_ray.distributed.sweep import SweepAttacksSettings, sweep_attacks
from acsr_ray.distributed.unit_runner import SweepError
from acsr_ray.evaluation.grid import GridError
from acsr_ray.models.targets import TargetConfig, build_target, save_target

pytestmark = pytest.mark.ray

JOB = Path(__file__).parents[2] / "jobs" / "sweep_attacks.py"
IMAGES, CHUNK = 12, 3
TIMED = ("seconds", "attack_seconds")
PGD = {"name": "pgd", "epsilon": 0.02, "steps": 3}
ATTACKS = [
    {
        "name": "FGSM (B0)",
        "attack": {"name": "fgsm", "norm": "relative_l2", "epsilon": 0.02},
        "calibrate_to": 0.5,
        "block": "B0",
    },
    # The same attack under another name: it shares the calibration and every unit.
    {
        "name": "twin (B0)",
        "attack": {"name": "fgsm", "norm": "relative_l2", "epsilon": 0.02},
        "calibrate_to": 0.5,
    },
    {"name": "PGD", "attack": PGD},
    {"name": "white-box", "attack": PGD, "knowledge": "white_box", "defenses": ["none", "ACSR"]},
]


@pytest.fixture(scope="module")
def parts(tmp_path_factory, write_shard, tiny_bundle):
    """Shards, a target and the grid that they make."""
    # Ray starts its workers at niceness 15, which a busy machine starves.
    os.environ.setdefault("RAY_worker_niceness", "0")
    folder = tmp_path_factory.mktemp("sweep")
    config = TargetConfig(architecture="small_cnn", num_classes=3)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        save_target(folder / "target", build_target(config), config, ("ant", "bee", "cat"), {})
    content = {
        "title": "A small sweep",
        "data": [
            {
                "name": "toys",
                "test": [str(write_shard(folder / "test.parquet", IMAGES, 32, 0))],
                "validation": [str(write_shard(folder / "validation.parquet", 9, 32, 1))],
            }
        ],
        "targets": [{"name": "net", "location": str(folder / "target")}],
        "attacks": ATTACKS,
        "defenses": [
            {"name": "none", "config": {"name": "none"}},
            {"name": "JPEG 75", "config": {"name": "jpeg", "quality": 75}},
            {"name": "ACSR", "config": {"name": "acsr", "artifact": str(tiny_bundle)}},
        ],
        "chunk": CHUNK,
        "choose": True,
        "reference": "ACSR",
    }
    return folder, content


def settings(parts, output, name="grid.yaml", **changes):
    folder, content = parts
    path = folder / name
    path.write_text(yaml.safe_dump({**content, **changes}))
    return SweepAttacksSettings(
        grid=path, output=output, device="cpu", ray=RaySettings(object_store_megabytes=100)
    )


def rows_of(output):
    """Return every row but its times, in an order of its own."""
    rows = pq.read_table(output / "results.parquet").drop_columns(list(TIMED)).to_pylist()
    names = ("split", "target", "attack", "defense", "seed", "key")
    return sorted(rows, key=lambda row: [str(row[name]) for name in names])


def unit_files(output):
    folders = ("calibrations", "adversarial", "outcomes")
    return {path for folder in folders for path in (output / folder).glob("*") if path.name[0] != "."}


@pytest.fixture(scope="module")
def swept(parts, tmp_path_factory, ray_local):
    output = tmp_path_factory.mktemp("swept")
    return sweep_attacks(settings(parts, output)), output


def test_every_cell_is_there_with_its_files(swept):
    summary, output = swept
    rows = rows_of(output)
    cells = {(row["split"], row["attack"], row["defense"]) for row in rows}
    defenses = ("none", "JPEG 75", "ACSR")
    assert cells == {
        *((split, "clean", name) for split in ("test", "validation") for name in defenses),
        *(("test", attack, name) for attack in ("FGSM (B0)", "twin (B0)", "PGD") for name in defenses),
        *(("test", "white-box", name) for name in ("none", "ACSR")),
    }
    assert len(rows) == 3 * (IMAGES + 9) + (9 + 2) * IMAGES
    # 4 chunks: two bare attacks shared by all defences, and one attack for each of two defences.
    assert len(list((output / "adversarial").iterdir())) == 4 * (2 + 2)
    assert len(list((output / "outcomes").iterdir())) == 3 * (4 + 3) + 4 * (6 + 2)
    assert summary["units"] == 4 * 4 + 3 * 7 + 4 * 8
    assert summary["from the cache"] == 0
    assert len(list((output / "calibrations").iterdir())) == 1
    assert json.loads((output / "grid.json").read_text())["title"] == "A small sweep"
    assert not list(output.rglob(".*"))
    report = Path(summary["report"]).read_text()
    for words in ("A small sweep", "white-box", "JPEG 75", "Before and after"):
        assert words in report


def test_the_calibrated_budget_is_the_one_that_is_used(swept):
    _, output = swept
    (path,) = (output / "calibrations").iterdir()
    calibrated = json.loads(path.read_text())["attack"]
    budgets = {row["budget"] for row in rows_of(output) if row["attack"] == "FGSM (B0)"}
    assert len(budgets) == 1
    assert f"{calibrated['epsilon']:.3g}".removeprefix("0") in budgets.pop()
    twins = {row["budget"] for row in rows_of(output) if row["attack"] == "twin (B0)"}
    assert {budget for budget in twins} == {f"FGSM l2rel {calibrated['epsilon']:.3g}".replace(" 0.", " .")}
    norms = [row["relative_l2"] for row in rows_of(output) if row["attack"] == "FGSM (B0)"]
    assert max(norms) < calibrated["epsilon"] + 0.02


def test_a_second_run_takes_everything_from_the_cache(swept, parts):
    summary, output = swept
    stamps = {path: path.stat().st_mtime_ns for path in unit_files(output)}
    before = pq.read_table(output / "results.parquet")
    again = sweep_attacks(settings(parts, output))
    assert again["from the cache"] == summary["units"] + 1
    assert {path: path.stat().st_mtime_ns for path in unit_files(output)} == stamps
    assert pq.read_table(output / "results.parquet").equals(before)


def test_a_new_defence_reuses_the_attacks_of_a_shared_cache(swept, parts, tmp_path):
    _, output = swept
    cache = tmp_path / "cache"
    shutil.copytree(output, cache)
    attacked = set((cache / "adversarial").iterdir())
    _, content = parts
    blur = {"name": "blur", "config": {"name": "gaussian", "sigma": 0.5}}
    run = settings(parts, tmp_path / "out", "blur.yaml", defenses=[*content["defenses"], blur])
    sweep_attacks(run.model_copy(update={"cache": cache}))
    assert set((cache / "adversarial").iterdir()) == attacked
    assert not unit_files(tmp_path / "out")
    names = {row["defense"] for row in rows_of(tmp_path / "out")}
    assert names == {"none", "JPEG 75", "ACSR", "blur"}
    assert [row for row in rows_of(tmp_path / "out") if row["defense"] != "blur"] == rows_of(output)


def test_failing_units_are_named_and_the_others_are_kept(parts, tmp_path, ray_local):
    _, content = parts
    defenses = [defense for defense in content["defenses"] if defense["name"] != "ACSR"]
    # Only the unit finds out that torchattacks cannot count to "many".
    broken = {"name": "torchattacks.PGD", "epsilon": PGD["epsilon"], "options": {"steps": "many"}}
    attacks = [{"name": "PGD", "attack": PGD}, {"name": "broken", "attack": broken}]
    changes = {"defenses": defenses, "choose": False, "reference": None}
    run = settings(parts, tmp_path, "failing.yaml", attacks=attacks, **changes)
    with pytest.raises(SweepError, match=r"4 of 8 units of attacks failed: .*integer"):
        sweep_attacks(run)
    kept = {path: path.stat().st_mtime_ns for path in unit_files(tmp_path)}
    assert len(kept) == 4
    assert not (tmp_path / "results.parquet").exists()

    summary = sweep_attacks(settings(parts, tmp_path, "mended.yaml", attacks=attacks[:1], **changes))
    assert summary["from the cache"] == 4
    assert kept.items() <= {path: path.stat().st_mtime_ns for path in unit_files(tmp_path)}.items()


def test_what_cannot_work_is_refused_before_any_unit(parts, tmp_path, ray_local):
    white = {"name": "white-box", "attack": PGD, "knowledge": "white_box"}
    unknown = {"name": "x", "attack": {"name": "torchattacks.PGDD", "epsilon": PGD["epsilon"]}}
    for attack, message in ((white, "white-box: Jpeg has no gradient"), (unknown, "PGDD")):
        run = settings(parts, tmp_path, "refused.yaml", attacks=[attack], choose=False, reference=None)
        with pytest.raises(AcsrError, match=message):
            sweep_attacks(run)
    assert unit_files(tmp_path) == set()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"name": "acsr", "reconstruction": "unrolled"}, "defence broken: .*tiny has no unrolled"),
        ({"name": "rank", "rank": 9}, r"defence broken: rank: rank must be in 1\.\.4"),
    ],
)
def test_a_defence_that_cannot_be_built_is_refused_before_any_unit(
    parts, tmp_path, tiny_bundle, ray_local, config, message
):
    # No attack sees it, so the first to build it would be a unit after all attacks.
    broken = {"name": "broken", "config": {**config, "artifact": str(tiny_bundle)}}
    attacks = [{"name": "PGD", "attack": PGD}]
    run = settings(
        parts, tmp_path, "broken.yaml", attacks=attacks, defenses=[broken], choose=False, reference=None
    )
    with pytest.raises(GridError, match=message):
        sweep_attacks(run)
    assert unit_files(tmp_path) == set()


@pytest.mark.parametrize("given", [{}, {"grid": Path("x.yaml"), "table": "3"}, {"table": "3", "figure": "2"}])
def test_one_grid_at_a_time(tmp_path, given):
    with pytest.raises(AcsrError, match="exactly one of --grid, --table and --figure"):
        sweep_attacks(SweepAttacksSettings(output=tmp_path, **given))


def processes_of(session):
    """Return the processes of a session that was started with `start_new_session`, or below it."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal():
            continue
        try:
            after_name = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        state, sid = after_name[0], int(after_name[3])
        if sid == session and state != "Z":
            found.append(int(entry.name))
    return found


def kill_when(command, environment, enough, log):
    """Run a command and kill all of its processes as soon as `enough()` holds."""
    with log.open("wb") as stderr:
        driver = subprocess.Popen(
            command, stdout=stderr, stderr=stderr, env=environment, start_new_session=True
        )
    try:
        deadline = time.monotonic() + 150
        while not enough():
            assert driver.poll() is None, f"ended before it could be killed: {log.read_text()[-2000:]}"
            assert time.monotonic() < deadline, f"too slow: {log.read_text()[-2000:]}"
            time.sleep(0.01)
    finally:
        os.killpg(driver.pid, signal.SIGKILL)
        driver.wait()
    # Ray's own processes end with their driver, and what they hold must not meet the next one.
    deadline = time.monotonic() + 30
    while left := processes_of(driver.pid):
        if time.monotonic() > deadline:
            for pid in left:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.1)


@pytest.mark.slow
def test_a_sweep_killed_twice_equals_an_uninterrupted_one(swept, parts, tmp_path):
    _, whole = swept
    run = settings(parts, tmp_path / "out")
    command = [
        *(sys.executable, str(JOB), "--grid", str(run.grid), "--output", str(run.output)),
        *("--device", "cpu", "--ray.object-store-megabytes", "100"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("RAY_ADDRESS", None)
    total, done = len(unit_files(whole)), {}
    # Once among the attacks, once among the defences.
    for kill, count in enumerate((6, 30)):
        kill_when(
            command,
            environment,
            lambda count=count: len(unit_files(run.output)) >= count,
            tmp_path / f"log-{kill}",
        )
        now = {path: path.stat().st_ino for path in unit_files(run.output)}
        assert count <= len(now) < total, "the kill came too late to prove anything"
        assert done.items() <= now.items(), "a finished unit was written again"
        assert not (run.output / "results.parquet").exists()
        done = now
    # What a kill in the midst of writing leaves behind, by a process that is no more.
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (run.output / "outcomes" / f".half.parquet.{dead.pid}.tmp").write_bytes(b"PAR1")

    last = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert last.returncode == 0, last.stderr
    assert done.items() <= {path: path.stat().st_ino for path in unit_files(run.output)}.items()
    names = {str(path.relative_to(run.output)) for path in unit_files(run.output)}
    assert names == {str(path.relative_to(whole)) for path in unit_files(whole)}
    assert not list(run.output.rglob("*.tmp"))
    assert rows_of(run.output) == rows_of(whole)
