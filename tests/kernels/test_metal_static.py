"""The static checks find each planted mistake at its line, and nothing in a kernel that Metal accepts."""

import mlx.core as mx
import pytest
from metal_host.signature import Specialisation, buffers
from metal_host.static_checks import StaticError, check

HEADER = """
template <typename P>
uint word_at(P words, uint index) {
  return words[index];
}

inline float halved(thread float* values) {
  return values[0] * 0.5f;
}
"""

# x and out are device T*, few a small input, scale 0-d, counts an atomic of the second output's kind.
BODY = """
threadgroup float tile[32];
threadgroup T last;
uint i = thread_position_in_grid.x;
uint lane = thread_index_in_simdgroup;
float value = i < uint(x_shape[0]) ? float(x[i]) * scale : 0.0f;
tile[thread_index_in_threadgroup] = value;
threadgroup_barrier(metal::mem_flags::mem_threadgroup);
float sum = metal::simd_sum(tile[31 - lane]);
if (i < uint(x_shape[0])) {
  out[i] = T(sum + few[1]);
}
"""

# What kernels may use, all of it legal in Metal.
ALLOWED = """
threadgroup float tile[BITS * 8];
threadgroup atomic<uint> tally[4];
threadgroup bfloat rounded[2];
const device T* row = x + x_strides[0] * threadgroup_position_in_grid.y;
auto same = row;
uint3 place = thread_position_in_grid;
uint i = place.x + few[0] * x_ndim + x_shape[0];
float values[4] = {0.0f, 1.0f, 2.5e-3f, -INFINITY};
thread float* cursor = values + 1;
thread float& first = values[0];
for (int k = 0; k < BITS; k++) {
  float v = float(same[k]) * scale;
  first += metal::max(v, 0.0f) + metal::exp(-v) + metal::precise::exp(v) + metal::clamp(v, 0.0f, 1.0f);
  values[k & 3] = metal::fma(v, v, metal::select(1.0f, 2.0f, v > 1.0f)) + metal::rint(v);
}
float4 four = float4(first, 0.0f, 1.0f, values[2]);
four.xy = four.zw * metal::dot(four, four);
uint4 bits = as_type<uint4>(four);
uint code = uint(metal::rint(four.x)) >> 3 | metal::popcount(bits.x) << 4 | metal::min(i, 7u) | metal::clz(i);
if (thread_index_in_threadgroup < 4) {
  atomic_store_explicit(&tally[thread_index_in_threadgroup], 0u, metal::memory_order_relaxed);
}
tile[thread_index_in_threadgroup] = halved(cursor);
rounded[i & 1] = bfloat(first);
threadgroup_barrier(metal::mem_flags::mem_threadgroup | metal::mem_flags::mem_device);
atomic_fetch_or_explicit(&tally[i & 3], code, memory_order_relaxed);
threadgroup float* shared = tile + 1;
threadgroup_barrier(mem_flags::mem_none);
float sum = metal::simd_shuffle_xor(*shared, 1) + metal::simd_shuffle_and_fill_up(first, 0.0f, 1) +
            simd_prefix_exclusive_sum(float(rounded[0])) + simd_broadcast(metal::simd_max(sum_of(tile, 3)), 0);
simd_vote votes = metal::simd_ballot(sum > 0.0f);
uint mask = uint(static_cast<metal::simd_vote::vote_t>(votes));
half narrow = sum + metal::numeric_limits<float>::epsilon();
ulong wide = ulong(mask) << 32 | word_at(few, 2) | uint(narrow > half(3));
out[i] = T(FLAG ? sum : float(wide)) * T(float(narrow)) + same[1];
"""
ALLOWED_HEADER = (
    HEADER
    + """
constant constexpr uint TABLE[3] = {1, 2, 3};
template <typename P>
float sum_of(P values, uint count) {
  float sum = 0.0f;
  for (uint i = 0; i < count; i++) {
    sum += values[i] * float(TABLE[i]);
  }
  return sum;
}
inline float sum_of(float value) {
  thread float* only = &value;
  return sum_of(only, 1);
}
"""
)


def kernel(
    body, dtype=mx.float32, *, header=HEADER, template=None, inputs=None, outputs=None, atomic=False, threads=32
):
    """A specialisation of a body over x [40, 2], few [3] int32, scale [] float32 into out."""
    shapes = {"x": mx.zeros((40, 2), dtype), "few": mx.zeros(3, mx.int32), "scale": mx.array(1.0)}
    found = buffers(body, inputs or shapes, outputs or {"out": dtype}, atomic=atomic)
    template = (("T", dtype),) if template is None else template
    return Specialisation("planted", header, body, template, found, threads)


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_kernels_that_metal_accepts_pass(dtype):
    check(kernel(BODY, dtype))
    check(
        kernel(
            ALLOWED, dtype, header=ALLOWED_HEADER, template=(("T", dtype), ("BITS", 4), ("FLAG", True)), threads=1024
        )
    )


def test_atomic_outputs_pass_through_atomic_functions_alone():
    counts = {
        "inputs": {"x": mx.zeros((40,), mx.uint32)},
        "outputs": {"out": mx.uint32},
        "atomic": True,
        "template": (),
    }
    check(kernel("atomic_fetch_add_explicit(&out[x[0]], 1u, memory_order_relaxed);", **counts))
    with pytest.raises(StaticError, match=r"^planted\.metal:2: .*atomic"):
        check(kernel("\nuint count = out[x[0]];", **counts))
    with pytest.raises(StaticError, match=r"^planted\.metal:1: no viable overloaded"):
        check(kernel("out[x[0]] = 1u;", **counts))


# The text planted after line 4 of BODY, and words of the message.
MISTAKES = {
    "device pointer to plain pointer": ("float* p = x;", "float"),
    "device pointer to thread pointer": ("thread float* p = x;", "cannot initialize"),
    "device pointer to constant pointer": ("constant T* p = x;", "cannot initialize"),
    "device pointer to threadgroup pointer": ("threadgroup const T* p = x;", "cannot initialize"),
    "threadgroup pointer to device pointer": ("device float* p = tile;", "cannot initialize"),
    "small input to device pointer": ("const device int* p = few;", "constant int"),
    "cast to another space": ("thread T* p = (thread T*)x;", "cast to another address space"),
    "pointer without a space": ("float values[4]; float* p = values;", "no named address space"),
    "reference without a space": ("float two[2]; auto& r = two[0];", "no named address space"),
    "write to an input": ("x[0] = T(0);", "read-only"),
    "write to a small input": ("few[0] = 1;", "read-only"),
    "write to a 0-d input": ("scale = 1.0f;", "const"),
    "cast away const": ("device T* p = x;", "const"),
    "unknown name": ("uint n = length_of_row;", "undeclared"),
    "shape of a 0-d input": ("uint n = scale_shape[0];", "is of no input"),
    "strides of no input": ("uint n = y_strides[0];", "is of no input"),
    "unknown template parameter": ("uint n = BITS;", "undeclared"),
    "device pointer to a thread helper": ("float h = halved(x);", "no matching function"),
    "missing semicolon": ("float h = 1.0f", "expected ';'"),
    "a vector where a number goes": ("uint n = thread_position_in_threadgroup;", "uint3"),
    "std": ("float h = std::exp(1.0f);", "std::"),
    "double": ("double h = 1;", "no double"),
    "unsuffixed literal": ("float h = 0.5 * 2;", "without its f"),
    "unsuffixed exponent": ("float h = 1e-6;", "without its f"),
    "long double": ("long double h = 1;", "no double"),
    "long long": ("long long h = 1;", "no long long"),
    "throw": ("throw 1;", "no exceptions"),
    "new": ("thread float* p = new float[3];", "no new and delete"),
    "goto": ("again: goto again;", "no goto"),
    "lambda": ("auto f = [](float a) { return a; };", "no lambdas"),
    "static local": ("static int count = 0;", "no static locals"),
    "static threadgroup variable": ("static threadgroup float more[3];", "no static locals"),
    "thread_local": ("thread_local int count;", "no thread_local"),
    "virtual": ("struct Shape { virtual void draw() {} };", "no virtual functions"),
    "run-time types": ("bool b = typeid(float) == typeid(int);", "no run-time types"),
    "function pointer": ("float (*f)(thread float*) = halved;", "no function pointers"),
    "array of a size known at run time": ("float values[few[0]];", "variable length"),
    "if constexpr": ("if constexpr (sizeof(T) == 4) { out[0] = T(1); }", "C\\+\\+17"),
    "assembly": ('asm("nop");', "no inline assembly"),
    "include": ("#include <metal_stdlib>", "nothing to include"),
    "not ASCII": ("// one \u00b5s", "not ASCII"),
    "a keyword as a name": ("uint half = 3;", "cannot combine"),
    "max of two types": ("uint n = metal::max(thread_index_in_threadgroup, 3);", "no matching function"),
    "max of half and float": ("float n = metal::max(half(1), 2.0f);", "no matching function"),
    "math of an integer": ("float n = metal::exp(3);", "no matching function"),
    "a function Metal lacks": ("float n = metal::expm1(3.0f);", "expm1"),
    "64 bits across lanes": ("ulong n = metal::simd_sum(ulong(1));", "no matching function"),
    "an atomic Metal lacks": ("threadgroup atomic<uchar> n[3];", "atomics of"),
    "float atomic in threadgroup memory": (
        "threadgroup atomic<float> n[3]; atomic_fetch_add_explicit(&n[0], 1.0f, memory_order_relaxed);",
        "no matching function",
    ),
    "a barrier of no memory": ("threadgroup_barrier(memory_order_relaxed);", "no matching function"),
    "too much threadgroup memory": ("threadgroup float more[8192];", "bytes of threadgroup memory"),
    "initialised threadgroup variable": ("threadgroup float more = 1.0f;", "cannot be initialised"),
    "uninitialised value": ("float nothing; out[0] = T(nothing);", "uninitialized"),
    "past the end": ("float two[2]; float third = two[2];", "past the end"),
    "shift by the width": ("uint n = 1u << 32;", "shift count"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_planted_mistake_is_found_at_its_line(mistake):
    text, message = MISTAKES[mistake]
    lines = BODY.splitlines()
    body = "\n".join([*lines[:4], text, *lines[4:]])
    with pytest.raises(StaticError, match=rf"^planted\.metal:5: .*{message}"):
        check(kernel(body))


@pytest.mark.parametrize(
    "text",
    ["bfloat b = value;", "bfloat b = bfloat(0); b = 1.0f;", "out[i] = value;", "bfloat b = rounded_by_itself(value);"],
)
def test_a_float_becomes_bfloat_only_by_name(text):
    header = HEADER + "template <typename P> bfloat rounded_by_itself(P value) { return value; }"
    with pytest.raises(StaticError, match=r"\.metal:(9|10): .*bfloat"):
        check(kernel(BODY.replace("float sum = ", f"{text}\nfloat sum = "), mx.bfloat16, header=header))


RECURSION = {
    "itself": "inline int f(int n) { return n > 0 ? f(n - 1) : 0; }",
    "mutual": "inline int g(int n);\ninline int f(int n) { return g(n); }\ninline int g(int n) { return f(n); }",
    "template": "template <typename T> int f(T n) { return n > 0 ? f(n - 1) : 0; }",
    "by way of a method": "struct S { int m(int n) { return n > 0 ? m(n - 1) : 0; } };",
}


@pytest.mark.parametrize("header", RECURSION.values(), ids=RECURSION)
def test_recursion_is_found_in_helpers(header):
    with pytest.raises(StaticError, match=r"^common\.metal:[12]: .* calls itself"):
        check(kernel(BODY, header=HEADER.strip("\n").replace("\n", " ") + header))


HELPERS = {
    "a name of MLX's header": (
        "template <typename T, typename U> T ceildiv(T n, U m) { return n / m; }",
        "redefinition",
    ),
    "a variable outside functions": ("float table[3];", "must be constant"),
    "a parameter without a space": ("inline float f(float* p) { return p[0]; }", "no named address space"),
    "threadgroup memory in a helper": ("inline void f() { threadgroup float tile[3]; }", "address space"),
    "static threadgroup memory in a helper": ("inline void f() { static threadgroup float tile[3]; }", "in the kernel"),
    "a static local": ("inline int f() { static int calls = 0; return ++calls; }", "no static locals"),
    "a lambda": ("inline int f() { auto g = [](int n) { return n; }; return g(1); }", "no lambdas"),
    "a double": ("inline float f() { return 0.5; }", "without its f"),
    "nothing returned": ("inline float f() { }", "return"),
}


@pytest.mark.parametrize("mistake", HELPERS)
def test_a_mistake_in_a_helper_is_found_at_its_line(mistake):
    text, message = HELPERS[mistake]
    with pytest.raises(StaticError, match=rf"^common\.metal:2: .*{message}"):
        check(kernel(BODY, header=f"\n{text}\n{HEADER}"))


def test_an_error_in_an_instance_names_the_line_of_the_body():
    body = BODY + "const device float* p = x;"  # right for float32 alone
    check(kernel(body))
    with pytest.raises(StaticError, match=r"^planted\.metal:13: "):
        check(kernel(body, mx.float16))


@pytest.mark.parametrize(
    ("name", "body"),
    [
        ("few", "out[0] = T(x[0] * scale);  // few is for later"),
        ("out", "T value = T(x[0] * scale + few[0]);"),
        ("T", "out[0] = x[0] * scale + few[0];"),
    ],
)
def test_what_the_call_gives_must_be_named_in_the_body(name, body):
    with pytest.raises(StaticError, match=f"^planted.metal:1: the call gives '{name}'"):
        check(kernel(body))


def test_thirty_buffers_pass_and_thirty_one_do_not():
    for count in (29, 30):
        inputs = {f"in{k}_": mx.zeros(40) for k in range(count)}
        body = "out[0] = " + " + ".join(f"{name}[0]" for name in inputs) + ";"
        found = kernel(body, inputs=inputs, template=())
        if count == 29:
            check(found)
        else:
            with pytest.raises(StaticError, match="31 buffers"):
                check(found)


def test_more_than_1024_threads_are_refused_even_for_a_kernel_seen_before():
    check(kernel(BODY, threads=1024))
    with pytest.raises(StaticError, match="1025 threads"):
        check(kernel(BODY, threads=1025))
