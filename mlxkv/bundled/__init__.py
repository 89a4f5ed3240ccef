"""Resources that ship with the package: Metal kernels and presets, and models that need no hub."""
