"""Interfaces to packages by others."""
