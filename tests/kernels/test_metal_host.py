"""The host runner finds mistakes in kernels: each is planted here, and each must be reported at its line."""

import sys

import mlx.core as mx
import pytest
from metal_host import HostError, metal_kernel, runner

THREADS = 64


pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the host runner needs Linux")


@pytest.fixture(autouse=True)
def _only_the_runner(monkeypatch):
    # Static checks would refuse some of these bodies before they run.
    monkeypatch.setattr(runner.static_checks, "check", lambda specialisation: None)


def run(body, *, grid=THREADS, threadgroup=THREADS, size=THREADS, dtype=mx.int32, atomic=False, init=None, x=None):
    """Outputs of `body` with an input x of 64 integers and an output `out` of `size`."""
    x = mx.arange(THREADS, dtype=mx.int32) if x is None else x
    kernel = metal_kernel("body", ["x"], ["out"], body, header=HEADER, atomic_outputs=atomic)
    shape = (grid, 1, 1), (threadgroup, 1, 1)
    return kernel(
        inputs=[x],
        grid=shape[0],
        threadgroup=shape[1],
        output_shapes=[(size,)],
        output_dtypes=[dtype],
        init_value=init,
    )[0]


HEADER = """
template <typename P>
int second(P values, uint i) {
  return values[i + 1];
}
int forever(int n) {
  volatile int frame[100];
  frame[n % 100] = n;
  return forever(n + 1) + frame[(n + 1) % 100];
}
"""

PREAMBLE = "uint i = thread_position_in_grid.x, t = thread_index_in_threadgroup;\n"

# name: (what the message says, 1-based line after the preamble or None, body after the preamble)
MISTAKES = {
    "read past the end": ("read out of bounds: x[64] of 64 elements", 1, "out[i] = x[i + 1];"),
    "read before the start": ("read out of bounds: x[-1]", 1, "out[i] = x[int(i) - 1];"),
    "read far away": ("read out of bounds", 1, "out[i] = x[i - 1];"),
    "write past the end": ("write out of bounds: out[64]", 2, "\nout[i + 1] = x[i];"),
    "write far before the start": ("write out of bounds: out[-100000]", 1, "out[int(i) - 100000] = x[i];"),
    "write to an input": ("write to x", 1, "((device int*)x)[i] = 1;\nout[i] = 1;"),
    "shape of a dimension that is not there": ("x_shape[1] of 1", 1, "out[i] = x_shape[1];"),
    "read of an output nobody wrote": ("out[0] that nobody has written", 1, "out[i] += x[i];"),
    "outputs that nobody writes": ("no thread writes out[0]", None, "if (i != 0) out[i] = x[i];"),
    "threadgroup memory nobody wrote": (
        "read of threadgroup tile[0] that nobody has written",
        2,
        "threadgroup int tile[64];\nout[i] = tile[t];",
    ),
    "threadgroup index too big": ("bounds", 2, "threadgroup int tile[63];\ntile[t] = x[i];\nout[i] = 1;"),
    "row of a tile too big": ("bounds", 2, "threadgroup int tile[2][40];\ntile[0][t] = x[i];\nout[i] = 1;"),
    "threadgroup pointer too far": (
        "write out of bounds: threadgroup tile[63]",
        3,
        "threadgroup int tile[63];\nthreadgroup int* p = tile;\np[t] = x[i];\nout[i] = 1;",
    ),
    "too much threadgroup memory": ("36864 bytes of threadgroup", 1, "threadgroup int a[9216];\nout[i] = a[t];"),
    "missing barrier": (
        "race: thread 1 of threadgroup 0 reads threadgroup tile[0] that thread 0",
        3,
        "threadgroup int tile[64];\ntile[t] = x[i];\nout[i] = t == 0 ? 0 : tile[t - 1];",
    ),
    "barrier for the wrong memory": (
        "race",
        4,
        "threadgroup int tile[64];\ntile[t] = x[i];\nthreadgroup_barrier(mem_flags::mem_device);\nout[i] = tile[63 - t];",
    ),
    "simdgroup barrier between SIMD-groups": (
        "race",
        4,
        "threadgroup int tile[64];\ntile[t] = x[i];\n"
        "simdgroup_barrier(mem_flags::mem_threadgroup);\nout[i] = tile[63 - t];",
    ),
    "write before others have read": (
        "race: thread 0 of threadgroup 0 writes threadgroup tile[0] that thread 63",
        6,
        "threadgroup int tile[64];\ntile[t] = x[i];\nthreadgroup_barrier(mem_flags::mem_threadgroup);\n"
        "int sum = tile[0] + tile[63];\nsimd_sum(sum);\ntile[t] = sum;\nout[i] = sum;",
    ),
    "the last of two readers writes": (
        "race: thread 1 of threadgroup 0 writes threadgroup cell[0] that other threads read",
        6,
        "threadgroup int cell;\nif (t == 0) cell = x[0];\nthreadgroup_barrier(mem_flags::mem_threadgroup);\n"
        "if (t < 2) out[i] = cell;\nelse out[i] = 0;\nif (t == 1) cell = 5;",
    ),
    "the last reader writes what another SIMD-group reads": (
        "race: thread 32 of threadgroup 0 writes threadgroup cell[0] that other threads read",
        7,
        "threadgroup int cell;\nif (t == 0) cell = x[0];\nthreadgroup_barrier(mem_flags::mem_threadgroup);\n"
        "if (t % 32 == 0) out[i] = cell;\nelse out[i] = 0;\n"
        "simdgroup_barrier(mem_flags::mem_threadgroup);\nif (t == 32) cell = 5;",
    ),
    "the largest of an array that is filled in part": (
        "depends on elements of a thread's array that nobody wrote",
        None,
        "int own[4];\nfor (int j = 0; j < x[1]; j++) own[j] = -1;\n"
        "int most = own[0];\nfor (int j = 1; j < 4; j++) most = metal::max(most, own[j]);\nout[i] = most;",
    ),
    "two writers of one cell": ("race", 2, "threadgroup int cell;\ncell = x[i];\nout[i] = 1;"),
    "two writers of one output": ("writes out[0]", 1, "out[i / 2] = x[i];\nout[32 + i / 2] = 1;"),
    "device memory without a barrier": (
        "race: thread 1 of threadgroup 0 reads out[0]",
        2,
        "out[i] = x[i];\nif (i > 0) out[i] += out[i - 1];",
    ),
    "barrier in a branch": (
        "divergent threadgroup_barrier",
        1,
        "if (t < 32) threadgroup_barrier(mem_flags::mem_none);\nout[i] = 1;",
    ),
    "two barriers for one": (
        "divergent threadgroup_barrier",
        1,
        "if (t < 32) threadgroup_barrier(mem_flags::mem_none);\n"
        "else threadgroup_barrier(mem_flags::mem_none);\nout[i] = 1;",
    ),
    "return before a barrier": (
        "thread 60 has returned",
        3,
        "out[i] = 1;\nif (t >= 60) return;\nthreadgroup_barrier(mem_flags::mem_none);",
    ),
    "return before a SIMD barrier": (
        "divergent simdgroup_barrier",
        3,
        "out[i] = 1;\nif (t % 32 == 9) return;\nsimdgroup_barrier(mem_flags::mem_none);",
    ),
    "SIMD operation in a branch": (
        "divergent simd_sum",
        2,
        "int sum = 0;\nif (t < 20) sum = simd_sum(x[i]);\nelse sum = simd_max(x[i]);\nout[i] = sum;",
    ),
    "SIMD operation against a barrier": (
        "divergent simd_sum",
        1,
        "if (t < 20) out[i] = simd_sum(x[i]);\nelse out[i] = 1;\nthreadgroup_barrier(mem_flags::mem_none);",
    ),
    "shuffle from a lane that returned": (
        "simd_shuffle_down from a lane that is not active",
        3,
        "out[i] = 1;\nif (t % 32 >= 30) return;\nout[i] = simd_shuffle_down(x[i], 2);",
    ),
    "shuffle from lane 32": ("simd_shuffle from a lane", 1, "out[i] = simd_shuffle(x[i], t % 32 + 1);"),
    "broadcast of many lanes": ("simd_broadcast of different lanes", 1, "out[i] = simd_broadcast(x[i], t % 32);"),
    "shift by 32": ("shift", 1, "out[i] = x[i] << (32 + (i & 1));"),
    "signed overflow": ("addition overflows", 1, "out[i] = 2147483647 + x[i];"),
    "signed overflow in a vector": ("multiplication overflows", 2, "int2 v = int2(x[i]);\nout[i] = (v * 99999999).y;"),
    "division by zero": ("division by zero", 1, "out[i] = 5 / x[i];"),
    "float too big for its integer": ("cast", 1, "out[i] = uchar(float(x[i]) * 1000.0f);"),
    "index past a thread's array": ("bounds", 2, "int mine[4] = {1, 2, 3, 4};\nout[i] = mine[i % 5];"),
    "local without a value": ("uninitialized", 2, "int sum;\nout[i] = sum + x[i];"),
    "endless recursion": ("signal 11", None, "out[i] = forever(x[i]);"),
    "maximum of an atomic float": (
        "no overload",
        None,
        "threadgroup atomic<float> a;\natomic_fetch_max_explicit(&a, 1.0f, memory_order_relaxed);\nout[i] = 1;",
    ),
    "atomic of 64 bits": ("32 bits wide", None, "threadgroup atomic<ulong> a;\nout[i] = sizeof(a);"),
    "unknown name": ("'y'", 1, "out[i] = y[i];"),
    "missing semicolon": ("expected", 1, "out[i] = x[i]\n"),
    "word that is no variable": ("cannot translate", 1, "threadgroup int a = 5;\nout[i] = a;"),
    "text that is not ASCII": ("ASCII", 2, "out[i] = x[i];\n// \N{EM DASH}"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_planted_mistake_is_reported_at_its_line(name):
    text, line, body = MISTAKES[name]
    with pytest.raises(HostError) as caught:
        run(PREAMBLE + body)
    assert text in str(caught.value)
    if line is not None:
        assert str(caught.value).startswith(f"body.metal:{line + 1}: ")


def test_a_helper_s_mistake_names_the_body_s_line_too():
    with pytest.raises(HostError, match=r"^common.metal:4 \(from body.metal:2\): "):
        run(f"{PREAMBLE}out[i] = second(x, i);")


def test_threadgroups_that_touch_one_element_race_across_the_grid():
    with pytest.raises(HostError, match=r"body.metal:1: race: thread 0 of threadgroup 1 writes out\[0\]"):
        run("out[thread_index_in_threadgroup] = x[thread_position_in_grid.x];", threadgroup=32, size=32)
    body = "uint i = thread_position_in_grid.x;\nout[i] = x[i] + (i >= 32 ? out[i - 32] : 0);"
    with pytest.raises(HostError, match=r"body.metal:2: race: .* reads out\[0\]"):
        run(body, threadgroup=32)


def test_reads_of_two_threadgroups_race_with_a_write_of_one():
    body = "int before = out[0];\nif (i == 32) out[0] = before + 1;\nif (i != 0) out[i] = before;"
    with pytest.raises(HostError, match=r"body.metal:3: race: thread 0 of threadgroup 1 writes out\[0\] that"):
        run(PREAMBLE + body, threadgroup=32, init=1)


def test_the_same_value_from_many_threads_is_no_race():
    body = PREAMBLE + "threadgroup int cell;\ncell = 7;\nthreadgroup_barrier(mem_flags::mem_threadgroup);\n"
    assert run(body + "out[i % 4] = cell;", size=4).tolist() == [7] * 4


def test_a_simdgroup_barrier_orders_the_lanes_of_its_simd_group():
    body = "threadgroup int tile[64];\ntile[t] = x[i];\nsimdgroup_barrier(mem_flags::mem_threadgroup);\n"
    assert run(PREAMBLE + body + "out[i] = tile[t ^ 31];").tolist() == [i ^ 31 for i in range(64)]


def test_barriers_order_what_threads_write_in_turns():
    step = "threadgroup_barrier(mem_flags::mem_threadgroup);\n"
    body = f"threadgroup int tile[64];\ntile[t] = x[i];\n{step}int v = tile[63 - t];\n{step}tile[t] = v * 2;\n{step}"
    assert run(PREAMBLE + body + "out[i] = tile[63 - t];").tolist() == [2 * i for i in range(64)]


def test_a_barrier_for_device_memory_orders_outputs():
    body = "out[i] = x[i];\nthreadgroup_barrier(mem_flags::mem_device);\nint other = out[63 - i];\n"
    body += "threadgroup_barrier(mem_flags::mem_device | mem_flags::mem_threadgroup);\nout[i] = other;"
    assert run(PREAMBLE + body).tolist() == list(range(63, -1, -1))


def test_each_threadgroup_has_threadgroup_memory_of_its_own():
    body = "threadgroup int cell;\nif (i == 0) cell = 5;\nif (t == 0) out[threadgroup_position_in_grid.x] = cell;"
    with pytest.raises(HostError, match=r"body.metal:4: read of threadgroup cell\[0\] that nobody has written"):
        run(PREAMBLE + body, threadgroup=32, size=2)


def test_results_that_depend_on_the_order_of_threads_are_found():
    body = """
    uint i = thread_position_in_grid.x;
    uint slot = atomic_fetch_add_explicit(&out[0], 1u, memory_order_relaxed);
    atomic_store_explicit(&out[slot + 1], uint(x[i]), memory_order_relaxed);
    """
    with pytest.raises(HostError, match=r"body.metal:4: the order of threads changes out\[1\]"):
        run(body, size=65, dtype=mx.uint32, atomic=True, init=0)


def test_atomic_and_plain_accesses_of_one_element_race():
    body = "threadgroup atomic<int> sum;\nif (t == 0) atomic_store_explicit(&sum, 0, memory_order_relaxed);\n"
    body += "threadgroup_barrier(mem_flags::mem_threadgroup);\n"
    body += "atomic_fetch_add_explicit(&sum, x[i], memory_order_relaxed);\n"
    with pytest.raises(HostError, match=r"body.metal:5: race: thread 1 .* changes threadgroup sum\[0\] that thread 0 "):
        run(PREAMBLE + body + "out[i] = ((threadgroup int*)&sum)[0];")


def test_a_plain_read_among_atomic_ones_still_races():
    body = "threadgroup atomic<int> sum;\nif (t == 0) atomic_store_explicit(&sum, 0, memory_order_relaxed);\n"
    body += "threadgroup_barrier(mem_flags::mem_threadgroup);\nif (t == 0) out[i] = ((threadgroup int*)&sum)[0];\n"
    body += "else out[i] = atomic_load_explicit(&sum, memory_order_relaxed);\n"
    with pytest.raises(HostError, match=r"body.metal:7: race: thread 63 .* atomically changes threadgroup sum\[0\]"):
        run(PREAMBLE + body + "if (t == 63) atomic_store_explicit(&sum, 0, memory_order_relaxed);")


def test_an_endless_loop_is_stopped_at_its_line(monkeypatch):
    monkeypatch.setattr(runner, "TIMEOUT", 1)
    with pytest.raises(HostError, match=r"body.metal:3: still running"):
        run(PREAMBLE + "int n = x[i];\nwhile (x[0] == 0) n = n * 5 % 1234577;\nout[i] = n;")


def test_a_call_that_metal_refuses_is_refused():
    body = "out[thread_position_in_grid.x] = x[0];"
    with pytest.raises(HostError, match="at least 1"):
        run(body, grid=0, size=0)
    with pytest.raises(HostError, match="1025 threads"):
        run(body, grid=2000, threadgroup=1025)
    kernel = metal_kernel("body", ["x", "y"], ["out"], "out[0] = x[0];")
    with pytest.raises(ValueError, match="`inputs` to have size 2 but got size 1"):
        kernel(inputs=[1], grid=(1, 1, 1), threadgroup=(1, 1, 1), output_shapes=[(1,)], output_dtypes=[mx.float32])
    with pytest.raises(ValueError, match="at least one output"):
        metal_kernel("body", ["x"], [], "")
