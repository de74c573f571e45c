#!/usr/bin/env python3
"""Compare robust encoders: does the selected cluster survive an attack?"""

from acsr_ray.cli import run_job

if __name__ == "__main__":
    run_job("compare_encoders")
