"""Adapters to other packages."""
