#!/usr/bin/env python3
"""Purify every night what is new or changed: shards + the output of the nights before -> the same output."""

from acsr_ray.cli import run_job

if __name__ == "__main__":
    run_job("repurify_nightly")
