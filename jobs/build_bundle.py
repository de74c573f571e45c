#!/usr/bin/env python3
"""Put semantics/ and robust/ together: -> bundle/."""

from acsr_ray.cli import run_job

if __name__ == "__main__":
    run_job("build_bundle")
