#!/usr/bin/env python3
"""Fine-tune a target classifier on purified shards: target/ + shards -> target/ + report.md."""

from acsr_ray.cli import run_job

if __name__ == "__main__":
    run_job("finetune_target")
