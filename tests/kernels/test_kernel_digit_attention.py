"""Attention over digits: the reference is MLX's attention over decoded rows, and two launches give the same."""

from contextlib import contextmanager
from typing import NamedTuple
from unittest.mock import patch

import mlx.core as mx
import numpy as np
import pytest
from kernel_checks import assert_same
from metal_host import HostError, installed

from mlxkv.errors import MismatchError
from mlxkv.kernels import _digit_launch
from mlxkv.kernels import digit_attention as attention
from mlxkv.kernels.digit_attention import DigitRows, DigitSlot
from mlxkv.live.klt.coding import decoded

BOTH = [attention.reference_digit_attention, attention.metal_digit_attention]


class Case(NamedTuple):
    """Shapes of one call."""

    heads: tuple = (2, 3)  # kv heads, query heads of each
    dims: tuple = (64, 64)
    rows: tuple = (3, 12, 33)  # of each bucket
    k_bytes: tuple = (24, 20, 11)  # of a row of each bucket
    v_bytes: tuple = (17, 13, 10)
    sinks: int = 4
    tail: tuple = (48, 37)  # rows of the buffer, and those that count
    dtype: mx.Dtype = mx.float16
    raw: mx.Dtype = mx.float16
    batch: int = 1
    logits: bool = False


CASES = {
    "smollm2": Case(rows=(16, 64, 176)),
    "tiles": Case((1, 2), rows=(1, 133, 260), sinks=0, dtype=mx.float32),
    "80 dims": Case((2, 2), (80, 80), (2, 5, 130), (33, 21, 12), (9, 8, 7), dtype=mx.bfloat16, raw=mx.bfloat16, batch=2),
    "96 and 64 dims": Case((1, 5), (96, 64), (2, 9, 22), (40, 33, 20), (7, 20, 3), 3, (5, 1), raw=mx.float32, logits=True),
    "128 dims": Case((1, 4), (128, 128), (2, 8, 22), (64, 38, 33), (60, 40, 22)),
    "256 dims": Case((1, 3), (256, 256), (1, 4, 11), (100, 70, 40), (9, 33, 65), tail=(16, 16), logits=True),
    "many heads": Case((1, 9), (32, 40), (1, 4, 131), (8, 8, 8), (9, 8, 7), dtype=mx.float32, raw=mx.float32),
    "all digits": Case((1, 1), (64, 64), (1, 4, 11), (64, 64, 64), (64, 64, 64), 1, (2, 2)),
    "no rows yet": Case(rows=(0, 8, 0), tail=(40, 33), batch=2, logits=True),
    "no digits": Case(k_bytes=(20, 0, 9), v_bytes=(0, 14, 0)),
}  # fmt: skip


def normal(shape, dtype=mx.float32, seed=0):
    return mx.array(np.random.default_rng(seed).standard_normal(shape).astype(np.float32)).astype(dtype)


def slot_of(case, dim, widths, seed):
    """Rows of any digits, whose bytes are of any value, and bases that are not quite orthonormal."""
    random, lead = np.random.default_rng(seed), (case.batch, case.heads[0])
    basis = np.linalg.qr(random.standard_normal((*lead, dim, dim)))[0]
    return DigitSlot(
        mx.array(np.round(127 * basis), mx.int8),
        mx.array(random.integers(0, dim, (*lead, 4 * max(widths))), mx.uint8),
        mx.array(random.uniform(0.01, 0.04, (*lead, 4 * sum(widths)))).astype(mx.bfloat16),
        mx.array(random.standard_normal((*lead, dim))).astype(case.raw),
        *(mx.array(random.integers(0, 256, (*lead, n, width)), mx.uint8) for n, width in zip(case.rows, widths)),
        *(mx.array(random.integers(100, 132, (*lead, -(-n // 128), dim)), mx.uint8) for n in case.rows),
    )


def call_of(case):
    """The arguments of a call; rows of the tail that do not count hold large values."""
    (H, G), (D, Dv), B = case.heads, case.dims, case.batch
    packed = DigitRows(slot_of(case, D, case.k_bytes, 1), slot_of(case, Dv, case.v_bytes, 2))
    sinks = tuple(normal((B, H, case.sinks, d), case.raw, 3 + d) for d in (D, Dv)) if case.sinks else None
    room, rows = case.tail
    stale = mx.arange(room)[:, None] >= rows
    tail = tuple(mx.where(stale, 100, normal((B, H, room, d), seed=5 + d)).astype(case.raw) for d in (D, Dv))
    logits = normal((H * G,), seed=7) + 2 if case.logits else None
    return normal((B, H * G, 1, D), case.dtype, 8), sinks, packed, tail, 1.3 * D**-0.5, rows, logits


def expected_of(call):
    """mx.fast's attention over all rows in float32, and the weights of the newest."""
    queries, sinks, packed, tail, scale, rows, logits = call
    keys, values = (
        mx.concatenate([
            *([] if sinks is None else [sinks[i].astype(mx.float32)]), decoded(packed[i]),
            tail[i][:, :, :rows].astype(mx.float32),
        ], axis=2) for i in (0, 1)
    )  # fmt: skip
    queries = queries.astype(mx.float32)

    def attend(values):
        return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, sinks=logits)

    B, H, T, _ = keys.shape
    one = mx.broadcast_to(mx.eye(T)[:, -rows:], (B, H, T, rows))
    return attend(values).astype(call[0].dtype), attend(one).reshape(B, H, -1, rows).sum(axis=2)


@contextmanager
def splits(full):
    """Make calls take few or many splits."""
    _digit_launch.layout.cache_clear()
    with patch.object(_digit_launch, "FULL", full):
        yield
    _digit_launch.layout.cache_clear()


def check(case, full=256):
    call = call_of(case)
    with splits(full):
        for found, expected in zip(attention.metal_digit_attention(*call), attention.reference_digit_attention(*call)):
            assert_same(found, expected)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_reference_is_attention_over_decoded_rows(case):
    call = call_of(case)
    tolerance = {mx.float32: 1e-4, mx.float16: 4e-3, mx.bfloat16: 3e-2}[case.dtype]
    for found, expected, each in zip(attention.reference_digit_attention(*call), expected_of(call), (tolerance, 1e-4)):
        assert found.dtype == expected.dtype
        np.testing.assert_allclose(found.astype(mx.float32), expected.astype(mx.float32), atol=each)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_two_launches_equal_the_reference(case, kernel_path):
    check(case)


@pytest.mark.parametrize("full", [1, 3])
def test_splits_of_several_tiles_equal_the_reference(full, kernel_path):
    check(CASES["tiles"], full)


@pytest.mark.parametrize("rows", [1, 15, 127, 128, 129])
def test_buckets_of_any_length_equal_the_reference(rows, kernel_path):
    check(Case((1, 2), (64, 64), (0, 1, rows), tail=(rows, rows), dtype=mx.float32))


def planned(case):
    call = call_of(case)
    with (
        patch.object(attention, "layout", wraps=attention.layout) as layout,
        patch.object(attention, "reference_digit_attention", lambda *_: "reference"),
        installed(),
    ):
        result = attention.metal_digit_attention(*call)
    assert layout.call_count == 1
    return result


@pytest.mark.parametrize(
    "case",
    [
        Case((1, 2), (288, 64)),
        Case((1, 2), (64, 4), v_bytes=(2, 2, 2)),
        Case((1, 1), rows=(0, 0, 0)),
        Case((1, 1), rows=(0, 0, 3), k_bytes=(2, 2, 2)),
        Case(v_bytes=(0, 0, 0)),
    ],
)
def test_what_the_kernel_does_not_take_goes_to_the_reference(case):
    call = list(call_of(case._replace(dims=(64, 64))))
    call[0], call[2] = normal((1, case.heads[0] * case.heads[1], 1, case.dims[0])), call_of(case)[2]
    assert planned(case) == "reference"


def test_long_texts_are_cut_into_splits_that_grow_rather_than_become_many():
    """SmolLM2-135M at 1,024 and 4,096 tokens, and 32/8 heads of 128 dims at 131,072."""
    for heads, widths, tokens, found in [
        ((9, 3, 64), (24, 20, 16), 1024, (256, 10, 3)),
        ((9, 3, 64), (24, 20, 16), 4096, (256, 33, 3)),
        ((32, 8, 128), (48, 40, 32), 131072, (256, 17, 16)),
    ]:
        Hq, H, D = heads
        codes = tuple((1, H, tokens * share // 16, width) for share, width in zip((1, 4, 11), widths))
        tail = ((1, H, 48, D),) * 2
        launch = _digit_launch.layout((1, Hq, 1, D), mx.float16, None, tail, codes, codes, False)
        assert launch.grid == found
        assert launch.merge_grid == (256, Hq + H, 1)


def test_scores_far_beyond_the_range_of_exp_do_not_overflow(kernel_path):
    check_large_scores()


def check_large_scores():
    queries, sinks, packed, (keys, values), *rest = call_of(CASES["tiles"])
    for factor, newest in (
        (3e4, keys),
        (3e4, 0 * keys),
        (-3e4, 0 * keys),
    ):  # the largest is in the tail, or in some tile
        call = (factor * queries, sinks, packed, (newest, values), *rest)
        for found, expected in zip(attention.metal_digit_attention(*call), attention.reference_digit_attention(*call)):
            assert_same(found, expected)


def test_what_is_not_finite_shows_in_the_output_of_its_head_alone(kernel_path):
    queries, *rest = call_of(Case())
    queries[0, 0, 0, 5] = mx.nan
    output, mass = attention.metal_digit_attention(queries, *rest)
    assert np.isnan(np.array(output)[0, 0]).all()
    assert not np.isnan(np.array(output)[0, 1:]).any()
    assert not np.isnan(np.array(mass)[0, 1]).any()


def test_the_dispatcher_takes_the_kernel_where_there_is_metal(monkeypatch):
    monkeypatch.setattr(attention, "metal_digit_attention", lambda *_: "kernel")
    call = call_of(Case())
    assert isinstance(attention.digit_attention(*call)[0], str) is attention.metal.available()
    with installed():
        assert attention.digit_attention(*call) == "kernel"


@pytest.mark.parametrize("attend", BOTH)
def test_rows_that_do_not_fit_together_are_refused(attend):
    queries, sinks, packed, tail, scale, rows, _ = call_of(Case())
    other = call_of(Case(rows=(3, 12, 34)))[2]
    with pytest.raises(MismatchError, match=r"packed keys have \(3, 12, 33\) rows"):
        attend(queries, sinks, DigitRows(packed.keys, other.values), tail, scale, rows)
    for wrong in (0, 49):
        with pytest.raises(MismatchError, match=f"{wrong} of 48 newest"):
            attend(queries, sinks, packed, tail, scale, wrong)
    for short in (queries[:, :5], queries[..., :63], mx.repeat(queries, 2, axis=2)):
        with pytest.raises(MismatchError, match="do not fit"):
            attend(short, sinks, packed, tail, scale, rows)
    with pytest.raises(MismatchError, match="do not fit"):
        attend(queries, (sinks[0][:, :1], sinks[1]), packed, tail, scale, rows)


@pytest.mark.faults
@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("80 dims", "sizes[11], heads = kv_heads * GROUP", "GROUP, heads = kv_heads * GROUP + 1"),
        ("many heads", "GROUP - pass * HEADS)", "GROUP)"),
        ("80 dims", "batch = kv_row / kv_heads", "batch = kv_row % kv_heads"),
        ("96 and 64 dims", "lane / TOKENS % ROOM, uint(HEADS) - 1)", "lane / TOKENS % ROOM, 0u)"),
        ("many heads", "HEADS <= 4 ? 4 : 8", "2"),
        ("tiles", "(uint(sizes[b]) + TILE - 1) / TILE", "uint(sizes[b]) / TILE"),
        ("tiles", "from = width + (split - before) * sums", "from = width"),
        ("no digits", "k_first = k_digits;", "k_first = 0;"),
        ("80 dims", "v_first = v_digits;", "v_first = k_digits;"),
        ("80 dims", "kv_row) * k_most;", "kv_row) * 4 * k_width;"),
        ("smollm2", "kv_row) * v_most;", "kv_row) * v_most / 2;"),
        ("smollm2", "kv_row) * k_digits +", "0) * k_digits +"),
        ("smollm2", "kv_row) * v_digits +", "kv_row) * v_first +"),
        ("smollm2", "(bucket == 0 ? k_a : bucket == 1 ? k_b : k_c)", "(bucket == 0 ? k_a : k_c)"),
        ("smollm2", "(bucket == 0 ? v_scales_a : bucket == 1 ? v_scales_b : v_scales_c)", "(bucket == 0 ? v_scales_a : v_scales_b)"),
        ("80 dims", "kv_row) * all_tiles * D;", "kv_row) * D;"),
        ("80 dims", "kv_row) * rows * v_width;", "kv_row) * v_width;"),
        ("smollm2", "float(queries[row + d]) * scale[0] : 0.0f", "float(queries[row + d]) : 0.0f"),
        ("80 dims", "d = index % D, piece = index / D", "d = index / PIECES, piece = index % PIECES"),
        ("80 dims", "if (piece < PIECES) {", "if (piece <= PIECES) {"),
        ("smollm2", "c = piece; c < D; c += PIECES", "c = piece; c < D; c += PIECES + 1"),
        ("smollm2", "* D + c) * D + d]", "* D + d) * D + c]"),
        ("smollm2", "turning[h] * (scale[0] / UNIT)", "turning[h] * scale[0]"),
        ("smollm2", "sum = simd_sum(sum);\n    if (lane", "if (lane"),
        ("smollm2", "common[part] = sum * scale[0];", "common[part] = sum;"),
        ("smollm2", "k_mean[kv_row * D + i]", "k_mean[i]"),
        ("smollm2", "threadgroup_barrier(mem_flags::mem_threadgroup);\n  for (uint i = index; PIECES", "for (uint i = index; PIECES"),
        ("smollm2", "p = 1; p < PIECES; p++) {\n      sum += turned", "p = 2; p < PIECES; p++) {\n      sum += turned"),
        ("smollm2", "turned[at] = sum;\n  }\n  threadgroup_barrier(mem_flags::mem_threadgroup);", "turned[at] = sum;\n  }"),
        ("no rows yet", "LOGITS && raw && part == 0", "LOGITS && part == 0"),
        ("no rows yet", "top = metal::max(top, logit);", ""),
        ("no rows yet", "lane % TOKENS == 0 ? metal::exp(logit - top) : 0.0f", "metal::exp(logit - top)"),
        ("smollm2", "raw_blocks = sink_blocks + (tail_rows + TOKENS - 1) / TOKENS", "raw_blocks = sink_blocks + tail_rows / TOKENS"),
        ("96 and 64 dims", "sink_blocks = (sink_rows + TOKENS - 1) / TOKENS", "sink_blocks = sink_rows / TOKENS"),
        ("smollm2", "lane + i / 4 * 32, digit = i % 4 * k_width + byte", "lane + i / 4 * 32, digit = 4 * byte + i % 4"),
        ("80 dims", "if (byte < k_width) {", "if (byte <= k_width) {"),
        ("tiles", "k_scales[tile * D + channel]", "k_scales[channel]"),
        ("smollm2", "- 128.0f) * 0.125f", "- 127.0f) * 0.125f"),
        ("smollm2", "turned[h * TURN + channel]", "turned[h * TURN + digit]"),
        ("smollm2", "1.5f * float(1u << i % 4 * 2), middle[h]", "1.5f, middle[h]"),
        ("smollm2", "float sum = metal::simd_sum(middle[h]);", "float sum = middle[h];"),
        ("smollm2", "own_head == h ? common[h] - sum : low", "common[h] - sum"),
        ("tiles", "rows - metal::min(rows, tile * TILE)", "rows"),
        ("tiles", "(tile_rows + TOKENS - 1) / TOKENS;", "tile_rows / TOKENS;"),
        ("smollm2", "block += SIMD_GROUPS", "block += SIMD_GROUPS + 1"),
        ("smollm2", "block - sink_blocks : block)", "block : block)"),
        ("smollm2", "(sink ? sinks_k : tail_k)", "tail_k"),
        ("smollm2", "(sink ? sinks_v : tail_v)", "sinks_v"),
        ("smollm2", "(sink ? sink_rows : tail_room) * D;", "(sink ? sink_rows : tail_rows) * D;"),
        ("smollm2", "(sink ? sink_rows : tail_room) * DV;", "sink_rows * DV;"),
        ("96 and 64 dims", "metal::min(token + t, here - 1) * D;", "(token + t) * D;"),
        ("tiles", "metal::min(token + t, here - 1)) * k_width;", "(token + t)) * k_width;"),
        ("tiles", "(tile * TILE + metal::min(token + t, here - 1)) * v_width", "metal::min(token + t, here - 1) * v_width"),
        ("80 dims", "lane + 32 * j < k_width ?", "lane + 32 * j <= k_width ?"),
        ("80 dims", "lane + 32 * j < v_width ?", "true ?"),
        ("128 dims", "k_codes[row + lane + 32 * j]", "k_codes[row + lane]"),
        ("128 dims", "v_codes[row + lane + 32 * j]", "v_codes[row + lane]"),
        ("smollm2", "(3u << i % 4 * 2));\n#pragma clang loop unroll(full)\n          for (uint h = 0; h < HEADS; h++) {\n            score", "(15u << i % 4 * 2));\n#pragma clang loop unroll(full)\n          for (uint h = 0; h < HEADS; h++) {\n            score"),
        ("smollm2", "upper ? score[n] : score[n + far], far", "upper ? score[n + far] : score[n], far"),
        ("tiles", "other < 32; other *= 2", "other < 16; other *= 2"),
        ("smollm2", "own_score += low;", ""),
        ("tiles", "own_score = -INFINITY;", "own_score = 0.0f;"),
        ("many heads", "lane < TOKENS * count", "lane < TOKENS * HEADS"),
        ("smollm2", "raw && !sink && lane", "raw && lane"),
        ("smollm2", "stride + width + own_token", "stride + width + lane % TOKENS"),
        ("smollm2", "metal::max(own_score, metal::simd_shuffle_xor(own_score, 1))", "own_score"),
        ("smollm2", "metal::exp(top - most)", "1.0f"),
        ("smollm2", "total = total * keep + weight", "total = total + weight"),
        ("smollm2", "held = held * keep + weight", "held = held + weight"),
        ("smollm2", "metal::simd_shuffle(keep, h * TOKENS)", "keep"),
        ("smollm2", "metal::simd_shuffle(weight, h * TOKENS + t)", "metal::simd_shuffle(weight, h * TOKENS)"),
        ("smollm2", "sums[h][i] *= kept;", ""),
        ("smollm2", "held += metal::simd_shuffle_xor(held, 2);", ""),
        ("smollm2", "metal::simd_shuffle(held, h * TOKENS)", "held"),
        ("smollm2", "i % 4 * v_width + byte", "4 * byte + i % 4"),
        ("80 dims", "if (byte < v_width) {\n        uint at", "if (byte <= v_width) {\n        uint at"),
        ("tiles", "at = tile * DV + v_channels", "at = v_channels"),
        ("smollm2", "- next) * 0.125f", "- next) * 0.25f"),
        ("smollm2", "last ? float(v_counts[digit]) : 1.0f", "1.0f"),
        ("smollm2", "-1.5f * float(1u << i % 4 * 2)", "-1.5f"),
        ("smollm2", "total += metal::simd_shuffle_xor(total, 2);", ""),
        ("smollm2", "lane / TOKENS < HEADS)", "true)"),
        ("128 dims", "j < V_OWN; j += 4)", "j < 4; j += 4)"),
        ("smollm2", "threadgroup_barrier(mem_flags::mem_threadgroup);\n    float most = part_top[h]", "float most = part_top[h]"),
        ("smollm2", "sum += shares[p] * part_sum", "sum += part_sum"),
        ("smollm2", "merged += shares[p] *", "merged +="),
        ("many heads", "if (index < 128 && h < count)", "if (index < 128)"),
        ("smollm2", "uint i = j + index / 32,", "uint i = index % 4,"),
        ("128 dims", "byte = lane + j / 4 * 32, d", "byte = lane, d"),
        ("smollm2", "raw && i < V_PER && d < DV", "raw && d < DV"),
        ("smollm2", "index / 32 * v_width + byte", "4 * byte + index / 32"),
        ("smollm2", "index == 1 ? sum : most", "index == 0 ? sum : most"),
        ("smollm2", "threadgroup_barrier(mem_flags::mem_threadgroup);  // the next", "// the next"),
    ],
)  # fmt: skip
def test_a_planted_fault_is_found(name, old, new):
    with installed(("digit_attention", old, new)), pytest.raises((AssertionError, HostError)):
        check(CASES[name])


@pytest.mark.faults
@pytest.mark.parametrize(
    ("body", "old", "new"),
    [
        ("digit_attention", "(tiles + per - 1) / per", "tiles / per"),
        ("digit_attention", "tile = (split - before) * per;", "tile = split - before;"),
        ("digit_attention", "metal::min(tiles, tile + per)", "tile + per"),
        ("digit_attention", "held = 0.0f;\n    bool last", "bool last"),
        ("digit_attention", "last ? 128.0f : float(v_scales[at + DV])", "128.0f"),
        ("digit_attention", "float(v_scales[at + DV])", "float(v_scales[at])"),
        ("digit_attention_merge", "(GROUP + 1) * GROUP", "(GROUP + 2) * GROUP"),
        ("digit_attention_merge", "merges ? place / GROUP", "merges ? place"),
        ("digit_attention_merge", "127) / 128 + per - 1) / per", "127) / 128) / per"),
        ("digit_attention_merge", "4 * bytes[b] + 2);\n  most_digits", "4 * bytes[b] + 1);\n  most_digits"),
        ("digit_attention_merge", "h < (merges ? 1 : GROUP)", "h < 1"),
        ("digit_attention_merge", "total = lane == 0 ?", "total = true ?"),
        ("digit_attention_merge", "total = simd_sum(total);", ""),
        ("digit_attention_merge", "metal::exp(row[at] - top) * row[at + 1]", "row[at + 1]"),
        ("digit_attention_merge", "head_total[h] = total == 0.0f ? 1.0f : total;\n  }\n}\nthreadgroup_barrier(mem_flags::mem_threadgroup);", "head_total[h] = total == 0.0f ? 1.0f : total;\n  }\n}"),
        ("digit_attention_merge", "&& p < 4 * bytes[b]; s++", "; s++"),
        ("digit_attention_merge", "metal::exp(sums[4 * bytes[b]] - top), sums[p]", "1.0f, sums[p]"),
        ("digit_attention_merge", "digits[p] = sum;\n  }\n  threadgroup_barrier(mem_flags::mem_threadgroup);", "digits[p] = sum;\n  }"),
        ("digit_attention_merge", "head_total[0] - raw * row[DV + 1]", "head_total[0]"),
        ("digit_attention_merge", "* DV + d) * DV;", "* DV) * DV;"),
        ("digit_attention_merge", "directions[channels[p]]", "directions[p % DV]"),
        ("digit_attention_merge", "kv_row) * most_digits;", "kv_row) * most_digits / 2;"),
        ("digit_attention_merge", "simd_sum(sum) / UNIT", "simd_sum(sum)"),
        ("digit_attention_merge", "metal::fma(raw, row[d], sum)", "sum"),
        ("digit_attention_merge", "v_mean[kv_row * DV + d]", "v_mean[d]"),
        ("digit_attention_merge", "sum / head_total[0]", "sum"),
        ("digit_attention_merge", "- head_top[h]) / head_total[h]", "- head_top[h])"),
        ("digit_attention_merge", "stride + width + t]", "stride + width]"),
    ],
)  # fmt: skip
def test_a_fault_planted_in_tiles_and_the_merge_is_found(body, old, new):
    def check_both():
        check(CASES["tiles"], 3)
        check(CASES["80 dims"])

    with installed((body, old, new)), pytest.raises((AssertionError, HostError)):
        check_both()


@pytest.mark.faults
@pytest.mark.parametrize(
    ("body", "old", "new"),
    [
        ("digit_attention", "most = metal::max(most, part_top[p * HEADS + h]);", ""),
        ("digit_attention_merge", "top = simd_max(top);", ""),
    ],
)
def test_merging_around_less_than_the_largest_score_overflows(body, old, new):
    with installed((body, old, new)), pytest.raises((AssertionError, HostError)):
        check_large_scores()
