"""The second launch of decode attention: all buckets' splits merged, and each token's attention mass."""

from unittest.mock import patch

import mlx.core as mx
import pytest
from metal_host import HostError, installed
from test_kernel_decode_attention import ODD, PLAIN, Heads, bucket, check, masked_bias, normal, queries_of

from mlxkv.kernels import decode_attention as attention
from mlxkv.kernels.bits import pack


def check_long_text():
    heads = Heads(2, 2, 8, 8, mx.float32)
    with patch.multiple(attention, SPLIT_TOKENS=8, MASS_TOKENS=100):
        check(queries_of(heads, 1), [bucket(heads, 7, PLAIN, 1), bucket(heads, 350, ((8, 1, 8), (8, 1, 8)), 1)])


def test_more_splits_than_lanes_and_more_tokens_than_a_threadgroup_sums_are_merged(kernel_path):
    check_long_text()


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
