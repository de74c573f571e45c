#!/usr/bin/env python3
"""Purify a corpus (stage iii): shards + bundle/ -> purified shards."""

from acsr_ray.cli import run_job

if __name__ == "__main__":
    run_job("purify_corpus")
