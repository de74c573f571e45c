#!/usr/bin/env python3
"""Train a target classifier for attack evaluation: shards -> target/."""

from acsr_ray.cli import run_job

if __name__ == "__main__":
    run_job("train_target")
