"""Hot paths, one kernel a file: a reference in plain array operations, the Metal call, and a dispatcher of one signature.

The bodies are in metal_kernels/. `metal.py` is the only door to `mx.fast.metal_kernel`.
"""
