"""The console script `acsr-ray JOB ...` and the entry point shared by `jobs/*.py`: the same functions."""

import importlib
import json
import logging
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from acsr_ray.config import JOBS, AcsrError, JobSettings, did_you_mean, parse_job

# job -> (module, settings class, function); imported only when the job runs, so --help stays quick.
ENTRY_POINTS: Mapping[str, tuple[str, str, str]] = {
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
    "benchmark": ("acsr_ray.benchmark.job", "BenchmarkSettings", "benchmark"),
}


def run_job(job: str, args: Sequence[str] | None = None) -> None:
    """Parse one job's settings, run it and print a closing summary; exits with the code of an `AcsrError`."""
    module_name, settings_name, function_name = ENTRY_POINTS[job]
    module = importlib.import_module(module_name)
    settings_type: type[JobSettings] = getattr(module, settings_name)
    function: Callable[[JobSettings], Mapping[str, Any]] = getattr(module, function_name)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    settings = parse_job(settings_type, job, args)
    started = time.perf_counter()
    try:
        summary = function(settings)
    except AcsrError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from error
    print(f"\n{job}: done in {time.perf_counter() - started:.1f} s")
    for key, value in summary.items():
        print(f"  {key:20} {value if isinstance(value, str) else json.dumps(value)}")


def main() -> None:
    """Run `acsr-ray JOB OPTIONS`; job names take dashes or underscores."""
    names = [job.replace("_", "-") for job in JOBS]
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print("usage: acsr-ray JOB [OPTIONS]\n\njobs:", *names, sep="\n  ")
        print("\n`acsr-ray JOB --help` explains every option.")
        return
    job = sys.argv[1].replace("-", "_")
    if job not in JOBS:
        print(f"error: unknown job {sys.argv[1]!r}{did_you_mean(sys.argv[1], names)}")
        raise SystemExit(2)
    run_job(job, sys.argv[2:])


if __name__ == "__main__":
    main()
