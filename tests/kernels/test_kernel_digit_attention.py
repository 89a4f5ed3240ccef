"""Attention over digits: the reference is MLX's attention over decoded rows, and two launches give the same."""

from contextlib import contextmanager
from typing import NamedTuple
from unittest.mock import patch

import mlx.core as mx
import numpy as np
import pytest
from kernel_checks import assert_same
from metal_host import installed

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
    queries, *rest = call_of(CASES["tiles"])
    call = (3e4 * queries, *rest)
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
