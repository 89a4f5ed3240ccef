"""The host runner calls a kernel as MLX does: parameters, attributes, inputs of all kinds, and compiles it once."""

import re
import sys

import mlx.core as mx
import numpy as np
import pytest
from metal_host import HostError, build, installed, metal_kernel, runner, signature

from mlxkv.kernels import metal

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the host runner needs Linux")


@pytest.fixture(autouse=True)
def _only_the_runner(monkeypatch):
    monkeypatch.setattr(runner.static_checks, "check", lambda specialisation: None)


def call(kernel, inputs, shape, dtype=mx.float32, *, grid=(1, 1, 1), threadgroup=(1, 1, 1), **more):
    return kernel(
        inputs=inputs, grid=grid, threadgroup=threadgroup, output_shapes=[shape], output_dtypes=[dtype], **more
    )[0]


BODY = """
out[thread_position_in_grid.x] = T(a[0]) + b + c[a_ndim - 1] + a_shape[0] + a_strides[1] + BITS;
if (FLAG) out[thread_index_in_simdgroup + threads_per_threadgroup.x] = simdgroup_index_in_threadgroup;
"""


@pytest.mark.parametrize("atomic", [False, True])
def test_parameters_are_those_that_mlx_writes(tmp_path, capfd, atomic):
    inputs = {"a": mx.zeros((2, 4)), "b": mx.array(2, dtype=mx.bfloat16), "c": mx.zeros((7,), dtype=mx.uint8)}
    template = [("T", mx.float16), ("BITS", 3), ("FLAG", True)]

    def traced(*arrays):
        kernel = mx.fast.metal_kernel("k", list(inputs), ["out"], BODY, atomic_outputs=atomic)
        return call(kernel, list(arrays), (8,), mx.uint32, template=template, verbose=True)

    mx.export_function(str(tmp_path / "k.mlxfn"), traced, *inputs.values())  # the one way to see it without Metal
    text = capfd.readouterr().out
    written = re.findall(r"^  (.*?) \[\[\w+(?:\(\d+\))?\]\][,)]", text, re.MULTILINE)
    found = signature.Specialisation(
        "k", "", BODY, tuple(template), signature.buffers(BODY, inputs, {"out": mx.uint32}, atomic=atomic)
    )
    assert list(found.parameters) == written
    assert f"template <{found.template_parameters}>" in text
    assert f"<{found.template_arguments}>" in text


def test_a_thread_knows_its_place_in_an_odd_grid():
    kernel = metal_kernel(
        "place",
        [],
        ["out"],
        """
        uint3 p = thread_position_in_grid, g = threads_per_grid, t = thread_position_in_threadgroup;
        uint3 n = threads_per_threadgroup, at = threadgroup_position_in_grid;
        device uint* row = out + ((p.z * g.y + p.y) * g.x + p.x) * 20;
        uint values[20] = {p.x, p.y, p.z, t.x, t.y, t.z, n.x, n.y, n.z, at.x, at.y, at.z, threadgroups_per_grid.x,
            thread_index_in_threadgroup, simdgroup_index_in_threadgroup, thread_index_in_simdgroup,
            simdgroups_per_threadgroup, dispatch_threads_per_threadgroup.y, dispatch_simdgroups_per_threadgroup,
            threads_per_simdgroup + grid_size.z + grid_origin.x + thread_execution_width};
        for (int i = 0; i < 20; ++i) row[i] = values[i];
        """,
    )
    found = np.array(call(kernel, [], (3, 5, 7, 20), mx.uint32, grid=(7, 5, 3), threadgroup=(4, 4, 8)))
    for z, y, x in np.ndindex(3, 5, 7):
        at, inside = (x // 4, y // 4, 0), (x % 4, y % 4, z)
        size = (min(4, 7 - 4 * at[0]), min(4, 5 - 4 * at[1]), 3)
        index = inside[0] + size[0] * (inside[1] + size[1] * inside[2])
        groups = -(-size[0] * size[1] * size[2] // 32)
        expected = [x, y, z, *inside, *size, *at, 2, index, index // 32, index % 32, groups, 4, 2, 67]
        assert found[z, y, x].tolist() == expected


@pytest.mark.parametrize(
    "dtype", [mx.bool_, mx.uint8, mx.int8, mx.uint16, mx.int32, mx.int64, mx.float16, mx.bfloat16, mx.float32]
)
def test_inputs_of_every_size_and_type_arrive(dtype):
    kernel = metal_kernel("copy", ["x"], ["out"], "uint i = thread_position_in_grid.x;\nout[i] = x[i];")
    for size in (1, 7, 8, 33):
        x = (mx.arange(size) % 5).astype(dtype)
        found = call(kernel, [x], (size,), dtype, grid=(size, 1, 1), threadgroup=(32, 1, 1))
        assert found.dtype == dtype
        assert mx.array_equal(found, x)


def test_scalars_strided_views_and_shapes_arrive():
    body = "out[thread_position_in_grid.x] = s + x[thread_position_in_grid.x] + x_shape[1] * 100 + x_strides[0] * 1000;"
    kernel = metal_kernel("mixed", ["s", "x"], ["out"], body)
    x = mx.arange(12, dtype=mx.float32).reshape(3, 4).T
    found = call(kernel, [0.5, x], (12,), grid=(12, 1, 1), threadgroup=(5, 1, 1))
    assert found.tolist() == [value + 3300.5 for value in x.flatten().tolist()]
    half = metal_kernel("scalar", ["s"], ["out"], "out[0] = s + s;")
    assert call(half, [mx.array(1.5, dtype=mx.bfloat16)], (), mx.bfloat16).item() == 3


def test_outputs_start_at_init_value():
    kernel = metal_kernel("start", ["x"], ["out"], "if (thread_position_in_grid.x == 1) out[1] += x[0];")
    for dtype in (mx.float32, mx.bfloat16, mx.int32):
        found = call(kernel, [mx.array([2], dtype=dtype)], (3,), dtype, grid=(3, 1, 1), init_value=4)
        assert found.tolist() == [4, 6, 4]


def test_a_specialisation_compiles_once(monkeypatch, tmp_path):
    monkeypatch.setattr(build, "cache_dir", lambda: tmp_path)
    build._runtime.cache_clear()
    kernel = metal_kernel("once", ["x"], ["out"], "out[thread_position_in_grid.x] = x[0];")
    for size in (1, 2, 9):
        call(kernel, [mx.ones(size)], (size,), grid=(size, 1, 1))
    built = set(tmp_path.iterdir())
    assert len(built) == 2  # the runtime and the kernel
    monkeypatch.setattr(build, "_build", lambda *_: pytest.fail("compiled again"))
    call(kernel, [mx.ones(3)], (3,), grid=(3, 1, 1))
    build._runtime.cache_clear()


def test_installed_plants_a_fault_that_occurs_exactly_once(monkeypatch):
    texts = {
        "common": "inline float more() { return 0.0f; }\n",
        "planted": "out[0] = x[0] + 1.0f + more();\n",
    }
    monkeypatch.setattr(metal, "source", texts.get)
    kernel = metal.Kernel("planted", ("x",), ("out",))
    with installed():
        assert metal.available()
        assert call(kernel, [mx.array([1.0])], (1,)).item() == 2
    with installed(("planted", "1.0f", "2.0f")):
        assert call(kernel, [mx.array([1.0])], (1,)).item() == 3
    with installed(("another", "1.0f", "2.0f")):
        assert call(kernel, [mx.array([1.0])], (1,)).item() == 2
    with installed(("common", "0.0f", "7.0f")):
        assert call(kernel, [mx.array([1.0])], (1,)).item() == 9
    for old in ("0", "7"):
        with installed(("planted", old, "")), pytest.raises(ValueError, match="expected once"):
            call(kernel, [mx.array([1.0])], (1,))
    assert not metal.available()


def test_threadgroup_variables_of_every_form_are_shared():
    header = "inline float first(threadgroup float* values) { return values[0]; }\n"
    body = """
    threadgroup float a[(2 + 1) * 4][5], b;  // threadgroup float no[2];
    threadgroup metal::vec<uint, 2> pair[
        2];
    const uint t = thread_index_in_threadgroup;
    threadgroup float* row = a[11];
    threadgroup float4 parts;
    parts[t] = 2.0f;  // each thread owns a component
    if (t == 3) { row[4] = 2.0f; b = 3.0f; pair[1] = uint2(4, 5); a[0][0] = 6.0f; }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    out[t] = a[11][4] + b * 10.0f + float(pair[1].y) * 100.0f + first((threadgroup float*)a) * 1000.0f;
    """
    kernel = metal_kernel("forms", [], ["out"], body, header=header)
    assert call(kernel, [], (4,), grid=(4, 1, 1), threadgroup=(4, 1, 1)).tolist() == [6532] * 4
    outside = metal_kernel("outside", [], ["out"], "out[0] = 1.0f;", header="threadgroup float a;\n")
    with pytest.raises(HostError, match="outside a kernel"):
        call(outside, [], (1,))
