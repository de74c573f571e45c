#!/usr/bin/env python3
"""Compare our attacks with torchattacks' on one target: accuracy left, norms and time."""

from acsr_ray.cli import run_job

if __name__ == "__main__":
    run_job("compare_attacks")
