#!/usr/bin/env python3
"""Make a bundle from a corpus: every stage of a recipe that is not done yet."""

from acsr_ray.cli import run_job

if __name__ == "__main__":
    run_job("make_bundle")
