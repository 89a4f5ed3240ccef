"""Attention over packed buckets: the reference is MLX's own attention on unpacked data, the kernel equals it."""

from typing import NamedTuple

import mlx.core as mx
import numpy as np
import pytest
from kernel_checks import assert_same
from metal_host import HostError, installed

from mlxkv.errors import InputError, MismatchError
from mlxkv.kernels import decode_attention as attention
from mlxkv.kernels.bits import pack, slice_rows, unpack
from mlxkv.live.attention import MASKED

BOTH = [attention.reference_decode_attention, attention.metal_decode_attention]


class Heads(NamedTuple):
    """Shapes of one attention: kv_heads x group query heads of these dims, batch 2."""

    kv_heads: int
    group: int
    dim: int
    value_dim: int
    dtype: mx.Dtype = mx.float16


GQA = Heads(2, 4, 64, 64)
ODD = Heads(2, 9, 80, 48)  # two passes of 5 and 4 query heads, dims that leave lanes idle
KIVI = ((4, 32, 1), (2, 1, 32))  # bits, tokens and dims of keys, then of values
PLAIN = ((16, 1, 1), (16, 1, 1))


def normal(shape, dtype=mx.float16, seed=0):
    return mx.array(np.random.default_rng(seed).standard_normal(shape).astype(np.float32)).astype(dtype)


def queries_of(heads, batch=2):
    return normal((batch, heads.kv_heads * heads.group, 1, heads.dim), heads.dtype, seed=9)


def sinks_of(heads):
    return 2 * normal((heads.kv_heads * heads.group,), mx.float32, seed=11) + 3


def bucket(heads, T, kinds=KIVI, batch=2, seed=0):
    k, v = (normal((batch, heads.kv_heads, T, d), heads.dtype, seed + d) for d in (heads.dim, heads.value_dim))
    return pack(k, *kinds[0]), pack(v, *kinds[1])


def check(queries, buckets, bias=None, scale=0.125, sinks=None):
    """The kernel equals the reference, whose mass is a probability for each query head."""
    output, mass = attention.metal_decode_attention(queries, buckets, scale, bias, sinks)
    expected, expected_mass = attention.reference_decode_attention(queries, buckets, scale, bias, sinks)
    assert_same(output, expected)
    assert_same(mass, expected_mass)
    return output, mass


def stock(queries, buckets, scale=0.125, mask=None, sinks=None, values=None):
    """mx.fast's attention over all buckets, unpacked."""
    sinks = None if sinks is None else sinks.astype(mx.float32)
    k, v = (mx.concatenate([unpack(pair[i], mx.float32) for pair in buckets], axis=2) for i in (0, 1))
    v = v if values is None else values
    return mx.fast.scaled_dot_product_attention(queries.astype(mx.float32), k, v, scale=scale, mask=mask, sinks=sinks)


def close(found, expected, tolerance=2e-3):
    np.testing.assert_allclose(found.astype(mx.float32), expected, atol=tolerance)


def masked_bias(shape, hidden):
    """Random, with -inf at the hidden tokens."""
    bias = np.random.default_rng(3).standard_normal(shape).astype(np.float32)
    bias[..., hidden] = -np.inf
    return mx.array(bias)


@pytest.mark.parametrize("T", [1, 31, 32, 33, 100, 300])
def test_the_kernel_equals_the_reference_for_any_number_of_tokens(T, kernel_path):
    _, mass = check(queries_of(GQA), [bucket(GQA, T)])
    np.testing.assert_allclose(mass.sum(axis=-1), np.full((2, 2), 4), rtol=1e-5)


@pytest.mark.parametrize(
    ("heads", "kinds"),
    [
        (Heads(3, 1, 80, 80, mx.bfloat16), ((3, 32, 1), (8, 1, 16))),
        (Heads(1, 7, 128, 128, mx.float32), ((8, 1, 64), (3, 1, 128))),
        (Heads(1, 17, 33, 31), ((2, 4, 5), (4, 3, 7))),
    ],
)
def test_the_kernel_equals_the_reference_for_any_group_dims_and_tiles(heads, kinds, kernel_path):
    check(queries_of(heads), [bucket(heads, 37, kinds)])


def test_one_latent_head_serves_the_many_query_heads_of_mla(kernel_path):
    heads = Heads(1, 21, 576, 512)
    queries, buckets = queries_of(heads, batch=1), [bucket(heads, 9, ((4, 1, 64), (4, 1, 64)), batch=1)]
    output, _ = check(queries, buckets, normal((1, 21, 9)), scale=0.04)
    assert output.shape == (1, 21, 1, 512)


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_unpacked_values_are_attended_to_as_they_are(dtype, kernel_path):
    heads = GQA._replace(dtype=dtype)
    queries, buckets = queries_of(heads), [bucket(heads, 33, PLAIN)]
    output, _ = check(queries, buckets)
    close(output, stock(queries, buckets), {mx.float32: 2e-6, mx.float16: 1e-3, mx.bfloat16: 8e-3}[dtype])


def mixed_buckets():
    sizes = {0: PLAIN, 5: PLAIN, 40: ((8, 1, 32), (8, 1, 32)), 130: KIVI}
    return [bucket(GQA, T, kinds, seed=T) for T, kinds in sizes.items()]


def test_buckets_of_different_precision_share_one_softmax(kernel_path):
    queries, buckets = queries_of(GQA), mixed_buckets()
    output, mass = check(queries, buckets)
    close(output, stock(queries, buckets))
    np.testing.assert_allclose(mass.sum(axis=-1), np.full((2, 2), 4), rtol=1e-5)


def test_the_order_of_the_buckets_moves_the_mass_and_nothing_else():
    queries, (_, *buckets) = queries_of(GQA), mixed_buckets()
    output, mass = attention.decode_attention(queries, buckets, 0.125)
    turned, turned_mass = attention.decode_attention(queries, buckets[1:] + buckets[:1], 0.125)
    assert_same(turned, output)
    assert_same(turned_mass, mx.roll(mass, -5, axis=-1))


@pytest.mark.parametrize("bias_heads", [1, 2, 8])
def test_a_bias_belongs_to_all_heads_or_a_kv_head_or_a_query_head(bias_heads, kernel_path):
    buckets, queries = [bucket(GQA, 33), bucket(GQA, 100, seed=1)], queries_of(GQA)
    bias = masked_bias((2, bias_heads, 133), [*range(20), 40, 132])
    output, mass = check(queries, buckets, bias)
    mask = mx.repeat(bias, 8 // bias_heads, axis=1)[:, :, None]
    close(output, stock(queries, buckets, mask=mask))
    assert not np.array(mass)[..., [*range(20), 40, 132]].any()


def test_mass_is_the_sum_of_each_query_heads_probabilities():
    queries, (k, v) = queries_of(GQA), bucket(GQA, 33)
    scores = np.array(queries.astype(mx.float32)).reshape(2, 2, 4, 64) @ np.array(unpack(k, mx.float32)).swapaxes(2, 3)
    weights = np.exp(scores * 0.125)
    expected = (weights / weights.sum(axis=-1, keepdims=True)).sum(axis=2)
    np.testing.assert_allclose(attention.decode_attention(queries, [(k, v)], 0.125)[1], expected, rtol=1e-5)


def test_the_kernel_path_makes_scores_and_splits_but_no_unpacked_copy(kernel_path):
    queries, buckets = queries_of(GQA), [bucket(GQA, 300)]
    mx.eval(queries, *(part for packed in buckets[0] for part in (packed.words, packed.bias, packed.scale)))
    peaks = []
    for attend in BOTH:
        held = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(attend(queries, buckets, 0.125))
        peaks.append(mx.get_peak_memory() - held)
    copy = 2 * 2 * 300 * 64 * 4
    assert peaks[1] < copy < peaks[0]


@pytest.mark.parametrize("attend", BOTH)
def test_a_row_whose_every_token_is_masked_is_zero_and_others_are_not(attend):
    bias = mx.zeros((2, 1, 33))
    bias[1] = -mx.inf
    with installed():
        output, mass = attend(queries_of(GQA), [bucket(GQA, 33)], 0.125, bias)
    assert not np.array(output[1].astype(mx.float32)).any()
    assert not np.array(mass[1]).any()
    assert np.allclose(mass[0].sum(axis=-1), 4)


@pytest.mark.parametrize("attend", BOTH)
def test_no_tokens_at_all_give_zeros(attend):
    for sinks in (None, sinks_of(GQA)):
        output, mass = attend(queries_of(GQA), [bucket(GQA, 0), bucket(GQA, 0)], 0.125, None, sinks)
        assert mass.shape == (2, 2, 0)
        assert mx.array_equal(output, mx.zeros((2, 8, 1, 64), mx.float16))


def check_large_scores():
    whole = np.random.default_rng(0).integers(-9, 10, (2, 2, 33, 64))
    k, v = mx.array(whole, mx.float32), normal((2, 2, 33, 64), mx.float32)
    queries = 1000 * mx.array(np.random.default_rng(1).integers(-9, 10, (2, 8, 1, 64)), mx.float32)
    _, mass = check(queries, [(pack(k, 16, 1, 1), pack(v, 16, 1, 1))], scale=1)
    assert np.array_equal(mass, mx.round(mass))  # each head sees one token


def test_scores_far_beyond_the_range_of_exp_do_not_overflow(kernel_path):
    check_large_scores()


def test_merging_around_less_than_the_largest_score_overflows():
    fault = ("decode_attention", "most = metal::max(most, part_top[p])", "most = part_top[p]")
    with installed(fault), pytest.raises(AssertionError):
        check_large_scores()


@pytest.mark.parametrize("with_sinks", [False, True])
def test_tokens_hidden_before_a_window_count_as_if_they_were_gone(with_sinks, kernel_path):
    queries, (k, v), recent = queries_of(GQA), bucket(GQA, 200, ((8, 1, 64), (8, 1, 64))), bucket(GQA, 5, PLAIN)
    hidden = 140  # a whole split of tokens, and a part of the next
    bias = mx.where(mx.arange(205) < hidden, -mx.inf, mx.zeros((2, 1, 1)))
    sinks = sinks_of(GQA) if with_sinks else None
    output, mass = check(queries, [(k, v), recent], bias, sinks=sinks)
    window = [tuple(slice_rows(part, hidden, 200) for part in (k, v)), recent]
    expected, expected_mass = attention.reference_decode_attention(queries, window, 0.125, None, sinks)
    assert_same(output, expected)
    assert_same(mass[..., hidden:], expected_mass)
    assert not np.array(mass[..., :hidden]).any()


def check_sinks(heads, buckets, sinks, bias=None):
    """Kernel and reference equal mx.fast's attention, and a token's mass what it would give to a value of its own."""
    queries = queries_of(heads)
    output, mass = check(queries, buckets, bias, sinks=sinks)
    mask = None if bias is None else bias[:, :, None]
    close(output, stock(queries, buckets, mask=mask, sinks=sinks))
    own = mx.broadcast_to(mx.eye(mass.shape[-1]), (*mass.shape, mass.shape[-1]))
    weights = stock(queries, buckets, mask=mask, sinks=sinks, values=own)
    close(mass, weights.reshape(2, heads.kv_heads, heads.group, -1).sum(axis=2), 4e-5)


@pytest.mark.parametrize("T", [1, 31, 33, 129])
def test_a_sink_takes_attention_and_gives_nothing_for_any_number_of_tokens(T, kernel_path):
    check_sinks(GQA, [bucket(GQA, T)], sinks_of(GQA))


@pytest.mark.parametrize(
    ("heads", "dtype"),
    [(Heads(3, 1, 80, 80), mx.float32), (Heads(1, 7, 64, 64, mx.float32), mx.float16), (ODD, mx.bfloat16)],
)
def test_each_query_head_has_a_sink_of_any_float_type_and_a_bias(heads, dtype, kernel_path):
    bias = masked_bias((2, heads.kv_heads * heads.group, 33), [0, 7, 32])
    check_sinks(heads, [bucket(heads, 33, PLAIN)], sinks_of(heads).astype(dtype), bias)


def test_buckets_of_different_precision_share_one_sink(kernel_path):
    rotated = [pack(normal((2, 2, 120, 64), seed=i), *tile, True) for i, tile in enumerate([(4, 60, 1), (4, 2, 64)])]
    buckets = [*mixed_buckets(), tuple(rotated), bucket(GQA, 1, PLAIN), bucket(GQA, 0, PLAIN)]
    check_sinks(GQA, buckets, sinks_of(GQA), normal((2, 8, 296), mx.float32))


def two_buckets():
    return [bucket(GQA, 33), bucket(GQA, 5, PLAIN)]


def test_a_sink_of_minus_infinity_is_none(kernel_path):
    queries, buckets, bias = queries_of(GQA), two_buckets(), masked_bias((2, 8, 38), [3])
    for added in (None, bias):
        found = check(queries, buckets, added, sinks=mx.full((8,), -mx.inf))
        for one, expected in zip(found, attention.decode_attention(queries, buckets, 0.125, added)):
            assert_same(one, expected)


@pytest.mark.parametrize("large", [mx.array(3.4e38), mx.array(65504, mx.float16), mx.array(3.3e38, mx.bfloat16)])
def test_a_huge_sink_takes_all_attention_of_its_head_and_of_no_other(large, kernel_path):
    queries, buckets = queries_of(GQA), two_buckets()
    output, mass = check(queries, buckets, sinks=mx.where(mx.arange(8) < 5, large, mx.array(-mx.inf, large.dtype)))
    assert not np.array(output[:, :5]).any()
    assert not np.array(mass[:, 0]).any()
    assert_same(output[:, 5:], attention.decode_attention(queries, buckets, 0.125)[0][:, 5:])
    np.testing.assert_allclose(mass[:, 1].sum(axis=-1), [3, 3], rtol=1e-5)


@pytest.mark.parametrize("hidden", [-mx.inf, MASKED, mx.finfo(mx.float32).min])
def test_a_row_whose_every_token_is_hidden_gives_all_attention_to_its_sinks(hidden, kernel_path):
    bias = mx.zeros((2, 1, 38))
    bias[1] = hidden
    output, mass = check(queries_of(GQA), two_buckets(), bias, sinks=sinks_of(GQA))
    assert not np.array(output[1]).any()
    assert not np.array(mass[1]).any()
    assert np.array(output[0]).all()


def test_the_bias_of_a_centroid_counts_its_tokens(kernel_path):
    k, v = normal((2, 2, 33, 64)), normal((2, 2, 33, 64), seed=1)
    doubled = [mx.concatenate([x, x[..., :10, :]], axis=2) for x in (k, v)]
    bias = mx.zeros((2, 1, 33))
    bias[..., :10] = float(np.log(2))
    queries = queries_of(GQA)
    found, _ = check(queries, [(pack(k, 16, 1, 1), pack(v, 16, 1, 1))], bias)
    expected, _ = check(queries, [tuple(pack(x, 16, 1, 1) for x in doubled)])
    assert_same(found, expected)


@pytest.mark.parametrize("attend", BOTH)
@pytest.mark.parametrize("spoiled", ["query", "key", mx.nan, mx.inf])
def test_what_is_not_finite_shows_in_the_output(attend, spoiled):
    queries, k, v = queries_of(GQA), normal((2, 2, 33, 64)), normal((2, 2, 33, 64), seed=1)
    sinks = sinks_of(GQA)
    if spoiled == "query":
        queries[0, 0, 0, 5] = mx.nan
    elif spoiled == "key":
        k[0, 0, 7, 5] = mx.inf
    else:
        sinks[0] = spoiled
    with installed():
        output, _ = attend(queries, [(pack(k, *KIVI[0]), pack(v, *KIVI[1]))], 0.125, None, sinks)
    assert np.isnan(np.array(output[0, 0].astype(mx.float32))).all()
    assert not np.isnan(np.array(output[:, 4:].astype(mx.float32))).any()


def test_the_dispatcher_takes_the_kernel_where_there_is_metal(monkeypatch):
    monkeypatch.setattr(attention, "metal_decode_attention", lambda *_: "kernel")
    call = (queries_of(GQA), [bucket(GQA, 3)], 0.125)
    assert (attention.decode_attention(*call) == "kernel") is attention.metal.available()
    with installed():
        assert attention.decode_attention(*call) == "kernel"


@pytest.mark.parametrize("attend", BOTH)
def test_shapes_that_do_not_fit_together_are_refused(attend):
    queries, good = queries_of(GQA), bucket(GQA, 3)
    for count in (0, 9):
        with pytest.raises(InputError, match="at least one bucket"):
            attend(queries, [good] * count, 0.125)
    wide = pack(mx.zeros((1, 1, 3, 577)), 4, 1, 577)
    with pytest.raises(InputError, match="ends at 576"):
        attend(mx.zeros((1, 1, 1, 577)), [(wide, wide)], 0.125)
    for wrong in (queries[:, :7], queries[:1], queries[..., :63], mx.repeat(queries, 2, axis=2)):
        with pytest.raises(MismatchError):
            attend(wrong, [good], 0.125)
    for other in (GQA._replace(kv_heads=1), GQA._replace(value_dim=32), GQA._replace(dtype=mx.float32)):
        with pytest.raises(MismatchError, match="do not fit"):
            attend(queries, [good, (good[0], bucket(other, 3)[1])], 0.125)
    with pytest.raises(MismatchError, match="do not fit"):
        attend(queries, [(good[0], bucket(GQA, 4)[1])], 0.125)
    for shape in ((2, 1, 4), (2, 3, 3), (1, 1, 3), (2, 8, 1, 3)):
        with pytest.raises(MismatchError, match="bias"):
            attend(queries, [good], 0.125, mx.zeros(shape))
    for shape in ((2,), (8, 1), (2, 8), ()):
        with pytest.raises(MismatchError, match="sinks"):
            attend(queries, [good], 0.125, None, mx.zeros(shape))


BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"


def check_faulty(kind, sinks=None):
    heads = ODD._replace(dtype=kind) if kind else ODD
    bias = masked_bias((2, 2, 140), [*range(16), 139])
    check(queries_of(heads), [bucket(heads, 140, PLAIN if kind else ((3, 32, 1), (4, 1, 32)))], bias, sinks=sinks)


def check_faulty_sinks():
    logits = np.array(sinks_of(ODD))
    logits[1::3] += 200
    logits[2::3] = -np.inf
    check_faulty(None, mx.array(logits))
    check(queries_of(ODD), [bucket(ODD, 3, PLAIN)], sinks=mx.full((18,), mx.nan))


@pytest.mark.faults
@pytest.mark.parametrize(
    ("body", "old", "new", "kind"),
    [
        ("decode_attention", f"{BARRIER}\n  float most", "float most", None),
        ("decode_attention", f"{BARRIER}  // the next", "// the next", None),
        ("decode_attention", "metal::min(tokens, (split + 1) * SPLIT_TOKENS)", "(split + 1) * SPLIT_TOKENS", None),
        ("decode_attention", "(split + 1) * SPLIT_TOKENS", "(split + 1) * SPLIT_TOKENS - 1", None),
        ("decode_attention", "t += SIMD_GROUPS", "t += SIMD_GROUPS + 1", None),
        ("decode_attention", "lane + 32 * j < D)", "lane + 32 * j < D + 1)", None),
        ("decode_attention", "k + k_row + j * K_BITS", "k + k_row + j", None),
        ("decode_attention", "v + v_row + j * V_BITS", "v + v_row + j", None),
        ("decode_attention", "(lane + 32 * j) / K_DIMS", "lane / K_DIMS", None),
        ("decode_attention", "32 * j / V_DIMS", "j / V_DIMS", None),
        ("decode_attention", "t / K_TOKENS", "t % K_TOKENS", None),
        ("decode_attention", "t / V_TOKENS", "t / (V_TOKENS + 1)", None),
        ("decode_attention", "head * bias_shape[1] / heads", "head % bias_shape[1]", None),
        ("decode_attention", "metal::min(h, count - 1)", "h", None),
        ("decode_attention", "lane == 0 && h < count", "lane == 0", None),
        ("decode_attention", "d < DV && h < count", "d < DV", None),
        ("decode_attention", "-3.4e38f", "-INFINITY", None),
        ("decode_attention", "simd_sum(score[h])", "score[h]", None),
        ("decode_attention", "exp(before - top[h])", "exp(before - score[h])", None),
        ("decode_attention", "exp(score[h] - top[h])", "exp(score[h] - before)", None),
        ("decode_attention", "total[h] * keep[h] +", "total[h] +", None),
        ("decode_attention", "sums[h][j] * keep[h])", "sums[h][j])", None),
        ("decode_attention", "share[p] * part_sum[p]", "part_sum[p]", None),
        ("decode_attention", "K_BITS == 32 ?", "V_BITS == 16 ?", mx.float32),
        ("decode_attention", "V_BITS == 32 ? as_type<float>(code)", "V_BITS == 16 ? as_type<float>(code)", mx.bfloat16),
    ],
)  # fmt: skip
def test_a_planted_fault_is_found(body, old, new, kind):
    with installed((body, old, new)), pytest.raises((AssertionError, HostError)):
        check_faulty(kind)


@pytest.mark.parametrize("kind", [None, mx.float32, mx.bfloat16])
def test_what_finds_the_faults_passes_without_them(kind, kernel_path):
    check_faulty(kind)


@pytest.mark.faults
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("split == 0 && part == 0", "split == 0"),
        ("split == 0 && part == 0", "part == 0"),
        ("sinks[head]", "sinks[first + h]"),
        ("sinks[head]", "sinks[kv_row % kv_heads]"),
        ("sinks[head]", "sinks[head / group]"),
        ("float(sinks[head])", "float(sinks[head]) + bias[bias_row[0]]"),
        ("top[h] = metal::max(top[h], sink)", "top[h] = sink"),
        ("top[h] = metal::max(top[h], sink);", ""),
        ("total[h] = metal::exp(sink - top[h])", "total[h] = 1.0f"),
        ("total[h] = metal::exp(sink - top[h]);", ""),
    ],
)
def test_a_fault_planted_in_the_sinks_is_found(old, new):
    with installed(("decode_attention", old, new)), pytest.raises((AssertionError, HostError)):
        check_faulty_sinks()


@pytest.mark.faults
def test_sinks_that_are_read_where_there_are_none_are_found():
    with installed(("decode_attention", "SINKS && ", "")), pytest.raises((AssertionError, HostError)):
        check_faulty(None)


def test_what_finds_the_faults_in_the_sinks_passes_without_them(kernel_path):
    check_faulty_sinks()
