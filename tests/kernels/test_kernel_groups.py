"""Coefficients to payload bytes and back: the reference is the documented format, every other path equals it."""

import mlx.core as mx
import numpy as np
import pytest
from metal_host import HostError, installed

from mlxkv.codec.stages.quantize import fit
from mlxkv.kernels import groups
from mlxkv.kernels.groups import BITS, Run

# Gaps, every kind, groups of one, a last byte that is not full; n = tokens decides whether bytes straddle components.
RUNS = [
    Run(0, 2, 16, "int4"),
    Run(32, 3, 1, "int2"),
    Run(40, 1, 16, "fp8"),
    Run(56, 5, 1, "int4"),
    Run(61, 1, 64, "int2"),
]
RANK = 130
ONE = [Run(0, 1, 1, "int4")]
TOKENS = [1, 3, 31, 32, 33, 100]


def values(rank, tokens, seed=0):
    random = np.random.default_rng(seed)
    return mx.array((random.standard_normal((rank, tokens)) * 4).astype(np.float32))


def sides(x, runs):
    """Shifts and scales `[groups, n]` of all runs."""
    fits = [fit(x[run.start : run.stop].reshape(run.count, run.size, -1), run.kind) for run in runs]
    return mx.concatenate([shift for shift, _ in fits]), mx.concatenate([scale for _, scale in fits])


def check_both_ways(x, runs=RUNS, shifts=None, scales=None):
    if shifts is None:
        shifts, scales = sides(x, runs)
    payload = groups.metal_pack(x, shifts, scales, runs)
    np.testing.assert_array_equal(np.array(payload), np.array(groups.reference_pack(x, shifts, scales, runs)))
    found = groups.metal_unpack(payload, runs, *x.shape)
    np.testing.assert_array_equal(np.array(found), np.array(groups.reference_unpack(payload, runs, *x.shape)))


def by_the_format(x, shifts, scales, runs):
    """The payload as docs/format.md has it, one code at a time."""
    out, group = bytearray(), 0
    for run in runs:
        shift, scale = (np.array(side[group : group + run.count]) for side in (shifts, scales))
        group += run.count
        for side in (shift, scale):
            raw = np.ascontiguousarray(side, "<f2").view(np.uint8).reshape(-1, 2)
            out += raw[:, 0].tobytes() + raw[:, 1].tobytes()
        part = mx.array(np.array(x)[run.start : run.stop].reshape(run.count, run.size, -1))
        codes = np.array(groups.to_codes(part, mx.array(shift), mx.array(scale), run.kind)).ravel()
        packed = sum(int(code) << (i * BITS[run.kind]) for i, code in enumerate(codes))
        out += packed.to_bytes(-(-codes.size * BITS[run.kind] // 8), "little")
    return bytes(out)


@pytest.mark.parametrize("tokens", TOKENS)
def test_the_reference_writes_the_documented_bytes(tokens):
    x = values(RANK, tokens)
    found = np.array(groups.reference_pack(x, *sides(x, RUNS), RUNS)).tobytes()
    assert found == by_the_format(x, *sides(x, RUNS), RUNS)
    assert len(found) == groups.payload_size(RUNS, tokens)


@pytest.mark.parametrize("tokens", TOKENS)
def test_unpacking_returns_the_codes_values_and_zero_where_nothing_is_coded(tokens):
    x = values(RANK, tokens)
    shifts, scales = sides(x, RUNS)
    found = groups.reference_unpack(groups.reference_pack(x, shifts, scales, RUNS), RUNS, *x.shape)
    coded, group = np.zeros(RANK, bool), 0
    for run in RUNS:
        side = slice(group, group + run.count)
        part = x[run.start : run.stop].reshape(run.count, run.size, tokens)
        codes = groups.to_codes(part, shifts[side], scales[side], run.kind)
        expected = groups.from_codes(codes, shifts[side], scales[side], run.kind).reshape(-1, tokens)
        np.testing.assert_array_equal(np.array(found[run.start : run.stop]), np.array(expected))
        coded[run.start : run.stop] = True
        group += run.count
    assert not np.array(found)[~coded].any()


def test_the_first_code_is_in_the_lowest_bits():
    zero, one = mx.zeros((1, 5), mx.float16), mx.ones((1, 5), mx.float16)
    for kind, codes, expected in [
        ("int2", [1, 2, 3, 0, 2], [0b00_11_10_01, 0b10]),
        ("int4", [1, 2, 15, 0, 7], [0x21, 0x0F, 7]),
    ]:
        x = mx.array([codes], dtype=mx.float32)
        assert np.array(groups.reference_pack(x, zero, one, [Run(0, 1, 1, kind)]))[20:].tolist() == expected


def test_nothing_coded_is_no_bytes_and_zeros():
    none = mx.zeros((0, 4), mx.float16)
    for pack, unpack in ((groups.reference_pack, groups.reference_unpack), (groups.metal_pack, groups.metal_unpack)):
        payload = pack(values(3, 4), none, none, [])
        assert (payload.dtype, payload.shape) == (mx.uint8, (0,))
        assert mx.array_equal(unpack(payload, [], 3, 4), mx.zeros((3, 4)))


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("runs", [RUNS, ONE], ids=["every kind", "one group of one"])
def test_the_bodies_are_identical_to_the_reference(kernel_path, tokens, runs):
    check_both_ways(values(RANK, tokens, seed=tokens), runs)


@pytest.mark.parametrize("kind", ["int2", "int4", "fp8"])
def test_the_bodies_round_ties_to_even_and_clip(kernel_path, kind):
    steps = np.concatenate(
        [np.arange(-3, 20, 0.5), [1e-30, -1e-30, 447.9, 448, 460, 500, -500, 2.0**-9, 1.5 * 2.0**-9]]
    )
    x = mx.array(steps[None].astype(np.float32))
    flat = mx.zeros((1, x.size), mx.float16)
    for scale in (1, 0, 0.5):  # 0 acts as 1
        check_both_ways(x, [Run(0, 1, 1, kind)], flat, flat + scale)


def test_the_body_encodes_e4m3_as_mlx_does(kernel_path):
    random = np.random.default_rng(0)
    bits = random.integers(0, 2**31, 20000).astype(np.uint32)
    bits[:8000] = (
        (bits[:8000] >> 20 << 20) + random.integers(-2, 3, 8000).astype(np.uint32) + np.uint32(1 << 19)
    )  # ties
    x = bits.view(np.float32)
    x = mx.array(np.where(np.isfinite(x), x, 0)[None])
    flat = mx.zeros((1, x.size), mx.float16)
    check_both_ways(
        mx.concatenate([x, -x], axis=1), [Run(0, 1, 1, "fp8")], *([mx.concatenate([flat, flat], axis=1)] * 2)
    )


def test_the_body_decodes_every_code_of_every_kind(kernel_path):
    payload = mx.concatenate([mx.zeros(1024, mx.uint8), mx.arange(256).astype(mx.uint8)])
    payload[512 + 256 : 512 + 512] = mx.array(0x3C, mx.uint8)  # scale 1
    for kind in ("int2", "int4", "fp8"):
        codes = payload[: 1024 + 256 * BITS[kind] // 8]
        found = groups.metal_unpack(codes, [Run(0, 1, 1, kind)], 1, 256)
        expected = groups.reference_unpack(codes, [Run(0, 1, 1, kind)], 1, 256)
        np.testing.assert_array_equal(np.array(found), np.array(expected))


def test_the_bodies_find_their_run_among_thousands(kernel_path):
    runs = [Run(2 * i, 1, 1, ("int2", "int4", "fp8")[i % 3]) for i in range(1500)]
    check_both_ways(values(3001, 2), runs)


FAULTS = {
    "run off by one": ("groups_pack", "runs[middle * 6]) <= byte", "runs[middle * 6]) < byte"),
    "round half up": ("groups_pack", "metal::rint(value)", "metal::floor(value + 0.5f)"),
    "no clip": ("groups_pack", "metal::clamp(metal::rint(value), 0.0f, float((1 << bits) - 1))", "metal::rint(value)"),
    "highest bits first": ("groups_pack", "rounded << (lane * bits)", "rounded << ((lanes - 1 - lane) * bits)"),
    "planes swapped": ("groups_pack", "8 * (plane & 1)", "8 * (1 - (plane & 1))"),
    "last byte reads on": ("groups_pack", "lane < lanes && code + lane < codes", "lane < lanes"),
    "division by a scale of 0": ("groups_pack", "(scale == 0.0f ? 1.0f : scale)", "scale"),
    "first group only": ("groups_pack", "(group + component / size)", "group"),
    "component off by one": ("groups_unpack", "runs[middle * 6 + 2]) <= component", "runs[middle * 6 + 2]) < component"),
    "gaps not zero": ("groups_unpack", "component >= start && component < start + count * size", "component >= start"),
    "wrong shift": ("groups_unpack", "(code % lanes * bits)", "(code % lanes * 2)"),
    "high byte of the scale": ("groups_unpack", "payload[at + 3 * side]", "payload[at + 2 * side]"),
    "fp8 ties away from even": ("common", "0x7ffff + odd", "0x80000"),
    "fp8 saturates too late": ("common", "0x43e00000", "0x43f00000"),
    "fp8 subnormals one step off": ("common", "0.001953125f", "0.00390625f"),
    "codes before their start": ("groups_unpack", "first + 4 * side + code", "first + 3 * side + code"),
}  # fmt: skip


def check_faulty():
    check_both_ways(values(RANK, 33))
    tie, flat = mx.array([[0.5, 1.5, 2.5, 3.5, 99]]), mx.zeros((1, 5), mx.float16)
    check_both_ways(tie, ONE, flat, mx.array([[1, 1, 1, 0, 1]], mx.float16))
    fp8, flat = mx.array([[1.0625, 1.1875, 449.0, 470.0, 2.0**-9, 0.0]]), mx.zeros((1, 6), mx.float16)
    check_both_ways(fp8, [Run(0, 1, 1, "fp8")], flat, flat + 1)


@pytest.mark.faults
@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_caught(fault):
    with installed(FAULTS[fault]), pytest.raises((AssertionError, HostError)):
        check_faulty()
