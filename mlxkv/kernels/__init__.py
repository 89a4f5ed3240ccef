"""Hot paths of the codec and of live caches: one kernel per file, each in plain array operations and in Metal.

The kernel protocol. Each operation `<op>` of a file `mlxkv/kernels/<name>.py` is three functions of one signature:

`reference_<op>`
    Plain MLX or NumPy operations, on any device. It defines the result.
`metal_<op>`
    The same result by a Metal kernel, whose body is `metal_kernels/<name>.metal` or
    `metal_kernels/<name>_<part>.metal`: the same shapes, types and errors, identical integers, floats within
    `mlxkv.kernels.operations.TOLERANCE`. Without elements it calls no kernel, as Metal refuses an empty grid.
`<op>`
    The dispatcher, the only one of the three that other rooms call: `metal_<op>` where
    `mlxkv.kernels.metal.available()`, else `reference_<op>`. Its docstring specifies arguments, results and errors for
    all three.

The file registers an `Operation` of the three with examples of calls: see `mlxkv.kernels.operations`.
`mlxkv.kernels.metal` is the only door to `mx.fast.metal_kernel`.
"""
