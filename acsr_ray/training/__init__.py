"""Losses and loops in plain torch: the baseline (stage i) and robust semantic training (stage ii)."""
