"""Adversarial attacks: what an attacker adds to an image."""
