"""Classifiers: the WideResNet that gives latents, and the small target the demo attacks."""
