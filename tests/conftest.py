"""Tiny random models of every supported architecture, one saved as a model directory, and SmolLM2 if installed."""

# isort: off
import mlxkv  # noqa: F401  # before mlx.core: it loads OpenBLAS

# isort: on
import json
import os
import signal
from importlib import import_module
from itertools import count
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten, tree_map

from mlxkv.errors import ModelNotFoundError

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if (
    signal.getsignal(signal.SIGINT) is signal.SIG_IGN
):  # in the background of a shell, which tests of Ctrl-C must not inherit
    signal.signal(signal.SIGINT, signal.default_int_handler)

_LAYERS = ["conv", "full_attention", "conv", "full_attention"]
_LLAMA = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-5,
    "vocab_size": 97,
    "rope_theta": 10000.0,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
}
_LFM2 = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 97,
    "max_position_embeddings": 1024,
    "norm_eps": 1e-5,
    "conv_bias": False,
    "conv_L_cache": 3,
    "layer_types": _LAYERS,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}

# config.json of each tiny model, keyed by mlx-lm model_type.
TINY = {
    "llama": _LLAMA,
    "qwen3": {**_LLAMA, "rope_theta": 1e6},
    "qwen3_moe": {**_LLAMA, **_EXPERTS, "decoder_sparse_step": 1, "mlp_only_layers": [0]},
    "lfm2": {
        **_LFM2,
        "block_dim": 64,
        "block_multiple_of": 32,
        "block_ffn_dim_multiplier": 1.0,
        "block_auto_adjust_ff_dim": False,
    },
    "lfm2_moe": {**_LFM2, **_EXPERTS, "use_expert_bias": True, "num_dense_layers": 1},
    "glm4_moe_lite": {
        "vocab_size": 97,
        "hidden_size": 64,
        "intermediate_size": 96,
        "moe_intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "kv_lora_rank": 16,
        "q_lora_rank": 32,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
        "max_position_embeddings": 1024,
    },
    "gpt2": {
        "n_ctx": 1024,
        "n_embd": 64,
        "n_head": 4,
        "n_layer": 2,
        "n_positions": 1024,
        "layer_norm_epsilon": 1e-5,
        "vocab_size": 97,
    },
}
DIFFERENT = ("glm4_moe_lite", "gpt2", "lfm2", "llama")  # the others' caches are like one of these


def pytest_collection_modifyitems(items):
    """Mark what `make test-fast` leaves out, besides what marks itself: kernels, benchmarks, the real model."""
    for item in items:
        room = item.path.parent.name
        if room == "kernels":
            item.add_marker("kernel")
        if room == "benchmarks" or "smollm2" in item.fixturenames:
            item.add_marker("slow")


@pytest.fixture(scope="session", autouse=True)
def libraries(tmp_path_factory):
    """Where tests keep artifacts, and never among the user's own: fixtures of a module in one library."""
    folder = tmp_path_factory.mktemp("libraries")
    os.environ["MLXKV_ARTIFACTS"] = str(folder / "shared")
    return map(str, map(folder.joinpath, map(str, count())))


@pytest.fixture(autouse=True)
def _a_library_of_its_own(libraries, monkeypatch):
    """Each test has an empty one, which does not exist yet."""
    monkeypatch.setenv("MLXKV_ARTIFACTS", next(libraries))


def tiny_config(name, **overrides):
    return {"model_type": name, **TINY[name], **overrides}


def tiny_model(name, *, seed=0, **overrides):
    """A random float32 model of this mlx-lm model_type; overrides replace entries of its config."""
    module, config = import_module(f"mlx_lm.models.{name}"), tiny_config(name, **overrides)
    return drawn_once(
        lambda: module.Model(module.ModelArgs.from_dict(config)), seed, repr(sorted(config.items())), _random_like
    )


_DRAWN = {}


def drawn_once(build, seed, key, draw, finish=lambda model: None):
    """A model with wide random weights, which are drawn once for each key: thousands of tests ask for the same few."""
    mx.random.seed(seed)  # biases keep a part of what the constructor draws
    model = build()
    if (seed, key) not in _DRAWN:
        mx.random.seed(seed)
        model.update(tree_map(draw, model.parameters()))
        finish(model)
        mx.eval(model.parameters())
        _DRAWN[seed, key] = tree_map(mx.array, model.parameters())
    own = tree_map(mx.array, _DRAWN[seed, key])  # one that is changed in place is of this model alone
    mx.eval(own)
    model.update(own)
    mx.random.seed(seed)  # what is drawn next does not depend on which test came first
    return model.eval()


def _random_like(parameter):
    # Wide weights: with mlx-lm's initial ones a tiny model hardly looks at its cache.
    noise = mx.random.normal(parameter.shape)
    if parameter.ndim == 1:
        return parameter + 0.1 * noise  # norm weights stay around 1, biases around 0
    fan_in = parameter.shape[-1] if parameter.shape[-1] > 1 else parameter.shape[-2]
    return 1.5 * fan_in**-0.5 * noise


def tiny_tokens(length, *, vocabulary=97, seed=1):
    """A list of random token ids."""
    return mx.random.randint(0, vocabulary, (length,), key=mx.random.key(seed)).tolist()


def save_model(model, config, path):
    """Write a model, its config and a byte-level tokenizer as a directory that `mlx_lm.load` reads."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")
    if len(fast) > config["vocab_size"]:
        raise ValueError(f"a byte-level tokenizer needs a vocabulary of {len(fast)}, got {config['vocab_size']}")
    fast.save_pretrained(path)
    mx.save_safetensors(str(path / "model.safetensors"), dict(tree_flatten(model.parameters())), {"format": "mlx"})
    (path / "config.json").write_text(json.dumps({"bos_token_id": None, "eos_token_id": fast.eos_token_id, **config}))
    return path


def run(*words):
    """Exit code of an mlxkv command line."""
    from mlxkv.cli import main

    with pytest.raises(SystemExit) as exit_info:
        main([str(word) for word in words])
    return exit_info.value.code or 0


@pytest.fixture
def says(capsys):
    """The JSON a successful command prints."""

    def call(*words):
        assert run(*words, "--json") == 0
        return json.loads(capsys.readouterr().out)

    return call


@pytest.fixture(params=sorted(TINY))
def tiny(request):
    """One tiny model of each architecture in turn."""
    return tiny_model(request.param)


@pytest.fixture(scope="session")
def model_dir(request, tmp_path_factory) -> Path:
    """A tiny model as a local mlx-lm directory: llama, or the name given by indirect parametrisation."""
    name = getattr(request, "param", "llama")
    return save_model(
        tiny_model(name, vocab_size=264), tiny_config(name, vocab_size=264), tmp_path_factory.mktemp(name)
    )


@pytest.fixture(scope="session")
def smollm2():
    """SmolLM2-135M-Instruct and its tokenizer."""
    from mlxkv.bundled.smollm2 import find_gguf
    from mlxkv.lm import load

    try:
        find_gguf()
    except ModelNotFoundError as error:
        pytest.skip(str(error))
    return load("smollm2-135m")


@pytest.fixture(params=["host", "metal"])
def kernel_path(request):
    """Kernels run on the host runner, then on Metal where there is Metal."""
    from metal_host import installed

    from mlxkv.kernels import metal

    if request.param == "host":
        with installed():
            yield "host"
    elif metal.available():
        yield "metal"
    else:
        pytest.skip("no Metal here")
