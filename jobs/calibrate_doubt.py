#!/usr/bin/env python3
"""Calibrate doubt, by which purified images are routed to people: bundle + labelled shards -> doubt/."""

from acsr_ray.cli import run_job

if __name__ == "__main__":
    run_job("calibrate_doubt")
