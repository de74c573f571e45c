"""The console script `acsr-ray VERB|JOB ...` and the entry point of `jobs/*.py`: the same functions."""

import ast
import contextlib
import importlib
import io
import json
import logging
import math
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from acsr_ray.config import EPILOGUE, JOBS, AcsrError, JobSettings, did_you_mean, parse_job

# name -> (module, settings class, function); imported only when it runs, so --help stays quick. What is no
# job of `JOBS` is a verb; a verb needs nothing but its row.
ENTRY_POINTS: Mapping[str, tuple[str, str, str]] = {
    "plan": ("acsr_ray.distributed.plan", "PlanSettings", "plan"),
    "purify": ("acsr_ray.demo.job", "PurifyCorpusSettings", "purify_or_demo"),
    "status": ("acsr_ray.operations.status", "StatusSettings", "output_status"),
    "retry": ("acsr_ray.operations.retry", "RetrySettings", "retry"),
    "verify": ("acsr_ray.operations.verify", "VerifySettings", "verify_output"),
    "report": ("acsr_ray.reporting.job", "ReportSettings", "report"),
    "doctor": ("acsr_ray.operations.doctor", "DoctorSettings", "examine"),
    "submit": ("acsr_ray.distributed.submit", "SubmitSettings", "submit"),
    "prepare_corpus": ("acsr_ray.corpus.archives", "PrepareCorpusSettings", "prepare_corpus"),
    "train_baseline": ("acsr_ray.distributed.training", "TrainBaselineSettings", "train_baseline"),
    "learn_semantics": (
        "acsr_ray.distributed.semantics",
        "LearnSemanticsSettings",
        "learn_semantics",
    ),
    "train_robust": ("acsr_ray.distributed.training", "TrainRobustSettings", "train_robust"),
    "build_bundle": ("acsr_ray.distributed.bundling", "BuildBundleSettings", "build_bundle"),
    "make_bundle": ("acsr_ray.distributed.recipe", "MakeBundleSettings", "make_bundle"),
    "train_purifier": (
        "acsr_ray.distributed.purifier_training",
        "TrainPurifierSettings",
        "train_purifier",
    ),
    "train_target": ("acsr_ray.distributed.training", "TrainTargetSettings", "train_target"),
    "finetune_target": (
        "acsr_ray.distributed.finetuning",
        "FinetuneTargetSettings",
        "finetune_target",
    ),
    "calibrate_doubt": ("acsr_ray.distributed.doubt", "CalibrateDoubtSettings", "calibrate_doubt"),
    "train_defense": ("acsr_ray.training.defense", "TrainDefenseSettings", "train_defense"),
    "compare_encoders": ("acsr_ray.distributed.encoders", "CompareEncodersSettings", "compare_encoders"),
    "compare_attacks": ("acsr_ray.evaluation.parity", "CompareAttacksSettings", "compare_attacks"),
    "sweep_attacks": ("acsr_ray.distributed.sweep", "SweepAttacksSettings", "sweep_attacks"),
    "purify_corpus": ("acsr_ray.demo.job", "PurifyCorpusSettings", "purify_or_demo"),
    "repurify_nightly": ("acsr_ray.operations.nightly", "RepurifyNightlySettings", "repurify_nightly"),
    "benchmark": ("acsr_ray.benchmark.job", "BenchmarkSettings", "benchmark"),
}
INTERRUPTED, EXIT_INTERRUPTED = "interrupted", 130
"""Ctrl-C where nothing was begun that could be resumed; the code is that of shells for SIGINT."""
VERBS = tuple(name for name in ENTRY_POINTS if name not in JOBS)


def run_job(job: str, args: Sequence[str] | None = None) -> None:
    """Parse the settings of a job or verb, run it and print a closing summary.

    With `--json`, stdout is one JSON object and everything else goes to stderr.

    Args:
        job: a name of `ENTRY_POINTS`.
        args: command line without the program name; `sys.argv[1:]` when omitted.

    Raises:
        SystemExit: with the code of an `AcsrError`, or that of the summary (`exit_code`) where it has one.
    """
    given = list(sys.argv[1:] if args is None else args)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    # What follows a lone `--` is another job's.
    end = given.index("--") if "--" in given else len(given)
    own, passed_on = given[:end], given[end:]
    if "--json" in own and not {"--help", "-h"} & set(own):
        code = _run_for_programs(job, [*(token for token in own if token != "--json"), *passed_on])
    else:
        code = _run_for_people(job, given)
    if code:
        raise SystemExit(code)


def _parsed(job: str, given: Sequence[str]) -> tuple[JobSettings, Callable[[JobSettings], Mapping[str, Any]]]:
    module_name, settings_name, function_name = ENTRY_POINTS[job]
    module = importlib.import_module(module_name)
    settings_type: type[JobSettings] = getattr(module, settings_name)
    prog = f"acsr-ray {job}" if job in VERBS else f"{job}.py"
    return parse_job(settings_type, job, given, prog=prog), getattr(module, function_name)


def _run_for_people(job: str, given: Sequence[str]) -> int:
    settings, function = _parsed(job, given)
    started = time.perf_counter()
    try:
        summary = function(settings)
    except AcsrError as error:
        if error.summary is not None:
            _show(settings, error.summary, f"{job}: failed after {time.perf_counter() - started:.1f} s")
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(INTERRUPTED, file=sys.stderr)
        return EXIT_INTERRUPTED
    _show(settings, summary, f"{job}: done in {time.perf_counter() - started:.1f} s")
    if "error" in summary:
        print(f"error: {summary['error']}", file=sys.stderr)
    return int(summary.get("exit_code", 0))


def _show(settings: JobSettings, summary: Mapping[str, Any], heading: str) -> None:
    text = settings.render(summary)
    if text is not None:
        print(text)
        return
    print(f"\n{heading}")
    for key, value in summary.items():
        print(f"  {key:20} {value if isinstance(value, str) else json.dumps(value)}")


def _run_for_programs(job: str, given: Sequence[str]) -> int:
    # Whatever else is printed on the way, by libraries too, is for people.
    with contextlib.redirect_stdout(sys.stderr):
        content = _outcome(job, given)
    print(json.dumps(_plain(content)))
    return int(content.get("exit_code", 0))


def _outcome(job: str, given: Sequence[str]) -> Mapping[str, Any]:
    """Return a summary, or what stands for it where there is none."""
    told = io.StringIO()
    try:
        try:
            with contextlib.redirect_stderr(told), contextlib.redirect_stdout(told):
                settings, function = _parsed(job, given)
        finally:
            sys.stderr.write(told.getvalue())
        return function(settings)
    except SystemExit as stop:
        # Only the parser exits; what it told is framed for people.
        lines = [line.strip("│╭╮╰╯─ \n") for line in told.getvalue().splitlines()]
        message = " ".join(line for line in lines if line.strip("-"))
        return {"error": message.removeprefix("error: "), "exit_code": stop.code}
    except AcsrError as error:
        return {**(error.summary or {}), "error": str(error), "exit_code": error.exit_code}
    except KeyboardInterrupt:
        return {"error": INTERRUPTED, "exit_code": EXIT_INTERRUPTED}
    except Exception as error:  # a program that reads stdout gets its object whatever happens
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}", "exit_code": 1}


def _plain(value: Any) -> Any:  # noqa: ANN401  (any JSON value)
    """Return a value as JSON has it: no infinities, and text for what it has no type for."""
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(each) for each in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, int | str | None) else str(value)


def _first_line(name: str) -> str:
    """Return what a verb or job says of itself, from its source: importing all of them takes long."""
    module, settings, _ = ENTRY_POINTS[name]
    for candidate in (module, *_imported_from(module, settings)):
        for node in ast.parse(_source(candidate)).body:
            if isinstance(node, ast.ClassDef) and node.name == settings:
                return (ast.get_docstring(node) or "").split("\n")[0]
    return ""


def _imported_from(module: str, name: str) -> list[str]:
    """Return the module that a module imports a name from, if it does."""
    return [
        node.module
        for node in ast.parse(_source(module)).body
        if isinstance(node, ast.ImportFrom) and node.module and name in {alias.name for alias in node.names}
    ]


def _source(module: str) -> str:
    return Path(__file__).parent.joinpath(*module.split(".")[1:]).with_suffix(".py").read_text()


def _overview() -> str:
    def listed(names: Sequence[str]) -> list[str]:
        width = max(map(len, names))
        return [f"  {name.replace('_', '-'):{width}}  {_first_line(name)}" for name in names]

    lines = ["usage: acsr-ray VERB|JOB [OPTIONS]", "", "verbs, about a purification:", *listed(VERBS)]
    lines += ["", "jobs, in the order they run:", *listed(JOBS)]
    lines += [
        "",
        "`acsr-ray VERB --help` explains every option; `--config FILE` reads a settings file.",
        EPILOGUE,
    ]
    return "\n".join(lines)


def main() -> None:
    """Run `acsr-ray VERB|JOB OPTIONS`; names take dashes or underscores."""
    given = sys.argv[1:]
    if not given or given[0] in ("-h", "--help"):
        print(_overview())
        return
    name = given[0].replace("-", "_")
    if name not in ENTRY_POINTS:
        names = [known.replace("_", "-") for known in ENTRY_POINTS]
        message = f"unknown verb or job {given[0]!r}{did_you_mean(given[0], names)}"
        print(f"error: {message}", file=sys.stderr)
        if "--json" in given:
            print(json.dumps({"error": message, "exit_code": 2}))
        raise SystemExit(2)
    run_job(name, given[1:])


if __name__ == "__main__":
    main()
