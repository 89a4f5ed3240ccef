"""Experiments, one a file; `benchmarks/schema.py` says what one is."""
