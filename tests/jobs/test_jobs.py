"""Jobs from the outside: executable, self-explaining, and short-spoken when something is missing."""

import importlib
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from acsr_ray.cli import ENTRY_POINTS, main
from acsr_ray.config import JOBS, Settings, _flag

FOLDER = Path(__file__).parents[2] / "jobs"
SCRIPTS = sorted(FOLDER.glob("*.py"))


def run_script(monkeypatch, script: Path, *args: str) -> int:
    """Run a job's file as `python jobs/X.py ARGS` does, and return its exit status."""
    monkeypatch.setattr(sys, "argv", [str(script), *args])
    try:
        runpy.run_path(str(script), run_name="__main__")
    except SystemExit as stop:
        return stop.code or 0
    return 0


def flags(model: type[Settings], prefix: str = "") -> list[str]:
    """Return the long option of every field, nested ones too."""
    names = []
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Settings):
            names += flags(field.annotation, f"{prefix}{name}.")
        elif "Positional" in map(str, field.metadata):
            # It has no option; its explanation stands for it.
            names.append(field.description.split(";")[0])
        else:
            names.append(_flag(model, name, prefix))
    return names


def test_every_job_has_a_script_and_every_script_is_a_job():
    assert {script.stem for script in SCRIPTS} == set(JOBS)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_scripts_are_executable_thin_and_do_nothing_when_imported(script):
    text = script.read_text()
    assert text.startswith("#!/usr/bin/env python3\n")
    assert os.access(script, os.X_OK)
    assert len(text.splitlines()) <= 60
    assert runpy.run_path(str(script), run_name="imported")["run_job"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_help_mentions_every_setting(script, monkeypatch, capsys):
    module, settings_name, _ = ENTRY_POINTS[script.stem]
    settings = getattr(importlib.import_module(module), settings_name)
    monkeypatch.setenv("COLUMNS", "200")
    assert run_script(monkeypatch, script, "--help") == 0
    shown = capsys.readouterr().out
    missing = [flag for flag in flags(settings) if flag not in shown]
    assert not missing
    assert settings.__doc__.split("\n")[0][:40] in shown


def test_a_job_runs_as_a_program():
    done = subprocess.run(
        [FOLDER / "train_baseline.py", "--trian", "x"],
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
    )
    assert done.returncode == 2
    assert "did you mean '--train'" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("args", [[], ["-h"], ["--help"]])
def test_the_console_script_lists_the_jobs(args, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["acsr-ray", *args])
    main()
    shown = capsys.readouterr().out
    for job in JOBS:
        assert job.replace("_", "-") in shown


def test_the_console_script_suggests_a_job(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["acsr-ray", "purify-corpsu"])
    with pytest.raises(SystemExit) as exit_info:
        main()
    assert exit_info.value.code == 2
    captured = capsys.readouterr()
    assert "did you mean 'purify-corpus'" in captured.out + captured.err


@pytest.mark.parametrize("name", ["train-baseline", "train_baseline"])
def test_the_console_script_runs_jobs(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["acsr-ray", name, "--train", "/nowhere", "--output", "/nowhere/out"])
    with pytest.raises(SystemExit) as exit_info:
        main()
    assert exit_info.value.code == 2
    assert "input /nowhere does not exist" in capsys.readouterr().err


# job -> (options whose inputs are missing, what the message must say)
MISSING = {
    "make_bundle": (["--recipe", "/nowhere.yaml"], "/nowhere.yaml does not exist"),
    "train_purifier": (["--train", "/nowhere", "--surrogates", "/nowhere/t"], "no target '/nowhere/t'"),
    "train_target": (["--train", "/nowhere"], "/nowhere does not exist"),
    "finetune_target": (
        ["--train", "/nowhere", "--validation", "/nowhere", "--target", "/nowhere/t"],
        "cannot fine-tune '/nowhere/t'",
    ),
    "sweep_attacks": (["--grid", "/nowhere.yaml"], "/nowhere.yaml is not readable YAML"),
    "train_defense": (["--kind", "magnet", "--train", "/nowhere"], "/nowhere does not exist"),
    "prepare_corpus": (["--dataset", "cifar10", "--source", "/nowhere"], "source /nowhere does not exist"),
    "compare_encoders": (
        ["--encoders", "/nowhere/r", "--semantics", "/nowhere/s", "--test", "/nowhere"],
        "no semantics at /nowhere/s",
    ),
    "compare_attacks": (["--target", "/nowhere", "--test", "/nowhere"], "/nowhere does not exist"),
    "calibrate_doubt": (["--validation", "/nowhere"], "/nowhere does not exist"),
    "train_baseline": (["--train", "/nowhere/a.parquet"], "/nowhere/a.parquet does not exist"),
    "learn_semantics": (["--train", "/nowhere", "--baseline", "/nowhere/b"], "no baseline at /nowhere/b"),
    "train_robust": (
        ["--train", "/nowhere", "--baseline", "/nowhere/b", "--semantics", "/nowhere/s"],
        "no baseline at /nowhere/b",
    ),
    "build_bundle": (
        ["--name", "x", "--baseline", "/nowhere/b", "--semantics", "/nowhere/s", "--robust", "/nowhere/r"],
        "no semantics at /nowhere/s",
    ),
    "purify_corpus": (["--input", "/nowhere"], "/nowhere does not exist"),
    "repurify_nightly": (["--input", "/nowhere"], "/nowhere does not exist"),
    "benchmark": (["solver", "--shard", "/nowhere.parquet"], "cannot read /nowhere.parquet"),
}


@pytest.mark.parametrize("job", JOBS)
def test_missing_input_is_said_in_one_line(job, monkeypatch, capsys, tmp_path):
    options, message = MISSING[job]
    # A recipe names the outputs itself, and a benchmark has none that must be.
    output = [] if job in ("make_bundle", "benchmark") else ["--output", str(tmp_path / "out")]
    assert run_script(monkeypatch, FOLDER / f"{job}.py", *options, *output) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1
    assert message in error[0]
    assert not (tmp_path / "out").exists()


def test_missing_bundle_writes_nothing(monkeypatch, capsys, tmp_path, write_shard):
    source = write_shard(tmp_path / "in" / "a.parquet", 2)
    options = ["--input", str(source), "--output", str(tmp_path / "out"), "--bundle", "no-such-bundle"]
    assert run_script(monkeypatch, FOLDER / "purify_corpus.py", *options) == 2
    assert "error: no bundle 'no-such-bundle'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("given", [[], ["--input", "x"], ["--output", "y"]])
def test_purification_needs_input_and_output(given, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert run_script(monkeypatch, FOLDER / "purify_corpus.py", *given) == 2
    assert "--input and --output are needed" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_output_inside_the_input_is_refused(monkeypatch, capsys, tmp_path, write_shard, tiny_bundle):
    write_shard(tmp_path / "a.parquet", 2)
    options = ["--input", str(tmp_path), "--output", str(tmp_path / "out"), "--bundle", str(tiny_bundle)]
    assert run_script(monkeypatch, FOLDER / "purify_corpus.py", *options) == 2
    assert "lies inside --input" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value"), [("--batch-size", "0"), ("--limit", "-3"), ("--unit-rows", "x")]
)
def test_values_out_of_range_exit_2_and_name_the_option(option, value, monkeypatch, capsys, tmp_path):
    options = ["--input", "x", "--output", str(tmp_path / "out"), option, value]
    assert run_script(monkeypatch, FOLDER / "purify_corpus.py", *options) == 2
    captured = capsys.readouterr()
    assert option.strip("-") in (captured.out + captured.err).replace("_", "-")
    assert "Traceback" not in captured.err
