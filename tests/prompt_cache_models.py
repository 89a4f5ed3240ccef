"""Tiny models with exact weights, and prompt caches that a version of mlx-lm wrote of them, in tests/fixtures/prompt_caches.

This file needs mlx-lm alone, so that any version can run it: see tests/fixtures/prompt_caches/README.md.
"""

import copy
import sys
from functools import cache
from pathlib import Path

import mlx.core as mx
import mlx_lm
from mlx.utils import tree_map
from mlx_lm.models.cache import QuantizedKVCache, RotatingKVCache, make_prompt_cache, save_prompt_cache
from mlx_lm.utils import _get_classes
from zoo.configurations import CONFIGURATIONS

FOLDER = Path(__file__).parent / "fixtures" / "prompt_caches"
NEXT = (3, 5, 7)  # tokens that follow, one at a time; the logits after each are in the fixtures
_ONE = {"num_hidden_layers": 1, "num_key_value_heads": 1}
_LLAMA = {"sliding_window": None, "layer_types": None, **_ONE}
MODELS = {
    "llama": ("llama", {**_LLAMA, "head_dim": 8}),
    "bfloat16": ("llama", {**_LLAMA, "head_dim": 8}),
    "wide": ("llama", {**_LLAMA, "head_dim": 32}),
    "windows": ("llama", {"num_hidden_layers": 2, "num_key_value_heads": 1, "head_dim": 8}),
    "convolutions": (
        "lfm2",
        {
            "num_hidden_layers": 2,
            "num_key_value_heads": 1,
            "block_ff_dim": 64,
            "layer_types": ["conv", "full_attention"],
        },
    ),
    "recurrences": ("falcon_h1", {**_ONE}),
    # Whether the indexer's rotation is interleaved was no choice in 0.31: it was.
    "latents": ("deepseek_v32", {"num_hidden_layers": 1, "indexer_rope_interleave": True}),
    "chunks": ("llama4", {"num_key_value_heads": 1, "head_dim": 8, "attention_chunk_size": 256}),
}
# Of each file: its model, what takes the place of the model's own caches, and the lengths of the chunks of the prompt.
FILES = {
    "whole": ("llama", None, (21,)),
    "bfloat16": ("bfloat16", None, (21,)),
    "rotating": ("llama", lambda: RotatingKVCache(16, keep=4), (9, 1, 1)),
    "rotating-wrapped": ("llama", lambda: RotatingKVCache(16, keep=4), (20, 1, 1)),
    "quantized-8": ("wide", lambda: QuantizedKVCache(32, 8), (21,)),
    "quantized-4": ("wide", lambda: QuantizedKVCache(32, 4), (20, 1)),
    "window": ("windows", None, (8, 1)),
    "window-wrapped": ("windows", None, (20, 1, 1)),
    "convolutions": ("convolutions", None, (21,)),
    "recurrences": ("recurrences", None, (21,)),
    # Whether the indexer's rotation is interleaved was no choice in 0.31: it was.
    "latents": ("latents", None, (21,)),
    "chunks": ("chunks", None, (9,)),
    "chunks-past": ("chunks", None, (256, 40, 1)),
}


@cache
def exact_model(name):
    """A tiny model whose weights are multiples of 1/64, the same on every machine."""
    kind, changes = MODELS[name]
    config = {"model_type": kind, **copy.deepcopy(CONFIGURATIONS[kind])}
    inner = config.get("text_config", config)
    inner.update(changes)
    model_class, arguments = _get_classes(config)
    model = model_class(arguments.from_dict(config))
    model.update(tree_map(_exact, model.parameters()))
    if name == "bfloat16":
        model.set_dtype(mx.bfloat16)
    mx.eval(model.parameters())
    return model.eval()


def _exact(parameter):
    numbers = (mx.arange(parameter.size) * 37 % 101 - 50) / 64
    return numbers.reshape(parameter.shape).astype(parameter.dtype)


def tokens_of(name):
    """The prompt in a file."""
    return [number * 29 % 89 + 1 for number in range(sum(FILES[name][2]))]


def next_logits(model, caches):
    """What a model says after each of the next tokens, in float32."""
    return mx.concatenate([model(mx.array([[token]]), cache=caches)[:, -1] for token in NEXT]).astype(mx.float32)


def write(folder):
    """Write the files of this version of mlx-lm, and the logits with which it goes on."""
    folder.mkdir(parents=True)
    logits = {}
    for name, (kind, made, chunks) in FILES.items():
        model, tokens = exact_model(kind), tokens_of(name)
        caches = [made() for _ in model.layers] if made else make_prompt_cache(model)
        for length in chunks:
            mx.eval(model(mx.array([tokens[:length]]), cache=caches))
            tokens = tokens[length:]
        save_prompt_cache(str(folder / f"{name}.safetensors"), caches, {"model": f"exact/{kind}"})
        logits[name] = next_logits(model, caches)
    mx.savez(str(folder / "logits.npz"), **logits)


if __name__ == "__main__":
    write(Path(sys.argv[1]) / mlx_lm.__version__)
