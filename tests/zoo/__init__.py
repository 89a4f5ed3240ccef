"""Tiny random models of every model type that the installed mlx-lm can build, and what is asked of each."""
