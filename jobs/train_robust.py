#!/usr/bin/env python3
"""Train the robust encoder f_rob (stage ii): shards + baseline/ + semantics/ -> robust/."""

from acsr_ray.cli import run_job

if __name__ == "__main__":
    run_job("train_robust")
