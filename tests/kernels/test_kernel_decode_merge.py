"""The second launch of decode attention: all buckets' splits merged, and each token's attention mass."""

from unittest.mock import patch

import mlx.core as mx
import pytest
from kernel_checks import assert_same
from metal_host import HostError, installed
from test_kernel_decode_attention import ODD, PLAIN, Heads, bucket, check, masked_bias, normal, queries_of, sinks_of

from mlxkv.errors import MismatchError
from mlxkv.kernels import decode_attention as attention
from mlxkv.kernels.bits import pack
from mlxkv.live.importance import update_importance


def check_long_text():
    heads = Heads(2, 2, 8, 8, mx.float32)
    with patch.multiple(attention, SPLIT_TOKENS=8, MASS_TOKENS=100):
        check(queries_of(heads, 1), [bucket(heads, 7, PLAIN, 1), bucket(heads, 350, ((8, 1, 8), (8, 1, 8)), 1)])


def test_more_splits_than_lanes_and_more_tokens_than_a_threadgroup_sums_are_merged(kernel_path):
    check_long_text()


def check_importance(decay=0.9, kept=150):
    queries, buckets = queries_of(ODD), [bucket(ODD, 40), bucket(ODD, 140, PLAIN), bucket(ODD, 7, PLAIN)]
    old = mx.abs(normal((2, 2, kept), mx.float32, 5))
    call = queries, buckets, 0.125, None, sinks_of(ODD), old, decay
    for found, expected in zip(attention.metal_decode_attention(*call), attention.reference_decode_attention(*call)):
        assert_same(found, expected)
    return attention.decode_attention(*call), attention.decode_attention(*call[:5]), old


@pytest.mark.parametrize("decay", [0.9, 1])
@pytest.mark.parametrize("kept", [0, 1, 150, 186])
def test_importance_is_updated_by_the_merge_as_by_its_definition(kernel_path, decay, kept):
    with patch.multiple(attention, MASS_TOKENS=100):
        (output, updated), (alone, mass), old = check_importance(decay, kept)
    assert_same(output, alone)
    assert_same(updated, update_importance(old, mass[..., -kept - 1 :], 1, decay))


@pytest.mark.parametrize("shape", [(2, 2, 187), (2, 1, 20), (1, 2, 20)])
def test_importance_that_does_not_fit_is_refused(kernel_path, shape):
    with pytest.raises(MismatchError, match="importance"):
        attention.decode_attention(queries_of(ODD), [bucket(ODD, 187)], 0.125, None, None, mx.zeros(shape), 0.9)


@pytest.mark.faults
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("columns - 1 - uint(importance_shape[2])", "columns - uint(importance_shape[2])"),
        ("t + 1 < columns && IMPORTANCE", "IMPORTANCE"),
        ("t + 1 < columns && IMPORTANCE", "false"),
        ("size_t(kv_row) * uint(importance_shape[2]) + (t - lower)", "(t - lower)"),
        ("old_share[0] *", ""),
        ("new_share[0] *", ""),
        ("(columns - lower) + (t - lower)", "columns + (t - lower)"),
    ],
)
def test_a_fault_planted_in_the_update_of_importance_is_found(old, new):
    with installed(("decode_attention_merge", old, new)), pytest.raises((AssertionError, HostError)):
        check_importance()


def rotated_buckets(heads):
    tiles = ((4, 10, 1), (4, 2, 48)), ((4, 1, 80), (8, 1, 16))
    rotated = [
        tuple(pack(normal((2, 2, 40, d), heads.dtype, d), *tile, True) for d, tile in zip((80, 48), pair))
        for pair in tiles
    ]
    return [bucket(heads, 3, PLAIN), rotated[0], bucket(heads, 140), rotated[1]]


def check_faulty_merge():
    check(queries_of(ODD), rotated_buckets(ODD), masked_bias((2, 2, 223), [0, 50, 222]))


@pytest.mark.faults
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("(widths[b] + DV + 1 + SPLIT_TOKENS)", "widths[b]"),
        ("columns += widths[b] - splits[b] * (DV + 2)", "columns += splits[b] * SPLIT_TOKENS"),
        ("merges ? place : kv_row * GROUP", "merges ? place : kv_row"),
        ("h += SIMD_GROUPS", "h += SIMD_GROUPS + 1"),
        ("top = simd_max(top);", ""),
        ("total = simd_sum(total);", ""),
        ("row[s * (DV + 2) + 1]", "row[s * (DV + 2)]"),
        ("threadgroup_barrier(mem_flags::mem_threadgroup);\nif (merges)", "if (merges)"),
        ("ROTATED == 0 ? 1 : 0;", "1;"),
        ("((ROTATED >> b) & 1) != kind", "(ROTATED & 1) != kind"),
        ("size_t(place) * widths[b];", "size_t(place) * widths[0];"),
        ("fma(share,", "fma(1.0f,"),
        ("lane + 32 * j < DV) {\n        shared", "lane + 32 * j < DV + 1) {\n        shared"),
        ("kind == 1 && ROTATED != 0 ? back[d] : 0.0f", "0.0f"),
        ("merged / head_total[0]", "merged"),
        ("hadamard<DV, ODD>(&shared[0], lane);", ""),
        ("turn[d * ODD + c]", "turn[d * ODD]"),
        ("t >= start && t < start + tokens", "t < start + tokens"),
        ("size_t(first + 1) * widths[b]", "size_t(first) * widths[b]"),
        ("h < GROUP; h++) {\n          sum", "h < GROUP - 1; h++) {\n          sum"),
        ("head_top[h]) /", "head_top[0]) /"),
        ("/ head_total[h]", ""),
        ("start += tokens;", ""),
    ],
)
def test_a_fault_planted_in_the_merge_is_found(old, new):
    with installed(("decode_attention_merge", old, new)), pytest.raises((AssertionError, HostError)):
        check_faulty_merge()


@pytest.mark.faults
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("s += 32) {\n      total", "s += 64) {\n      total"),
        ("(place - heads) % (heads / GROUP)", "(place - heads) % heads"),
        ("s += SIMD_GROUPS) {", "s += SIMD_GROUPS + SIMD_GROUPS) {"),
        ("/ (heads / GROUP) * MASS_TOKENS", "* MASS_TOKENS"),
        ("(place - heads) / (heads / GROUP) * MASS_TOKENS", "0"),
    ],
)
def test_a_fault_planted_in_the_merge_of_long_texts_is_found(old, new):
    with installed(("decode_attention_merge", old, new)), pytest.raises((AssertionError, HostError)):
        check_long_text()


def test_what_finds_the_faults_in_the_merge_passes_without_them(kernel_path):
    check_faulty_merge()
