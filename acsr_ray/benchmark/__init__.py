"""What the parts cost, beside their peers in the same run."""
