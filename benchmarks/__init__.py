"""Benchmarks: one experiment a file, each writes one JSON. See benchmarks/README.md."""
