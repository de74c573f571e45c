#!/usr/bin/env python3
"""Time the parts beside their peers in the same run -> table, JSON, GPUs for a night."""

from acsr_ray.cli import run_job

if __name__ == "__main__":
    run_job("benchmark")
