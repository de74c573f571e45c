#!/usr/bin/env python3
"""Train what a rival defence needs (autoencoder, PixelCNN, global dictionary, patches)."""

from acsr_ray.cli import run_job

if __name__ == "__main__":
    run_job("train_defense")
