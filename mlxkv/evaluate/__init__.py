"""Evaluations: each file takes a model and what to do to its cache, and returns a plain record of numbers."""
