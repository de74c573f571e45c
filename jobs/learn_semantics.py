#!/usr/bin/env python3
"""Cluster the latents of each class, learn a dictionary per cluster (stage i): baseline/ -> semantics/."""

from acsr_ray.cli import run_job

if __name__ == "__main__":
    run_job("learn_semantics")
