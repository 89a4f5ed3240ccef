"""Benchmarks: one experiment a file, each writes one JSON. See benchmarks/README.md."""

import mlxkv as mlxkv  # before any mlx import: it loads a fast BLAS on Linux
