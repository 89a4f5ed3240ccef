"""What ships with the package: its Metal kernels and presets, and models that need no hub."""
