"""Layers to token rows and back, turned by every kind of rope: the reference is exact, every other path equals it."""

import mlx.core as mx
import numpy as np
import pytest
from kernel_checks import assert_same
from metal_host import HostError, installed

from mlxkv.kernels import rows
from mlxkv.spec import Rope

ROPES = {
    "halves": Rope(64, base=1e4),
    "pairs": Rope(64, base=1e6, traditional=True),
    "the last dims, in pairs": Rope(16, offset=48, base=1e6, traditional=True),
    "middle dims, scaled": Rope(32, offset=16, base=1e5, gain=1.3, scale=0.25),
    "a table of periods": Rope(64, freqs=tuple(1.0 + 3 * np.arange(32))),
}
KINDS = [ROPES["halves"], None, ROPES["middle dims, scaled"]]  # as in a model whose layers differ
SHAPES = [(1, 1, 1, 1), (2, 1, 3, 31), (1, 3, 2, 32), (3, 2, 1, 33), (8, 1, 1, 4), (2, 1, 1, 0)]  # L, B, H, T


def layers(shape, dim=64, dtype=mx.float32, seed=0):
    random = np.random.default_rng(seed).standard_normal((*shape, dim)).astype(np.float32)
    return mx.array(random).astype(dtype)


def turn_of(ropes, x, start=77, inverse=True):
    return rows.rotation_table(
        [ropes[i % len(ropes)] for i in range(x.shape[0])], x.shape[-1], start, x.shape[3], inverse
    )


def check_both_ways(x, turn, dtype=mx.float32):
    found = rows.metal_to_rows(x, turn)
    assert_same(found, rows.reference_to_rows(x, turn))
    assert_same(
        rows.metal_from_rows(found, x.shape, turn, dtype), rows.reference_from_rows(found, x.shape, turn, dtype)
    )


@pytest.mark.parametrize("name", ROPES)
@pytest.mark.parametrize("inverse", [False, True])
def test_the_reference_turns_as_the_models_rope_does(name, inverse):
    rope, x = ROPES[name], layers((2, 1, 3, 33))
    turned = (rope.unrotate if inverse else rope.rotate)(x.reshape(2, 3, 33, 64), 77)
    expected = np.array(turned).reshape(2, 3, 33, 64).transpose(2, 0, 1, 3).reshape(33, -1)
    found = np.array(rows.reference_to_rows(x, turn_of([rope], x, inverse=inverse)))
    if rope.gain == 1:
        assert np.array_equal(found, expected)
    else:
        np.testing.assert_allclose(found, expected, atol=2e-6)


def test_angles_far_into_a_long_cache_are_the_models_own():
    x = layers((1, 1, 1, 5))
    turned = ROPES["halves"].unrotate(x[0], 1_000_003)
    assert np.array_equal(rows.reference_to_rows(x, turn_of(KINDS, x, 1_000_003)), np.array(turned).reshape(5, 64))


def test_the_reference_puts_elements_where_the_layout_says():
    x = mx.arange(2 * 3 * 4 * 5 * 6, dtype=mx.float32).reshape(2, 3, 4, 5, 6)
    found, plain = np.array(rows.reference_to_rows(x, None)), np.array(x)
    for layer, batch, head, token in [(0, 0, 0, 0), (1, 2, 3, 4), (1, 0, 2, 3), (0, 2, 1, 1)]:
        part = found[batch * 5 + token].reshape(2, 4, 6)[layer, head]
        assert np.array_equal(part, plain[layer, batch, head, token])
    assert mx.array_equal(rows.reference_from_rows(mx.array(found), x.shape, None, mx.float32), x)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_turning_there_and_back_returns_the_layers(shape, dtype):
    x = layers(shape, dtype=dtype)
    there = rows.to_rows(x, turn_of(KINDS, x, inverse=True))
    assert_same(rows.from_rows(there, x.shape, turn_of(KINDS, x, inverse=False), dtype), x)


def test_layers_without_rope_need_no_turn():
    assert rows.rotation_table([None, None], 8, 0, 4, inverse=True) is None


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_the_body_is_bit_identical_to_the_reference(kernel_path, shape, dtype):
    x = layers(shape, dtype=dtype)
    turn = turn_of(KINDS, x)
    found = rows.metal_to_rows(x, turn)
    assert mx.array_equal(found, rows.reference_to_rows(x, turn))
    back = rows.metal_from_rows(found, x.shape, turn, dtype)
    assert back.dtype == dtype
    assert mx.array_equal(back, rows.reference_from_rows(found, x.shape, turn, dtype))


@pytest.mark.parametrize("name", ROPES)
def test_the_body_knows_every_kind_of_rope(kernel_path, name):
    x = layers((2, 1, 2, 5))
    check_both_ways(x, turn_of([ROPES[name]], x))


@pytest.mark.parametrize("dim", [2, 6, 80, 576])
def test_the_body_takes_any_head_dim(kernel_path, dim):
    x = layers((2, 1, 2, 7), dim)
    check_both_ways(x, turn_of([Rope(2, base=1e4), None], x), mx.float16)


FAULTS = {
    "off by one token": ("(kind * tokens + t) * dim", "(kind * tokens + t + 1) * dim"),
    "heads and layers swapped": ("* layers + layer) * heads + head)", "* heads + head) * layers + layer)"),
    "the wrong head": ("line / heads % batches", "line / batches % heads"),
    "another layer's kind": ("table[layer]", "table[0]"),
    "the partner's own index": ("x[from + partners[kind * dim + d]]", "x[from + d + 0 * partners[d]]"),
    "first kind's partners": ("partners[kind * dim + d]", "partners[d]"),
    "turned the wrong way": ("own + other", "own - other"),
    "written past the row": ("turned[to + d]", "turned[to + d + 1]"),
    "always to rows": ("TO_ROWS ? in_layers : in_rows", "in_layers"),
}


@pytest.mark.faults
@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_caught(fault):
    x = layers((3, 3, 2, 5))
    with installed(("rows", *FAULTS[fault])), pytest.raises((AssertionError, HostError)):
        check_both_ways(x, turn_of(KINDS, x))
