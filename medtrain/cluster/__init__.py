"""Slurm: everything that knows a scheduler."""
