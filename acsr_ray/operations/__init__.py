"""What a platform team does with an output besides making it: look, check, do again, every night."""
