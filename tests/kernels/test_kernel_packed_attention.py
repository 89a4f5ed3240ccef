"""Packed attention: the reference is MLX's attention over all rows, and one launch, or two, give the same."""

from contextlib import contextmanager
from typing import NamedTuple
from unittest.mock import patch

import mlx.core as mx
import numpy as np
import pytest
from kernel_checks import assert_same
from metal_host import HostError, installed

from mlxkv.errors import InputError, MismatchError
from mlxkv.kernels import _packed_launch
from mlxkv.kernels import packed_attention as attention
from mlxkv.kernels.bits import QuantizedArray, pack, unpack

INT8 = (8, 64, 1), (8, 1, "DV")
INT4 = (4, 60, 1, True), (4, 2, "DV", True)
KIVI = (2, 32, 1), (2, 1, 16, True)
BOTH = [attention.reference_packed_attention, attention.metal_packed_attention]


class Case(NamedTuple):
    """Shapes and kinds of one call."""

    heads: tuple = (2, 3)  # kv heads, query heads of each
    dims: tuple = (64, 64)
    rows: tuple = (4, 120, 16)  # sinks, packed, tail
    kinds: tuple = INT4
    dtype: mx.Dtype = mx.float16
    raw: mx.Dtype = mx.float16
    batch: int = 1
    lengths: tuple | None = None
    bias_heads: int = 0
    logits: bool = False


CASES = {
    "int8": Case(kinds=INT8, rows=(0, 64, 16), lengths=(10,)),
    "int4": Case((1, 3), rows=(4, 120, 16), lengths=(13,), dtype=mx.bfloat16, raw=mx.bfloat16),
    "kivi": Case(kinds=KIVI, rows=(4, 32, 21), batch=2, lengths=(19, 0), bias_heads=6, logits=True),
    "an odd part": Case(dims=(96, 80), kinds=((4, 5, 1, True), (3, 1, 32, True)), rows=(3, 35, 5), raw=mx.float32),
    "wide": Case((1, 4), (256, 256), (4, 60, 7), ((4, 60, 1, True), (4, 1, 128, True)), lengths=(5,), logits=True),
    "many heads": Case((1, 9), (64, 64), (0, 37, 3), ((3, 4, 5), (8, 1, 3)), mx.float32, mx.float32, bias_heads=1),
    "awkward": Case((2, 1), (33, 31), (1, 18, 1), ((4, 6, 1, True), (8, 3, 7)), mx.float32, batch=2),
    "no packed": Case(rows=(0, 0, 21), lengths=(20,)),
    "packed alone": Case((2, 1), (128, 128), (0, 34, 0), ((8, 17, 1), (4, 1, 128, True)), bias_heads=2),
}
TWICE = {"int4", "an odd part"}  # also in two passes


def normal(shape, dtype=mx.float32, seed=0):
    return mx.array(np.random.default_rng(seed).standard_normal(shape).astype(np.float32)).astype(dtype)


def packed_rows(x, bits, tokens, dims, rotated=False):
    return pack(x, bits, tokens, x.shape[-1] if dims == "DV" else dims, rotated)


def call_of(case):
    """The arguments of a call; rows of the tail that do not count hold large values."""
    (Hkv, G), (D, Dv), B = case.heads, case.dims, case.batch
    pairs = [
        [normal((B, Hkv, rows, dim), case.raw, 10 * i + j) for j, dim in enumerate((D, Dv))] if rows else None
        for i, rows in enumerate(case.rows)
    ]
    first, old, newest = pairs
    packed = old and tuple(packed_rows(x, *kind) for x, kind in zip(old, case.kinds))
    lengths = case.lengths and mx.array(case.lengths, mx.int32)
    if lengths is not None:
        stale = mx.arange(case.rows[2])[:, None] >= lengths[:, None, None, None]
        newest = [mx.where(stale, 100, x).astype(x.dtype) for x in newest]
    bias = None
    if case.bias_heads:
        bias = np.array(normal((B, case.bias_heads, sum(case.rows)), seed=50))
        bias[..., ::7] = -np.inf
        bias = mx.array(bias)
    logits = normal((Hkv * G,), mx.float32, 51) + 2 if case.logits else None
    queries = normal((B, Hkv * G, 1, D), case.dtype, 52)
    pair = [None if part is None else tuple(part) for part in (first, newest)]
    return queries, pair[0], packed, pair[1], 1.3 * D**-0.5, lengths, bias, logits


def expected_of(call):
    """mx.fast's attention over all rows in float32, what does not count hidden."""
    queries, sinks, packed, tail, scale, lengths, bias, logits = call
    parts = [part for part in (sinks, packed, tail) if part is not None]
    wide = [
        [unpack(x, mx.float32) if isinstance(x, QuantizedArray) else x.astype(mx.float32) for x in p] for p in parts
    ]
    keys, values = (mx.concatenate([pair[i] for pair in wide], axis=2) for i in (0, 1))
    B, Hq, T = queries.shape[0], queries.shape[1], keys.shape[2]
    mask = mx.zeros((B, Hq, 1, T))
    if bias is not None:
        mask += mx.repeat(bias, Hq // bias.shape[1], axis=1)[:, :, None]
    if lengths is not None:
        rows = T - tail[0].shape[2] + lengths
        mask = mx.where(mx.arange(T) < rows[:, None, None, None], mask, -mx.inf)
    queries = queries.astype(mx.float32)
    output = mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask, sinks=logits)
    return output.astype(call[0].dtype)


@contextmanager
def passes(count, split=4):
    """Make calls of any length take one pass, or two with small splits."""
    limits = {"ONE_PASS_TOKENS": 10**6 if count == 1 else 0, "SPLIT_TOKENS": split}
    _packed_launch.layout.cache_clear()
    with patch.multiple(_packed_launch, **limits):
        yield
    _packed_launch.layout.cache_clear()


def check(case, count=1):
    call = call_of(case)
    with passes(count):
        assert_same(attention.metal_packed_attention(*call), attention.reference_packed_attention(*call))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_reference_is_attention_over_all_rows(case):
    call = call_of(case)
    found, expected = attention.reference_packed_attention(*call), expected_of(call)
    assert found.dtype == expected.dtype
    tolerance = {mx.float32: 1e-4, mx.float16: 4e-3, mx.bfloat16: 3e-2}[found.dtype]
    np.testing.assert_allclose(found.astype(mx.float32), expected.astype(mx.float32), atol=tolerance)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize(("dim", "value_dim"), [(64, 64), (80, 80), (96, 64), (128, 128), (256, 256), (576, 512)])
def test_the_reference_takes_heads_of_any_width_and_bits(bits, rotated, dim, value_dim):
    kinds = (bits, 8, 1, rotated), (bits, 1, 16, rotated)
    test_the_reference_is_attention_over_all_rows(
        Case((1, 2), (dim, value_dim), (2, 24, 8), kinds, mx.float32, lengths=(3,))
    )


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_one_launch_equals_the_reference(case, kernel_path):
    check(case)


@pytest.mark.parametrize("name", sorted(TWICE))
def test_two_launches_equal_the_reference(name, kernel_path):
    check(CASES[name], 2)


def test_heads_that_are_too_wide_go_to_the_kernel_of_buckets(kernel_path):
    check(Case((1, 3), (288, 256), (2, 8, 5), ((4, 1, 288), (4, 1, 256)), lengths=(3,)))


def test_long_texts_take_two_launches_whose_splits_grow_rather_than_become_many():
    """SmolLM2-135M, 32/8 heads of 128 dims, and 8 batch rows of these."""
    for B, heads, T, splits in [
        (1, (9, 3, 64), 512, 1),
        (1, (9, 3, 64), 1024, 8),
        (1, (32, 8, 128), 4096, 32),
        (1, (32, 8, 128), 131072, 64),
        (8, (32, 8, 128), 131072, 8),
    ]:
        Hq, Hkv, D = heads
        shape, raw = (B, Hkv, T, D), (mx.float16, mx.float16)
        launch = _packed_launch.layout(
            (B, Hq, 1, D), mx.float16, None, None, (shape, shape, *raw), None, None, None
        ).launch
        assert launch.grid == (256, splits, B * Hkv)
        assert (launch.merge is None) == (splits == 1)


@pytest.mark.parametrize("attend", BOTH)
def test_rows_without_tokens_and_rows_that_are_all_hidden_give_zeros(attend):
    hidden = Case(rows=(0, 0, 21), batch=2, lengths=(0, 20))
    call = call_of(hidden)
    masked = (*call[:6], mx.full((2, 1, 21), -mx.inf), None)
    for arguments in (call, masked):
        with installed():
            output = np.array(attend(*arguments))
        assert not output[0].any()
        assert output[1].any() == (arguments is call)
    empty = normal((2, 2, 0, 64), mx.float16)
    with installed():
        assert not np.array(attend(call[0], (empty, empty), None, (empty, empty), 0.125)).any()


@pytest.mark.parametrize("spoiled", ["query", "key", "value"])
def test_what_is_not_finite_shows_in_the_output_of_its_head_alone(spoiled, kernel_path):
    queries, sinks, packed, tail, *rest = call_of(Case(rows=(4, 60, 16)))
    array = {"query": queries, "key": tail[0], "value": tail[1]}[spoiled]
    array[0, 0, 0] = mx.nan
    with passes(1):
        output = np.array(attention.metal_packed_attention(queries, sinks, packed, tail, *rest).astype(mx.float32))
    assert np.isnan(output[0, 0]).all()
    assert not np.isnan(output[0, 3:]).any()


def check_large_scores(count):
    queries, *rest = call_of(CASES["no packed"]._replace(dtype=mx.float32))
    call = (9e4 * queries, *rest)
    with passes(count):
        assert_same(attention.metal_packed_attention(*call), attention.reference_packed_attention(*call))


@pytest.mark.parametrize("count", [1, 2])
def test_scores_far_beyond_the_range_of_exp_do_not_overflow(count, kernel_path):
    check_large_scores(count)


def test_the_dispatcher_takes_the_kernel_where_there_is_metal(monkeypatch):
    monkeypatch.setattr(attention, "metal_packed_attention", lambda *_: "kernel")
    call = call_of(CASES["no packed"])
    assert (isinstance(attention.packed_attention(*call), str)) is attention.metal.available()
    with installed():
        assert attention.packed_attention(*call) == "kernel"


@pytest.mark.parametrize("attend", BOTH)
def test_shapes_that_do_not_fit_together_are_refused(attend):
    good = call_of(Case(lengths=(13,)))
    queries, sinks, packed, tail, scale, *_ = good
    with pytest.raises(InputError, match="needs sinks, packed tokens or a tail"):
        attend(queries, None, None, None, scale)
    for wrong in (queries[:, :5], queries[..., :63], mx.repeat(queries, 2, axis=2), mx.repeat(queries, 2, axis=0)):
        with pytest.raises(MismatchError):
            attend(wrong, *good[1:])
    for other in ((tail[0], tail[1][:, :1]), (tail[0][:, :, :5], tail[1]), (tail[0], tail[1][..., :32])):
        with pytest.raises(MismatchError, match="do not fit"):
            attend(queries, sinks, packed, other, scale)
    with pytest.raises(MismatchError, match="expected one type"):
        attend(queries, sinks, packed, tuple(x.astype(mx.float32) for x in tail), scale)
    for position, name, shape in ((5, "lengths", (2,)), (6, "bias", (1, 1, 139)), (7, "logits", (2,))):
        wrong = [*good[:5], None, None, None]
        wrong[position] = mx.zeros(shape)
        with pytest.raises(MismatchError, match=name):
            attend(*wrong)


@pytest.mark.faults
@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("many heads", "32 % (K_PER * K_BITS) == 0;", "true;"),
        ("an odd part", "32 % (V_PER * V_BITS) == 0;", "true;"),
        ("many heads", "HEADS <= 4 ? 4 : 8", "4"),
        ("kivi", "kv_heads = heads / GROUP", "kv_heads = GROUP"),
        ("kivi", "batch = kv_row / kv_heads", "batch = kv_row % kv_heads"),
        ("many heads", "GROUP - pass * HEADS)", "GROUP)"),
        ("kivi", "lane / TOKENS % ROOM, count - 1)", "lane / TOKENS % ROOM, 0u)"),
        ("int8", "0, int(tail_room))", "0, int(tail_room) - 1) + 1"),
        ("kivi", "lengths[batch]", "lengths[0]"),
        ("awkward", "(sink_rows + TOKENS - 1) / TOKENS", "sink_rows / TOKENS"),
        ("int8", "(tail_rows + TOKENS - 1) / TOKENS", "tail_rows / TOKENS"),
        ("an odd part", "(packed_rows + TOKENS - 1) / TOKENS", "packed_rows / TOKENS"),
        ("int4", "* scale[0], k_turn", ", k_turn"),
        ("int8", "float(queries[row + d]) * scale[0]", "float(queries[row + d])"),
        ("an odd part", "k_turn[from * K_ODD + d % K_ODD]", "k_turn[from * K_ODD]"),
        ("int4", "hadamard<D, K_ODD>(&turned[h * D], lane);", ""),
        ("int4", "threadgroup_barrier(mem_flags::mem_threadgroup);\n}\n\nfloat query", "}\n\nfloat query"),
        ("kivi", "LOGITS && split == 0 && part == 0", "LOGITS && split == 0"),
        ("kivi", "lane % TOKENS == 0 ? metal::exp(logit - top) : 0.0f", "metal::exp(logit - top)"),
        ("kivi", "top = metal::max(top, logit);", ""),
        ("int4", "K_TURNED && !raw ? turned", "K_TURNED ? turned"),
        ("int4", "V_TURNED && !raw && start < raw_blocks", "false"),
        ("an odd part", "own[from], v_turn[from * V_ODD + d % V_ODD]", "own[from], v_turn[d * V_ODD]"),
        ("int4", "hadamard<DV, V_ODD>(own, lane);", ""),
        ("int8", "block += SIMD_GROUPS", "block += SIMD_GROUPS + 1"),
        ("int4", "block - (raw ? sink_blocks : raw_blocks)", "block - raw_blocks"),
        ("int4", "(sink ? sinks_k : tail_k)", "tail_k"),
        ("int4", "(sink ? sinks_v : tail_v)", "sinks_v"),
        ("kivi", "size_t(kv_row) * (sink ? sink_rows : tail_room) * D;", "size_t(kv_row) * (sink ? sink_rows : tail_rows) * D;"),
        ("kivi", "(sink ? sink_rows : tail_room) * DV", "sink_rows * DV"),
        ("an odd part", "metal::min(token + t, rows - 1) * D;", "(token + t) * D;"),
        ("an odd part", "metal::min(token + t, rows - 1) * DV;", "(token + t) * DV;"),
        ("an odd part", "at / K_TOKENS", "at % K_TOKENS"),
        ("awkward", "at / V_TOKENS", "at"),
        ("int8", "at * k_shape[3];", "at * k_shape[3] + 1;"),
        ("int8", "packed_rows * k_shape[3]", "k_shape[3]"),
        ("kivi", "size_t(kv_row) * v_scale_shape[2] *", "size_t(kv_row) *"),
        ("int8", "(lane * K_PER * K_BITS % 32)", "(lane * K_BITS % 32)"),
        ("int4", "lane * V_PER * V_BITS / 32", "lane * V_BITS / 32"),
        ("awkward", "(D == 32 * K_PER || d < D) {\n            if", "(d < D + 1) {\n            if"),
        ("an odd part", "(t == 0 || K_TOKENS % TOKENS != 0)", "(t == 0)"),
        ("int4", "(t == 0 || V_TOKENS % TOKENS != 0)", "(t == 0)"),
        ("awkward", "i > 0 && K_DIMS % K_PER == 0", "i > 0"),
        ("many heads", "i > 0 && V_DIMS % V_PER == 0", "i > 0"),
        ("awkward", "k_lows[tiles + d / K_DIMS]", "k_lows[tiles]"),
        ("awkward", "v_steps[tiles + d / V_DIMS]", "v_steps[tiles]"),
        ("int8", "(word >> (i * K_BITS % 32))", "(word >> (i * K_BITS / 2))"),
        ("int4", "(word >> (i * V_BITS % 32))", "word"),
        ("int4", "upper ? score[n] : score[n + far], far", "upper ? score[n + far] : score[n], far"),
        ("int8", "other < 32; other *= 2", "other < 16; other *= 2"),
        ("wide", "other = SCORES; other < 32", "other = 32; other < 32"),
        ("int8", "own_score = -INFINITY;", "own_score = 0.0f;"),
        ("kivi", "own_head * bias_shape[1] / heads", "own_head % bias_shape[1] / 2"),
        ("kivi", "batch * bias_shape[1] +", "0 * bias_shape[1] +"),
        ("kivi", "raw ? sink_rows + packed_rows : sink_rows)", "sink_rows)"),
        ("packed alone", "size_t(bias_row) * columns", "size_t(bias_row) * rows / 2"),
        ("int8", "metal::max(own_score, metal::simd_shuffle_xor(own_score, 1))", "own_score"),
        ("int8", "metal::exp(top - most)", "1.0f"),
        ("int8", "total = total * keep + weight", "total = total + weight"),
        ("int8", "metal::simd_shuffle(keep, h * TOKENS)", "keep"),
        ("int8", "metal::simd_shuffle(weight, h * TOKENS + t)", "metal::simd_shuffle(weight, h * TOKENS)"),
        ("int8", "sums[h][i] *= kept;", ""),
        ("int8", "total += metal::simd_shuffle_xor(total, 2);", ""),
        ("int8", "lane / TOKENS < HEADS)", "true)"),
        ("int8", "threadgroup_barrier(mem_flags::mem_threadgroup);\n  float most", "float most"),
        ("int8", "sum += shares[p] * part_sum", "sum += part_sum"),
        ("int8", "merged += shares[p] *", "merged +="),
        ("many heads", "} else if (h < count) {", "} else {"),
        ("int4", "hadamard<DV, V_ODD>(&shared[0], lane);", ""),
        ("an odd part", "v_turn[d * V_ODD + c]", "v_turn[d * V_ODD]"),
        ("int8", "threadgroup_barrier(mem_flags::mem_threadgroup);  // the next", "// the next"),
    ],
)  # fmt: skip
def test_a_planted_fault_is_found(name, old, new):
    with installed(("packed_attention", old, new)), pytest.raises((AssertionError, HostError)):
        check(CASES[name])


@pytest.mark.faults
@pytest.mark.parametrize(
    ("body", "old", "new"),
    [
        ("packed_attention", "blocks, start + share)", "blocks, start + share - 1)"),
        ("packed_attention", "(blocks + splits - 1) / splits", "blocks / splits"),
        ("packed_attention", "start < raw_blocks", "start == 0"),
        ("packed_attention", "(row * splits + split) * (DV + 2) + d] =", "(row * splits + split) * (DV + 2) + d + 1] ="),
        ("packed_attention", "second ? sum : most", "second ? most : sum"),
        ("packed_attention_merge", "total = simd_sum(total);", ""),
        ("packed_attention_merge", "s += SIMD_GROUPS", "s += SIMD_GROUPS + 1"),
        ("packed_attention_merge", "fma(share,", "fma(1.0f,"),
        ("packed_attention_merge", "lane + 32 * j < DV) {\n    shared", "lane + 32 * j < DV + 1) {\n    shared"),
        ("packed_attention_merge", "merged += shared[p * DV + d]", "merged = shared[p * DV + d]"),
        ("packed_attention_merge", "total == 0.0f ? 1.0f : total", "1.0f"),
        ("packed_attention_merge", "hadamard<DV, ODD>(&shared[0], lane);", ""),
        ("packed_attention_merge", "v_turn[d * ODD + c]", "v_turn[d * ODD]"),
        ("common", "row[near] - row[near + far]", "row[near + far] - row[near]"),
        ("common", "i / far * far + i", "i"),
        ("common", "far < DIM; far *= 2) {\n    simdgroup_barrier(mem_flags::mem_threadgroup);", "far < DIM; far *= 2) {"),
    ],
)  # fmt: skip
def test_a_fault_planted_in_splits_and_their_merge_is_found(body, old, new):
    def check_both():
        check(CASES["an odd part"], 2)
        check(CASES["kivi"], 2)

    with installed((body, old, new)), pytest.raises((AssertionError, HostError)):
        check_both()


@pytest.mark.faults
@pytest.mark.parametrize(
    ("body", "old", "new", "count"),
    [
        ("packed_attention", "most = metal::max(most, part_top[p * HEADS + h]);", "", 1),
        ("packed_attention_merge", "most = metal::max(most, rows[s * (DV + 2) + DV]);", "", 2),
        ("packed_attention_merge", "most = simd_max(most);", "", 2),
    ],
)
def test_merging_around_less_than_the_largest_score_overflows(body, old, new, count):
    with installed((body, old, new)), pytest.raises((AssertionError, HostError)):
        check_large_scores(count)
