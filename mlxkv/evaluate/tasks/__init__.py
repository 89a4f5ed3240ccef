"""Evaluations, one a file. Each registers its class; the class's docstring is the help of `mlxkv eval NAME`."""
