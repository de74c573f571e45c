#!/usr/bin/env python3
"""Evaluate defences under attacks: a grid, a table or a figure -> outcomes, tables, report."""

from acsr_ray.cli import run_job

if __name__ == "__main__":
    run_job("sweep_attacks")
