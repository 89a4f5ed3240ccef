"""The host runner computes what Metal computes: small floats, functions, vectors, SIMD operations, atomics."""

import sys

import mlx.core as mx
import numpy as np
import pytest
from metal_host import metal_kernel, runner

ALL_16_BITS = mx.array(np.arange(1 << 16, dtype=np.uint16))
SMALL_FLOATS = [mx.float16, mx.bfloat16]


pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the host runner needs Linux")


@pytest.fixture(autouse=True)
def _only_the_runner(monkeypatch):
    monkeypatch.setattr(runner.static_checks, "check", lambda specialisation: None)


def run(body, inputs, outputs, *, threads, group=128, atomic=False, init=None, template=()):
    """Outputs of a body, as NumPy arrays. outputs: name -> (size, dtype)."""
    kernel = metal_kernel("body", list(inputs), list(outputs), body, atomic_outputs=atomic)
    found = kernel(
        inputs=list(inputs.values()),
        template=template,
        grid=(threads, 1, 1),
        threadgroup=(group, 1, 1),
        output_shapes=[(size,) for size, _ in outputs.values()],
        output_dtypes=[dtype for _, dtype in outputs.values()],
        init_value=init,
    )
    return dict(zip(outputs, found))


def same_bits(found, expected):
    """Equal, any NaN being equal to any."""
    both_nan = mx.isnan(found) & mx.isnan(expected)
    return mx.all((found.view(mx.uint16) == expected.view(mx.uint16)) | both_nan).item()


@pytest.mark.parametrize("dtype", SMALL_FLOATS)
def test_every_small_float_computes_and_rounds_as_in_mlx(dtype):
    a = ALL_16_BITS.view(dtype)
    b = mx.random.permutation(a, key=mx.random.key(0))
    tops = ALL_16_BITS[::4].astype(mx.uint32) * 65536
    ties_and_neighbours = mx.array([0x8000, 0x7FFF, 0x8001, 0x1000, 0x0FFF, 0x1001, 0x3000, 0], dtype=mx.uint32)
    wide = (tops[:, None] + ties_and_neighbours).flatten().view(mx.float32)
    count = wide.size
    body = """
    uint i = thread_position_in_grid.x;
    rounded[i] = T(wide[i]);
    if (i >= 65536) return;
    total[i] = a[i] + b[i];
    product[i] = a[i] * b[i];
    quotient[i] = a[i] / b[i];
    same[i] = float(a[i]);
    less[i] = a[i] < b[i];
    mixed[i] = a[i] * 0.3f;
    T changed = a[i];
    changed -= b[i];
    difference[i] = changed;
    scaled[i] = a[i] * 3 + T(1);
    """
    small = dict.fromkeys(("total", "product", "quotient", "difference", "scaled"), (1 << 16, dtype))
    other = {"rounded": (count, dtype), "same": (1 << 16, mx.float32), "less": (1 << 16, mx.bool_)}
    found = run(
        body,
        {"a": a, "b": b, "wide": wide},
        {**small, **other, "mixed": (1 << 16, mx.float32)},
        threads=count,
        template=[("T", dtype)],
    )
    assert same_bits(found["rounded"], wide.astype(dtype))
    assert same_bits(found["total"], a + b)
    assert same_bits(found["product"], a * b)
    assert same_bits(found["quotient"], a / b)
    assert same_bits(found["difference"], a - b)
    assert same_bits(found["scaled"], a * 3 + mx.array(1, dtype=dtype))
    np.testing.assert_array_equal(found["same"], a.astype(mx.float32))
    np.testing.assert_array_equal(found["less"], a < b)
    np.testing.assert_array_equal(found["mixed"], a.astype(mx.float32) * 0.3)


def test_functions_are_those_of_numpy():
    x = np.linspace(-4, 4, 161, dtype=np.float32)
    ints = np.arange(161, dtype=np.uint32) * 2654435761
    names = ("rint", "floor", "ceil", "trunc", "exp", "exp2", "sin", "cos", "tanh", "fabs", "sign")
    positive = {"log": np.log, "log2": np.log2, "sqrt": np.sqrt, "rsqrt": lambda a: 1 / np.sqrt(a)}
    body = "uint i = thread_position_in_grid.x;\nfloat p = metal::fabs(x[i]) + 0.1f;\n"
    body += "".join(f"f_{name}[i] = metal::{name}(x[i]);\n" for name in names)
    body += "".join(f"f_{name}[i] = metal::precise::{name}(p);\n" for name in positive)
    body += """
    f_clamp[i] = clamp(x[i], -1.5f, 2.0f) + max(x[i], 1.0f) * min(x[i], 0.5f);
    f_pow[i] = pow(p, 1.5f);
    f_round[i] = metal::round(x[i]);
    f_tests[i] = float(isnan(x[i] / 0.0f)) + 2.0f * float(isinf(x[i] / 0.0f)) + 4.0f * float(isfinite(x[i]));
    f_limits[i] = select(-INFINITY, numeric_limits<float>::max(), x[i] > 0.0f);
    bits[i] = popcount(n[i]) * 10000u + clz(n[i]) * 100u + ctz(n[i]);
    high[i] = mulhi(n[i], 0x9e3779b9u) + uint(ulong(n[i]) * 77ul % 1000003ul);
    same[i] = as_type<float>(as_type<uint>(x[i])) + float(abs(-3)) + float(uchar(300u)) + float(ushort(n[i]));
    """
    extra = ("clamp", "pow", "round", "tests", "limits")
    floats = {f"f_{name}": (161, mx.float32) for name in (*names, *positive, *extra)}
    outputs = {**floats, "bits": (161, mx.uint32), "high": (161, mx.uint32), "same": (161, mx.float32)}
    found = run(body, {"x": mx.array(x), "n": mx.array(ints)}, outputs, threads=161)
    for name in names:
        expected = np.abs(x) if name == "fabs" else getattr(np, name)(x)
        np.testing.assert_allclose(found[f"f_{name}"], expected, rtol=1e-6, atol=1e-6, err_msg=name)
    p = np.abs(x) + np.float32(0.1)
    for name, function in positive.items():
        np.testing.assert_allclose(found[f"f_{name}"], function(p), rtol=1e-6, atol=1e-6, err_msg=name)
    clamped = np.clip(x, -1.5, 2) + np.maximum(x, 1) * np.minimum(x, 0.5)
    np.testing.assert_allclose(found["f_clamp"], clamped, rtol=1e-6)
    np.testing.assert_allclose(found["f_pow"], p**1.5, rtol=1e-6)
    np.testing.assert_array_equal(found["f_round"], np.trunc(x + np.copysign(np.float32(0.5), x)))
    np.testing.assert_array_equal(found["f_tests"], np.where(x == 0, 5, 6))
    np.testing.assert_array_equal(found["f_limits"], np.where(x > 0, np.finfo(np.float32).max, -np.inf))
    ones = [bin(n).count("1") for n in ints.tolist()]
    leading = [32 - n.bit_length() for n in ints.tolist()]
    trailing = [(n & -n).bit_length() - 1 if n else 32 for n in ints.tolist()]
    np.testing.assert_array_equal(found["bits"], np.array(ones) * 10000 + np.array(leading) * 100 + trailing)
    high = [((n * 0x9E3779B9) >> 32) + n * 77 % 1000003 for n in ints.tolist()]
    np.testing.assert_array_equal(found["high"], np.array(high) % (1 << 32))
    np.testing.assert_array_equal(found["same"], x + 3 + 44 + (ints & 0xFFFF).astype(np.float32))


def test_vectors_load_compute_and_store_by_component():
    x = mx.random.normal((64, 4))
    body = """
    uint i = thread_position_in_grid.x;
    float4 v = ((const device float4*)x)[i];
    v = v * 2.0f + float4(v.w, v.z, v.y, v.x);
    v[1] -= 1.0f;
    half4 h = half4(v);
    ((device float4*)out)[i] = max(v, float4(0.0f));
    uint2 pair = uint2(i, 7) << 2u;
    sums[i] = dot(v, float4(1.0f)) + float(h.x - half(v.x)) + float(pair.x + pair.y);
    """
    found = run(body, {"x": x}, {"out": (256, mx.float32), "sums": (64, mx.float32)}, threads=64)
    expected = np.array(x) * 2 + np.array(x)[:, ::-1]
    expected[:, 1] -= 1
    np.testing.assert_allclose(np.array(found["out"]).reshape(64, 4), np.maximum(expected, 0), rtol=1e-6)
    np.testing.assert_allclose(found["sums"], expected.sum(1) + np.arange(64) * 4 + 28, rtol=1e-5)


SIMD = {
    "simd_sum(v)": lambda v: np.full_like(v, v.sum()),
    "simd_max(v)": lambda v: np.full_like(v, v.max()),
    "simd_min(v)": lambda v: np.full_like(v, v.min()),
    "simd_product(v % 3 + 1)": lambda v: np.full_like(v, np.prod(v % 3 + 1)),
    "simd_and(v | 64)": lambda v: np.full_like(v, np.bitwise_and.reduce(v | 64)),
    "simd_or(v)": lambda v: np.full_like(v, np.bitwise_or.reduce(v)),
    "simd_xor(v)": lambda v: np.full_like(v, np.bitwise_xor.reduce(v)),
    "simd_prefix_exclusive_sum(v)": lambda v: np.cumsum(v) - v,
    "simd_prefix_inclusive_sum(v)": np.cumsum,
    "simd_prefix_exclusive_product(v % 2 + 1)": lambda v: np.cumprod(v % 2 + 1) // (v % 2 + 1),
    "simd_prefix_inclusive_product(v % 2 + 1)": lambda v: np.cumprod(v % 2 + 1),
    "simd_broadcast(v, 2)": lambda v: np.full_like(v, v[2]),
    "simd_broadcast_first(v)": lambda v: np.full_like(v, v[0]),
    "simd_shuffle(v, (lane + 2) % lanes)": lambda v: np.roll(v, -2),
    "int(ulong(simd_ballot(v > 50)) >> 1)": lambda v: np.full_like(v, sum(1 << i for i in np.nonzero(v > 50)[0]) >> 1),
    "simd_all(v > 90)": lambda v: np.full_like(v, np.all(v > 90)),
    "simd_any(v > 90)": lambda v: np.full_like(v, np.any(v > 90)),
}
FULL = {
    "simd_shuffle_xor(v, 5)": lambda v: v[np.arange(32) ^ 5],
    "simd_shuffle_up(v, 3)": lambda v: np.concatenate([v[:3], v[:-3]]),
    "simd_shuffle_down(v, 3)": lambda v: np.concatenate([v[3:], v[-3:]]),
    "simd_shuffle_rotate_down(v, 3)": lambda v: np.roll(v, -3),
    "simd_shuffle_rotate_up(v, 3)": lambda v: np.roll(v, 3),
}


@pytest.mark.parametrize(("size", "table"), [(3, SIMD), (31, SIMD), (64, {**SIMD, **FULL})])
def test_simd_operations_over_full_and_partial_simd_groups(size, table):
    x = np.random.default_rng(size).integers(0, 100, size, dtype=np.int32)
    body = "uint i = thread_position_in_grid.x, lane = thread_index_in_simdgroup;\nint v = x[i];\n"
    body += "uint lanes = metal::min(threads_per_threadgroup.x, 32u);\n"
    body += "".join(f"out[{n} * {size} + i] = {operation};\n" for n, operation in enumerate(table))
    found = run(body, {"x": mx.array(x)}, {"out": (len(table) * size, mx.int32)}, threads=size)
    out = np.array(found["out"]).reshape(len(table), size)
    for row, (operation, expected) in zip(out, table.items()):
        for first in range(0, size, 32):
            v = x[first : first + 32]
            np.testing.assert_array_equal(row[first : first + 32], expected(v).astype(np.int32), err_msg=operation)


def test_lanes_that_returned_take_no_part_and_floats_add_as_a_tree():
    x = np.random.default_rng(0).normal(size=32).astype(np.float32)
    body = "uint i = thread_position_in_grid.x;\nout[i] = 0.0f;\nif (i % 3 == 1) return;\nout[i] = simd_sum(x[i]);"
    found = run(body, {"x": mx.array(x)}, {"out": (32, mx.float32)}, threads=32)
    tree = np.where(np.arange(32) % 3 == 1, np.float32(0), x)
    while tree.size > 1:
        tree = tree[: tree.size // 2] + tree[tree.size // 2 :]
    np.testing.assert_array_equal(found["out"], np.where(np.arange(32) % 3 == 1, 0, tree[0]).astype(np.float32))


def test_atomics_on_outputs_and_on_threadgroup_memory():
    x = mx.random.randint(0, 1000, (200,), key=mx.random.key(0))
    body = """
    uint i = thread_position_in_grid.x;
    threadgroup atomic<int> mine;
    if (thread_index_in_threadgroup == 0) atomic_store_explicit(&mine, 0, memory_order_relaxed);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    atomic_fetch_add_explicit(&mine, x[i], memory_order_relaxed);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (thread_index_in_threadgroup == 0) {
      atomic_fetch_add_explicit(&out[0], atomic_load_explicit(&mine, memory_order_relaxed), memory_order_relaxed);
    }
    atomic_fetch_sub_explicit(&out[1], x[i], memory_order_relaxed);
    atomic_fetch_max_explicit(&out[2], x[i], memory_order_relaxed);
    atomic_fetch_min_explicit(&out[3], -x[i], memory_order_relaxed);
    atomic_fetch_or_explicit(&out[4], x[i], memory_order_relaxed);
    atomic_fetch_xor_explicit(&out[5], x[i], memory_order_relaxed);
    atomic_fetch_and_explicit(&out[6], x[i], memory_order_relaxed);
    int seen = 0;
    while (!atomic_compare_exchange_weak_explicit(
        &out[7], &seen, seen + x[i], memory_order_relaxed, memory_order_relaxed)) {
    }
    atomic_exchange_explicit(&out[8], 5, memory_order_relaxed);
    """
    found = run(body, {"x": x}, {"out": (9, mx.int32)}, threads=200, group=64, atomic=True, init=0)["out"].tolist()
    values = x.tolist()
    total, either = sum(values), np.bitwise_or.reduce(values)
    assert found == [total, -total, max(values), -max(values), either, np.bitwise_xor.reduce(values), 0, total, 5]


def test_float_atomics_may_round_in_any_order():
    x = mx.random.uniform(shape=(500,))
    body = "atomic_fetch_add_explicit(&out[0], x[thread_position_in_grid.x], memory_order_relaxed);"
    found = run(body, {"x": x}, {"out": (1, mx.float32)}, threads=500, atomic=True, init=0)
    assert found["out"].item() == pytest.approx(x.sum().item(), rel=1e-4)
