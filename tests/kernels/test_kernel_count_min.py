"""Count-Min and Count-Sketch: the reference against whole-number arithmetic, then each body against the reference."""

import mlx.core as mx
import numpy as np
import pytest
from kernel_checks import assert_same
from metal_host import HostError, installed

from mlxkv.kernels import count_min
from mlxkv.kernels.count_min import PRIME, hash_functions

SIZES = [1, 31, 32, 33, 300]
# With these keys a * key + b meets 0, p and the largest products of 31 and 32 bits.
EDGE_HASHES = mx.array(
    [[1, 0, PRIME - 1, 1], [1, PRIME - 1, 1, PRIME - 1], [PRIME - 1, PRIME - 1, 1, 0], [PRIME - 2, 5, 3, 0]], mx.uint32
)
EDGE_KEYS = mx.array([0, 1, 2, 2**16, 2**30, PRIME - 2, PRIME - 1, 2**31, 2**32 - 1], dtype=mx.uint32)


def drawn(N, tokens, seed=0):
    """Keys `[N, T]`, some of them equal, and amounts `[N, T]`: multiples of 1/64, exact in any order of additions."""
    random = np.random.default_rng(seed)
    keys = random.integers(0, max(1, tokens), (N, tokens))
    return mx.array(keys, dtype=mx.int32), mx.array(random.integers(0, 64, (N, tokens)) / 64, dtype=mx.float32)


def cells(key, hashes, width, signed):
    """(column, sign) of a key in each row, in Python's integers."""
    return [
        ((a * key + b) % PRIME % width, 1 - 2 * ((c * key + d) % PRIME % 2) if signed else 1)
        for a, b, c, d in hashes.tolist()
    ]


def model_update(counters, keys, amounts, hashes, signed):
    out, (N, _, width) = np.array(counters), counters.shape
    for n in range(N):
        for key, amount in zip(np.array(keys)[n].tolist(), np.array(amounts)[n].tolist()):
            for row, (column, sign) in enumerate(cells(key, hashes, width, signed)):
                out[n, row, column] += sign * amount
    return mx.array(out)


def model_query(counters, keys, hashes, signed):
    rows, pick = np.arange(len(hashes)), np.median if signed else np.min
    out = np.zeros((len(counters), keys.shape[1]), np.float32)
    for n, token in np.ndindex(out.shape):
        columns, signs = zip(*cells(keys[n, token].item(), hashes, counters.shape[2], signed))
        out[n, token] = pick(np.array(counters)[n, rows, columns] * signs)
    return mx.array(out)


def check_all(N, tokens, depth, width, signed):
    hashes, (keys, amounts) = hash_functions(depth, seed=tokens), drawn(N, tokens)
    counters = mx.arange(N * depth * width, dtype=mx.float32).reshape(N, depth, width) / 8
    for asked in (keys, keys[0]):
        found = count_min.metal_update(counters, asked, amounts, hashes, signed)
        assert mx.array_equal(found, count_min.reference_update(counters, asked, amounts, hashes, signed))
        estimates = count_min.metal_query(found, asked, hashes, signed)
        assert_same(estimates, count_min.reference_query(found, asked, hashes, signed))


def check_edges(signed):
    """Counters that hold their own column make `query` show the hash itself, row by row."""
    counters = mx.broadcast_to(mx.arange(1000, dtype=mx.float32), (1, 1, 1000))
    for row in range(len(EDGE_HASHES)):
        hashes = EDGE_HASHES[row : row + 1]
        expected = model_query(counters, EDGE_KEYS[None], hashes, signed)
        assert mx.array_equal(count_min.query(counters, EDGE_KEYS, hashes, signed), expected)
        one = mx.ones((1, EDGE_KEYS.size))
        added = count_min.update(mx.zeros(counters.shape), EDGE_KEYS, one, hashes, signed)
        assert mx.array_equal(added, model_update(mx.zeros(counters.shape), EDGE_KEYS[None], one, hashes, signed))


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize(
    ("N", "tokens", "depth", "width"), [(1, 1, 1, 1), (2, 33, 4, 37), (3, 31, 5, 100), (1, 64, 2, 8)]
)
def test_the_reference_is_the_sketch_in_whole_numbers(N, tokens, depth, width, signed):
    hashes, (keys, amounts) = hash_functions(depth, seed=7), drawn(N, tokens)
    counters = count_min.reference_update(mx.ones((N, depth, width)), keys, amounts, hashes, signed)
    assert mx.array_equal(counters, model_update(mx.ones((N, depth, width)), keys, amounts, hashes, signed))
    estimates = count_min.reference_query(counters, keys, hashes, signed)
    assert mx.array_equal(estimates, model_query(counters, keys, hashes, signed))


@pytest.mark.parametrize("signed", [False, True])
def test_the_reference_hashes_the_largest_keys_exactly(signed):
    check_edges(signed)


@pytest.mark.parametrize("signed", [False, True])
def test_the_bodies_hash_the_largest_keys_exactly(kernel_path, signed):
    check_edges(signed)


def test_hash_functions_are_the_seeds_own_and_in_range():
    drawn = np.array(hash_functions(1000, seed=3)).astype(np.int64)
    assert drawn[:, ::2].min() > 0
    assert drawn.min() >= 0
    assert drawn.max() < PRIME
    assert mx.array_equal(hash_functions(4, seed=3), hash_functions(4, seed=3))
    assert not mx.array_equal(hash_functions(4, seed=3), hash_functions(4, seed=4))


def test_an_estimate_is_never_too_low(kernel_path):
    hashes, (keys, amounts) = hash_functions(3, seed=1), drawn(2, 300)
    counters = count_min.update(mx.zeros((2, 3, 40)), keys, amounts, hashes)
    for n in range(2):
        exact = np.bincount(np.array(keys[n]), weights=np.array(amounts[n]), minlength=300)
        estimates = np.array(count_min.query(counters, mx.arange(300), hashes)[n])
        assert (estimates >= exact).all()
        assert (estimates > exact).any()  # or the sketch was too wide for this test to say anything


def test_every_row_holds_all_that_was_added(kernel_path):
    keys, amounts = drawn(3, 300)
    counters = count_min.update(mx.zeros((3, 4, 37)), keys, amounts, hash_functions(4))
    assert mx.array_equal(counters.sum(axis=-1), mx.broadcast_to(amounts.sum(axis=-1, keepdims=True), (3, 4)))


@pytest.mark.parametrize("signed", [False, True])
def test_keys_that_meet_no_other_are_exact(kernel_path, signed):
    hashes = mx.array(
        [[2, 0, 7, 0], [2, 1, 9, 3], [2, 40, 1, 1]], dtype=mx.uint32
    )  # distinct columns for positions below width / 2
    _, amounts = drawn(2, 33)
    counters = count_min.update(mx.zeros((2, 3, 107)), mx.arange(33), amounts, hashes, signed)
    assert mx.array_equal(count_min.query(counters, mx.arange(33), hashes, signed), amounts)


def test_count_sketch_is_right_on_average_where_count_min_is_too_high():
    keys, amounts, errors = mx.arange(200), mx.ones((1, 200)), {}
    for signed in (False, True):
        estimates = []
        for seed in range(400):
            hashes = hash_functions(1, seed)
            counters = count_min.reference_update(mx.zeros((1, 1, 50)), keys, amounts, hashes, signed)
            estimates.append(count_min.reference_query(counters, keys, hashes, signed))
        errors[signed] = float(mx.stack(estimates).mean()) - 1
    assert errors[False] > 3
    assert abs(errors[True]) < 0.2


def test_updates_one_after_another_are_one_update(kernel_path):
    hashes, (keys, amounts) = hash_functions(4), drawn(2, 65)
    whole = count_min.update(mx.zeros((2, 4, 37)), keys, amounts, hashes)
    part = count_min.update(mx.zeros((2, 4, 37)), keys[:, :9], amounts[:, :9], hashes)
    assert mx.array_equal(count_min.update(part, keys[:, 9:], amounts[:, 9:], hashes), whole)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("tokens", SIZES)
def test_the_bodies_are_the_reference(kernel_path, tokens, signed):
    check_all(3, tokens, 4, 37, signed)


@pytest.mark.parametrize("signed", [False, True])
def test_the_bodies_take_one_counter_and_a_middle_row(kernel_path, signed):
    check_all(1, 5, 1, 1, signed)
    check_all(2, 33, 5, 512, signed)


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_amounts_of_any_float_type_collect_in_float32(kernel_path, dtype):
    keys, amounts = drawn(3, 33)
    counters, hashes = mx.zeros((3, 4, 37)), hash_functions(4)
    found = count_min.metal_update(counters, keys, amounts.astype(dtype), hashes)
    assert mx.array_equal(found, count_min.reference_update(counters, keys, amounts, hashes))


def test_attention_mass_collects_within_rounding(kernel_path):
    random, hashes = np.random.default_rng(0), hash_functions(4)
    mass = mx.array(random.dirichlet(np.full(300, 0.1), 2), dtype=mx.float32)
    found = count_min.metal_update(mx.zeros((2, 4, 37)), mx.arange(300), mass, hashes)
    assert_same(found, count_min.reference_update(mx.zeros((2, 4, 37)), mx.arange(300), mass, hashes))


@pytest.mark.parametrize("shape", [(0,), (2, 0)])
def test_no_tokens_change_nothing(kernel_path, shape):
    counters, hashes, keys = mx.ones((2, 4, 37)), hash_functions(4), mx.zeros(shape, mx.int32)
    for path in (count_min.reference_update, count_min.metal_update):
        assert_same(path(counters, keys, mx.zeros((2, 0)), hashes), counters)
    for path in (count_min.reference_query, count_min.metal_query):
        assert path(counters, keys, hashes).shape == (2, 0)


UPDATE, QUERY, COMMON = "count_min_update", "count_min_query", "common"
FOLD = "residue = (residue & prime) + (residue >> 31);\n"
FAULTS = {
    "added: the first sketch's keys": (UPDATE, "(keys_shape[0] == 1 ? 0 : sketch * tokens)", "0"),
    "added: the first sketch's amounts": (UPDATE, "amounts[sketch * tokens + t]", "amounts[t]"),
    "added: another row's hash": (UPDATE, "mersenne_hash(hashes[4 * row],", "mersenne_hash(hashes[2 * row],"),
    "hashed: folded once": (COMMON, f"{FOLD}  {FOLD}", FOLD),
    "hashed: p is not 0": (COMMON, "residue >= prime", "residue > prime"),
    "hashed: 32-bit product": (COMMON, "ulong(a) * key", "a * key"),
    "added: the column's own parity": (
        UPDATE,
        "hashes[4 * row + 2], hashes[4 * row + 3]",
        "hashes[4 * row], hashes[4 * row + 1]",
    ),
    "added: no sign": (UPDATE, "minus ? -amount : amount", "amount"),
    "added: one column too many": (UPDATE, "% width", "% (width + 1)"),
    "added: rows overlap": (UPDATE, "sketch * depth + row", "sketch + row"),
    "added: stored, not added": (UPDATE, "atomic_fetch_add_explicit", "atomic_store_explicit"),
    "read: the first sketch's keys": (QUERY, "(keys_shape[0] == 1 ? 0 : sketch * tokens)", "0"),
    "read: another table": (QUERY, "sketch * DEPTH + row", "row"),
    "read: a row is left out": (
        QUERY,
        "rows[row] = minus ? -value : value",
        "rows[row] = row == 0 ? INFINITY : minus ? -value : value",
    ),
    "read: sorted but for the smallest": (QUERY, "at > 0", "at > 1"),
    "read: upper median": (QUERY, "(DEPTH - 1) / 2", "DEPTH / 2"),
    "read: the largest row": (QUERY, ": rows[0]", ": rows[DEPTH - 1]"),
    "read: no sign": (QUERY, "minus ? -value : value", "value"),
}


def check_faulty():
    for signed in (False, True):
        check_edges(signed)
        check_all(3, 33, 4, 37, signed)


@pytest.mark.faults
@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_caught(fault):
    with installed(FAULTS[fault]), pytest.raises((AssertionError, HostError)):
        check_faulty()
