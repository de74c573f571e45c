#!/usr/bin/env python3
"""Train the unrolled reconstruction of a bundle: bundle/ + shards + surrogates -> bundle/."""

from acsr_ray.cli import run_job

if __name__ == "__main__":
    run_job("train_purifier")
