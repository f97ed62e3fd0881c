"""Experiments with a known analytic answer, run through the same code as every other experiment."""
