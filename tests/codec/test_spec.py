import json
import math

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.rope_utils import initialize_rope

from mlxkv.dump import KVDump
from mlxkv.errors import FormatError, MismatchError, UnsupportedError
from mlxkv.models import read_rope
from mlxkv.spec import CacheSpec, Layer, Rope, Slot

INF = float("inf")
TABLE = tuple(10000.0 ** (i / 8) * 1.7 for i in range(8))

ROPES = {
    "halves": Rope(16, base=10000.0),
    "neighbours": Rope(16, base=10000.0, traditional=True),
    "linear": Rope(16, base=10000.0, scale=0.25),
    "table": Rope(16, freqs=TABLE),
    "table of neighbours": Rope(16, freqs=TABLE, traditional=True),
    "partial": Rope(8, base=500000.0),
    "inside the head": Rope(8, offset=8, base=10000.0, traditional=True),
    "inside, dims on both sides": Rope(4, offset=6, freqs=TABLE[:2]),
    "gain": Rope(16, freqs=TABLE, gain=1.19),
    "gain below one": Rope(8, offset=4, freqs=TABLE[:4], gain=0.5),
    "infinite periods": Rope(16, freqs=(*TABLE[:3], INF, INF, INF, INF, INF)),
}

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LONG = {"rope_type": "longrope", "original_max_position_embeddings": 64, "short_factor": [1.0] * 8,
        "long_factor": [1.0 + 0.3 * i for i in range(8)]}  # fmt: skip

MODULES = {
    "default": (16, False, None),
    "default, neighbours": (16, True, None),
    "default, partial": (8, False, None),
    "linear": (16, False, {"rope_type": "linear", "factor": 4.0}),
    "llama3": (16, False, LLAMA3),
    "yarn": (16, False, YARN),
    "yarn, neighbours, partial": (8, True, YARN),
    "yarn with both mscales": (16, False, {**YARN, "mscale": 1.0, "mscale_all_dim": 0.5}),
    "longrope": (16, False, LONG),
    "proportional": (16, False, {"rope_type": "proportional", "partial_rotary_factor": 0.25, "factor": 2.0}),
}


def random_heads(shape=(2, 3, 7, 16), seed=0):
    return mx.array(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def largest_difference(a, b):
    return float(mx.abs(a - b).max())


@pytest.mark.parametrize("start", [0, 5000])
@pytest.mark.parametrize("name", ROPES)
def test_unrotate_inverts_rotate(name, start):
    x = random_heads()
    rotated = ROPES[name].rotate(x, start)
    assert largest_difference(rotated, x) > 0.1
    assert largest_difference(ROPES[name].unrotate(rotated, start), x) < 2e-6


@pytest.mark.parametrize("start", [0, 5000])
@pytest.mark.parametrize("traditional", [True, False])
def test_unrotate_inverts_mlx_rope_itself(traditional, start):
    x = random_heads()
    rotated = mx.fast.rope(x, 16, traditional=traditional, base=10000.0, scale=1.0, offset=start)
    rope = Rope(16, base=10000.0, traditional=traditional)
    assert largest_difference(rope.unrotate(rotated, start), x) < 2e-6


def test_the_start_position_matters():
    x = random_heads()
    rope = ROPES["halves"]
    assert largest_difference(rope.rotate(x, 5), rope.rotate(x, 6)) > 0.1
    assert largest_difference(rope.rotate(x, 3)[:, :, 2:], rope.rotate(x[:, :, 2:], 5)) < 1e-6


def test_only_the_described_dims_turn():
    x = random_heads()
    turned = ROPES["inside, dims on both sides"].rotate(x, 9)
    assert mx.array_equal(turned[..., :6], x[..., :6])
    assert mx.array_equal(turned[..., 10:], x[..., 10:])
    assert largest_difference(turned[..., 6:10], x[..., 6:10]) > 0.1


def test_infinite_periods_do_not_turn():
    x = random_heads()
    turned = ROPES["infinite periods"].rotate(x, 5000)
    assert mx.array_equal(turned[..., 3:8], x[..., 3:8])
    assert mx.array_equal(turned[..., 11:], x[..., 11:])


@pytest.mark.parametrize("start", [0, 77])
@pytest.mark.parametrize("name", MODULES)
def test_rotate_equals_the_rope_of_mlx_lm(name, start):
    dims, traditional, config = MODULES[name]
    module = initialize_rope(dims, 10000.0, traditional, config, max_position_embeddings=256)
    x = random_heads(seed=1)
    assert mx.array_equal(read_rope(module).rotate(x, start), module(x, offset=start))


@pytest.mark.parametrize("name", MODULES)
def test_a_rope_read_from_mlx_lm_survives_json(name):
    dims, traditional, config = MODULES[name]
    rope = read_rope(initialize_rope(dims, 10000.0, traditional, config, max_position_embeddings=256))
    assert Rope.from_json(json.loads(json.dumps(rope.to_json(), allow_nan=False))) == rope


def test_a_gain_is_read_from_yarn_and_longrope():
    yarn = read_rope(initialize_rope(16, 10000.0, False, YARN, 256))
    longrope = read_rope(initialize_rope(16, 10000.0, False, LONG, 256))
    assert yarn.gain == pytest.approx(0.1 * math.log(4.0) + 1.0)
    assert longrope.gain == pytest.approx(math.sqrt(1 + math.log(4) / math.log(64)))


def test_dynamic_ntk_is_refused():
    module = initialize_rope(16, 10000.0, False, {"rope_type": "dynamic", "factor": 2.0}, 256)
    with pytest.raises(UnsupportedError, match="DynamicNTK"):
        read_rope(module)


@pytest.mark.parametrize(
    "fields",
    [
        {"dims": 0, "base": 1e4},
        {"dims": 7, "base": 1e4},
        {"dims": -4, "base": 1e4},
        {"dims": 8, "base": 1e4, "offset": -1},
        {"dims": 8},
        {"dims": 8, "base": 1e4, "freqs": (1.0,) * 4},
        {"dims": 8, "freqs": (1.0,) * 3},
        {"dims": 8, "base": 1e4, "scale": 0.0},
        {"dims": 8, "base": 1e4, "gain": -1.0},
        {"dims": 8, "base": 1e4, "gain": float("nan")},
        {"dims": 8.0, "base": 1e4},
        {"dims": True, "base": 1e4},
        {"dims": 8, "base": "10000"},
        {"dims": 8, "base": 0.0},
        {"dims": 8, "base": INF},
        {"dims": 8, "freqs": (1.0, 2.0, 0.0, 3.0)},
        {"dims": 8, "freqs": (1.0, 2.0, float("nan"), 3.0)},
        {"dims": 8, "base": 1e4, "scale": INF},
    ],
)
def test_an_impossible_rope_is_refused(fields):
    with pytest.raises(FormatError):
        Rope(**fields)


def test_a_slot_cannot_turn_more_dims_than_it_has():
    with pytest.raises(FormatError, match="past its 8 dims"):
        Slot("keys", 2, 8, Rope(8, offset=2, base=1e4))
    with pytest.raises(FormatError, match="heads"):
        Slot("keys", 0, 8)
    with pytest.raises(FormatError, match="dim"):
        Slot("keys", 1, -1)


def dual(rope=ROPES["halves"], layers=3):
    return CacheSpec("toy", ((Slot("keys", 2, 16, rope), Slot("values", 4, 8)),) * layers)


PE = Rope(8, base=1e4, traditional=True)


def latent(rope=PE):
    return CacheSpec("mla", ((Slot("latent", 1, 12), Slot("k_pe", 1, 8, rope)),) * 2, "single_stream")


def test_streams_of_keys_and_values():
    spec = dual()
    k, v = spec.stream("k"), spec.stream("v")
    assert (k.layers, k.heads, k.dim, k.width, k.ropes) == (3, 2, 16, 96, (ROPES["halves"],) * 3)
    assert (v.layers, v.heads, v.dim, v.width, v.ropes) == (3, 4, 8, 96, (None,) * 3)


def test_a_single_stream_joins_the_slots_and_moves_the_rope():
    k, v = latent().stream("k"), latent().stream("v")
    assert (k.heads, k.dim, k.width) == (1, 20, 40)
    assert k.ropes == (Rope(8, offset=12, base=1e4, traditional=True),) * 2
    assert (v.layers, v.heads, v.dim, v.width) == (2, 1, 0, 0)


def test_the_moved_rope_turns_the_joined_slots_as_the_model_does():
    part, rope = random_heads((1, 1, 5, 8)), Rope(8, base=1e4, traditional=True)
    rest = random_heads((1, 1, 5, 12), seed=3)
    joined = latent(rope).stream("k").ropes[0].rotate(mx.concatenate([rest, part], axis=-1), 40)
    assert mx.array_equal(joined, mx.concatenate([rest, rope.rotate(part, 40)], axis=-1))


def test_a_single_stream_with_two_ropes_is_refused():
    rope = Rope(8, base=1e4)
    spec = CacheSpec("mla", ((Slot("a", 1, 8, rope), Slot("b", 1, 8, rope)),), "single_stream")
    with pytest.raises(UnsupportedError, match="only one"):
        spec.stream("k")


def test_layers_of_different_shapes_are_groups_of_their_own_and_the_commonest_is_the_main_one():
    pair, wide = (Slot("keys", 2, 16), Slot("values", 2, 16)), (Slot("keys", 2, 16), Slot("values", 2, 32))
    spec = CacheSpec("toy", (wide, None, pair, Layer(*pair, window=8), pair, Layer(*pair, window=8)))
    assert [group.indices for group in spec.groups] == [(2, 4), (0,), (3, 5)]
    assert [group.window for group in spec.groups] == [None, None, 8]
    assert (spec.attention_layers, spec.window_layers) == ((0, 2, 4), (3, 5))
    assert spec.stream("v").width == 2 * 2 * 16
    assert spec.groups[1].stream("v").width == 2 * 32


def test_windows_are_the_main_group_only_where_no_layer_keeps_all_tokens():
    pair = Slot("keys", 2, 16), Slot("values", 2, 16)
    assert CacheSpec("toy", (Layer(*pair, window=8),) * 3).groups[0].window == 8
    assert CacheSpec("toy", (*(Layer(*pair, window=8),) * 3, pair)).groups[0].window is None


def test_layers_of_latents_beside_layers_of_keys_survive_json():
    latent = Layer(Slot("latent", 1, 12), Slot("k_pe", 1, 8), latent=True)
    spec = CacheSpec("toy", (latent, latent, (Slot("keys", 2, 8), Slot("values", 2, 8)), Layer(*latent, window=4)))
    assert spec.mode == "single_stream"
    again = CacheSpec.from_json(json.loads(json.dumps(spec.to_json())))
    assert again == spec
    assert [group.latent for group in again.groups] == [True, False, False]


def test_how_a_model_uses_a_cache_is_no_part_of_what_a_file_is_compared_by():
    pair = Slot("keys", 2, 16), Slot("values", 2, 16)
    fetched = CacheSpec("toy", (Layer(*pair, use="fetch", selects=True),))
    assert fetched == CacheSpec("toy", (pair,))
    assert fetched.to_json() == CacheSpec("toy", (pair,)).to_json()


@pytest.mark.parametrize(
    "more", [{"window": 0}, {"window": True}, {"latent": 1}, {"ring": 4}, [], "window", {"window": 2**40}]
)
def test_a_layer_of_a_file_that_is_described_wrongly_is_refused(more):
    data = CacheSpec("toy", ((Slot("keys", 1, 16), Slot("values", 1, 16)),)).to_json()
    data["kinds"][0].append(more)
    if more == []:
        data["kinds"][0].append({})
    with pytest.raises(FormatError):
        CacheSpec.from_json(data)


def test_a_model_without_caching_layers_is_refused():
    with pytest.raises(UnsupportedError, match="no layer"):
        CacheSpec("toy", (None, None))


def test_an_unknown_mode_is_refused():
    with pytest.raises(FormatError, match="triple_stream"):
        CacheSpec("toy", dual().layers, "triple_stream")


@pytest.mark.parametrize("rope", [None, *ROPES.values()], ids=["none", *ROPES])
def test_a_spec_survives_json(rope):
    spec = CacheSpec("toy", (None, *dual(rope).layers, None, (Slot("keys", 2, 16), Slot("values", 4, 8))))
    again = CacheSpec.from_json(json.loads(json.dumps(spec.to_json(), allow_nan=False)))
    assert again == spec
    assert again.attention_layers == (1, 2, 3, 5)


def test_a_single_stream_spec_survives_json():
    again = CacheSpec.from_json(json.loads(json.dumps(latent().to_json())))
    assert again == latent()
    assert again.stream("k") == latent().stream("k")


def edited(**changes):
    return {**json.loads(json.dumps(dual().to_json())), **changes}


SLOT = {"name": "keys", "heads": 2, "dim": 16, "rope": None}


@pytest.mark.parametrize(
    "data",
    [
        {},
        [],
        None,
        edited(kinds=7),
        edited(kinds=[[SLOT]]),
        edited(kinds=[[SLOT, SLOT, SLOT]]),
        edited(kinds=[[SLOT, {**SLOT, "rope": {"dims": 4}}]]),
        edited(kinds=[[SLOT, {**SLOT, "rope": {"dims": 4, "base": 1.0, "unknown": 1}}]]),
        edited(kinds=[[SLOT, {**SLOT, "rope": 3}]]),
        edited(kinds=[[SLOT, {**SLOT, "heads": INF}]]),
        edited(kinds=[[SLOT, {**SLOT, "heads": 2.5}]]),
        edited(kinds=[[SLOT, {**SLOT, "heads": "2"}]]),
        edited(kinds=[[SLOT, {"name": "values"}]]),
        edited(layers=[0, 1]),
        edited(layers=[-1]),
        edited(layers=[True]),
        edited(layers=[0.0]),
        edited(layers="00"),
        edited(mode="none"),
        edited(mode=[]),
    ],
)
def test_a_hostile_description_is_refused(data):
    with pytest.raises(FormatError):
        CacheSpec.from_json(data)


def test_a_dump_checks_its_shapes():
    tokens = np.zeros((2, 5), np.int32)
    k, v = np.zeros((3, 2, 2, 5, 16), np.float16), np.zeros((3, 2, 4, 5, 8), np.float16)
    dump = KVDump(k, v, dual(), tokens)
    assert (dump.length, dump.fp16_bytes) == (5, 2 * (k.size + v.size))
    for wrong in [
        (k[:2], v, tokens),
        (k, v[..., :4], tokens),
        (k, v, tokens[:1]),
        (k, v, tokens[:, :4]),
        (k, v, tokens[0]),
    ]:
        with pytest.raises(MismatchError):
            KVDump(wrong[0], wrong[1], dual(), wrong[2])
