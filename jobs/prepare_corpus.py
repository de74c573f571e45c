#!/usr/bin/env python3
"""Turn a public data set into lossless Parquet shards: archive or folder -> corpus."""

from acsr_ray.cli import run_job

if __name__ == "__main__":
    run_job("prepare_corpus")
