#!/usr/bin/env python3
"""Train the baseline f_bsl (stage i): shards -> baseline/."""

from acsr_ray.cli import run_job

if __name__ == "__main__":
    run_job("train_baseline")
