"""A fingerprint names all that decides what a model computes; files with the short one of earlier versions still open."""

import warnings
from dataclasses import dataclass, field, replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import TINY, tiny_model, tiny_tokens
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers

import mlxkv
from mlxkv import identity, lm
from mlxkv.codec.calibrate import calibrate
from mlxkv.codec.methods.kvtc import KVTCConfig
from mlxkv.codec.session import CacheCodec
from mlxkv.dump import write_dump
from mlxkv.errors import MismatchError, WeakFingerprintWarning
from mlxkv.identity import fingerprint, same_model

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}


def adapted(model, *, dora=False, layers=2, scale=20.0, keys=None):
    """The model with adapters on its linear layers, whose weights are not zero."""
    mx.random.seed(3)
    config = {"rank": 4, "scale": scale, "dropout": 0.0, **({"keys": keys} if keys else {})}
    linear_to_lora_layers(model, layers, config, use_dora=dora)
    for name, module in model.named_modules():
        if "lora_b" in module:
            module.lora_b = mx.random.normal(module.lora_b.shape, key=mx.random.key(len(name))) * 0.1
    return model.eval()


def change(model, name, where):
    """Add to one value of a parameter, in place."""
    parameter = dict(tree_flatten(model.parameters()))[name]
    parameter[where] = parameter[where] + 1


# What changes it


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_one_last_value_of_any_parameter_changes_it(dtype):
    model = tiny_model("llama", num_hidden_layers=1)
    model.set_dtype(getattr(mx, dtype))
    seen = {fingerprint(model)}
    parameters = tree_flatten(model.parameters())
    for name, value in parameters:
        change(model, name, tuple(n - 1 for n in value.shape))
        seen.add(fingerprint(model))
    assert len(seen) == len(parameters) + 1


def test_a_parameter_changed_in_place_from_its_second_row_on_changes_it():
    model = tiny_model("llama")
    before = fingerprint(model)
    weight = model.layers[0].self_attn.k_proj.weight
    weight[1:] += 1
    assert model.layers[0].self_attn.k_proj.weight is weight
    after = fingerprint(model)
    assert after != before
    assert after.partition(".")[0] == before.partition(".")[0], "64 values are one row: only the new part can tell"


@pytest.mark.parametrize("part", ["weight", "scales", "biases"])
def test_one_last_value_of_a_quantized_layer_changes_it(part):
    model = tiny_model("llama", hidden_size=128, intermediate_size=128)
    nn.quantize(model, group_size=32, bits=4)
    before = fingerprint(model)
    change(model, f"model.layers.1.mlp.up_proj.{part}", (-1, -1))
    assert fingerprint(model) != before


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("llama", {"rms_norm_eps": 1e-6}),
        ("llama", {"rope_theta": 5e5}),
        ("llama", {"rope_traditional": True}),
        ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
        ("qwen3", {"rope_scaling": YARN}),
        ("qwen3_moe", {"num_experts_per_tok": 1}),
        ("qwen3_moe", {"norm_topk_prob": False}),
        ("lfm2", {"norm_eps": 1e-6}),
        ("lfm2_moe", {"num_experts_per_tok": 1}),
        ("glm4_moe_lite", {"num_experts_per_tok": 1}),
        ("glm4_moe_lite", {"routed_scaling_factor": 1.5}),
        ("gpt2", {"layer_norm_epsilon": 1e-6}),
    ],
    ids=str,
)
def test_another_argument_changes_it(name, arguments):
    assert fingerprint(tiny_model(name, **arguments)) != fingerprint(tiny_model(name))


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_an_adapter_and_its_scale_change_it(dora):
    base = fingerprint(tiny_model("llama"))
    model = adapted(tiny_model("llama"), dora=dora)
    seen = {base, fingerprint(model)}
    for scale in (1.0, 0.0):
        model.layers[-1].self_attn.k_proj.scale = scale
        seen.add(fingerprint(model))
    assert len(seen) == 4


def test_the_scale_of_adapters_of_experts_and_embeddings_changes_it():
    from mlx_lm.tuner.lora import LoRAEmbedding

    model = adapted(tiny_model("qwen3_moe"))
    model.model.embed_tokens = LoRAEmbedding.from_base(model.model.embed_tokens)
    for module in (model.layers[1].mlp.switch_mlp.up_proj, model.model.embed_tokens):
        before = fingerprint(model)
        module.scale = 1.0
        assert fingerprint(model) != before


def test_how_words_are_read_as_weights_changes_it():
    model = tiny_model("llama", hidden_size=128)
    nn.quantize(model, group_size=32, bits=4)
    before = fingerprint(model)
    model.layers[0].self_attn.k_proj.mode = "mxfp4"
    assert fingerprint(model) != before


def test_an_epsilon_changed_in_a_live_model_changes_it():
    model = tiny_model("llama")
    before = fingerprint(model)
    model.layers[1].input_layernorm.eps = 1e-3
    assert fingerprint(model) != before


# What does not


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_it_is_of_the_values_and_not_of_the_type_that_holds_them(tiny, dtype):
    tiny.set_dtype(getattr(mx, dtype))
    narrow = fingerprint(tiny)
    tiny.set_dtype(mx.float32)
    assert fingerprint(tiny) == narrow


@pytest.mark.parametrize("name", sorted(TINY))
def test_the_same_model_made_twice_has_it_twice(name):
    assert fingerprint(tiny_model(name)) == fingerprint(tiny_model(name))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_pieces_and_the_order_in_memory_do_not_matter(dtype, monkeypatch):
    model = tiny_model("llama")
    model.set_dtype(getattr(mx, dtype))
    whole = fingerprint(model)
    weight = model.layers[0].self_attn.k_proj.weight
    model.layers[0].self_attn.k_proj.weight = mx.contiguous(weight.T).T
    monkeypatch.setattr(identity, "PIECE", 7)
    assert fingerprint(model) == whole


def test_an_argument_that_mlx_lm_adds_with_a_default_does_not_matter():
    @dataclass
    class Before:
        eps: float = 1e-5
        rope: dict = field(default_factory=dict)

    @dataclass
    class After(Before):
        windows: int = 0
        names: list = field(default_factory=list)

    model = nn.Linear(4, 4)
    found = []
    for arguments in (Before(), After(), After(windows=1), After(rope={"theta": 2}), After(rope={"theta": 2.0})):
        model.args = arguments
        found.append(fingerprint(model))
    assert found[0] == found[1] != found[2]
    assert found[3] == found[4] not in found[:3]


def test_arguments_within_arguments_matter():
    @dataclass
    class Text:
        heads: int = 2

    @dataclass
    class Whole:
        text_config: object

    model, found = nn.Linear(4, 4), set()
    for config in (Text(), Text(heads=3), {"heads": 2}, {"heads": [2, 3]}):
        model.args = Whole(config)
        found.add(fingerprint(model))
    assert len(found) == 4


# Comparing


@pytest.mark.parametrize(
    ("found", "stated", "same", "weak"),
    [
        ("0a.1", "0a.1", True, False),
        ("0a.1", "0a.2", False, False),
        ("0a.1", "0b.1", False, False),
        ("0a", "0a.1", True, True),
        ("0a.1", "0a", True, True),
        ("0a", "0a", True, True),
        ("0a", "0b.1", False, False),
        ("", "", True, False),
        ("", "0a.1", False, False),
        ("0a.1", "", False, False),
    ],
)
def test_an_old_fingerprint_is_compared_by_what_it_says_with_a_warning(found, stated, same, weak):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert same_model(found, stated) == same
    assert [w.category for w in said] == [WeakFingerprintWarning] * weak


def test_the_first_part_is_the_fingerprint_of_earlier_versions():
    first, _, last = fingerprint(tiny_model("llama", num_hidden_layers=1)).partition(".")
    assert (len(first), len(last)) == (16, 32)
    digest = identity.blake2b(digest_size=8)  # the rule of 0.1.0, written out
    for name, value in sorted(tree_flatten(tiny_model("llama", num_hidden_layers=1).parameters())):
        digest.update(f"{name} {value.shape} ".encode() + np.array(value.reshape(-1)[:64]).tobytes())
    assert digest.hexdigest() == first


# Everywhere


def foreign(name):
    """A model that the first 64 values of every weight do not tell from tiny_model(name), and what is foreign in it."""
    weights = tiny_model("llama")
    weights.layers[0].self_attn.k_proj.weight[1:] += 1
    return {
        "weights": weights,
        "arguments": tiny_model("llama", rms_norm_eps=1e-3),
    }[name]


FOREIGN = ["weights", "arguments"]


@pytest.fixture(scope="module")
def codec(tmp_path_factory):
    """A codec for the tiny llama."""
    folder = tmp_path_factory.mktemp("calibration")
    for seed in range(2):
        write_dump(folder / f"{seed}.npz", lm.dump(tiny_model("llama"), tiny_tokens(150, seed=seed)))
    return CacheCodec(calibrate([folder / "0.npz", folder / "1.npz"], KVTCConfig(compression_ratio=4)), recent=20)


@pytest.mark.parametrize("what", FOREIGN)
def test_a_dump_of_a_foreign_model_is_refused_by_restore_codec_append_and_calibration(what, codec, tmp_path):
    own, other = tiny_model("llama"), foreign(what)
    mine, theirs = (lm.dump(model, tiny_tokens(150)) for model in (own, other))
    for model, dump in ((own, theirs), (other, mine)):
        with pytest.raises(MismatchError, match="fingerprint"):
            lm.restore(model, dump)
    with pytest.raises(MismatchError, match="the artifacts of"):
        codec.compress_dump(theirs)
    with pytest.raises(MismatchError, match="fingerprint"):
        lm.restore(other, codec.decompress_dump(codec.compress_dump(mine)))
    (tmp_path / "file.mlxkv").write_bytes(codec.compress_dump(mine))
    with pytest.raises(MismatchError):
        codec.append_dump(tmp_path / "file.mlxkv", theirs)
    for name, dump in (("a.npz", mine), ("b.npz", theirs)):
        write_dump(tmp_path / name, dump)
    with pytest.raises(MismatchError, match="was dumped from"):
        calibrate([tmp_path / "a.npz", tmp_path / "b.npz"], KVTCConfig(compression_ratio=4))


@pytest.mark.parametrize("what", FOREIGN)
def test_a_live_cache_of_a_foreign_model_is_refused(what, tmp_path):
    own = tiny_model("llama")
    caches = mlxkv.make_cache(own, "int8")
    lm.prefill(own, tiny_tokens(40), caches)
    mlxkv.save_cache(tmp_path / "live.cache", own, caches)
    with pytest.raises(MismatchError):
        mlxkv.load_cache(tmp_path / "live.cache", foreign(what))


def test_a_dump_made_with_another_scale_of_an_adapter_is_refused():
    model = adapted(tiny_model("llama"))
    taken = lm.dump(model, tiny_tokens(20))
    model.layers[0].self_attn.k_proj.scale = 1.0
    with pytest.raises(MismatchError, match="fingerprint"):
        lm.restore(model, taken)


def old(dump):
    """The dump as an earlier version made it."""
    return replace(dump, fingerprint=dump.fingerprint.partition(".")[0])


def test_an_old_dump_is_restored_with_a_warning():
    model = tiny_model("llama")
    with pytest.warns(WeakFingerprintWarning, match="first 64 values of every weight"):
        lm.restore(model, old(lm.dump(model, tiny_tokens(20))))


def test_an_old_dump_and_a_full_one_calibrate_together_with_a_warning(tmp_path):
    for name, make in (("a.npz", lambda dump: dump), ("b.npz", old)):
        write_dump(tmp_path / name, make(lm.dump(tiny_model("llama"), tiny_tokens(150))))
    with pytest.warns(WeakFingerprintWarning):
        calibrate([tmp_path / "a.npz", tmp_path / "b.npz"], KVTCConfig(compression_ratio=4))


def test_an_old_file_grows_and_stays_as_unsure_of_its_model_as_it_was(codec, tmp_path):
    model, tokens, file = tiny_model("llama"), tiny_tokens(150), tmp_path / "file.mlxkv"
    with pytest.warns(WeakFingerprintWarning):
        file.write_bytes(codec.compress_dump(old(lm.dump(model, tokens[:100]))))
    longer = lm.dump(model, tokens)
    with pytest.warns(WeakFingerprintWarning):
        codec.append_dump(file, longer)
    again = codec.decompress_dump(file)
    assert again.length == 150
    assert again.fingerprint == old(longer).fingerprint
