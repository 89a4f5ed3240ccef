"""How many bytes a live cache holds: worked out from a method's settings, and not from its code."""

import math

import pytest
from conftest import tiny_model, tiny_tokens
from mlx.utils import tree_flatten

from mlxkv.evaluate.variants import baseline, live_variant
from mlxkv.live import live_config
from mlxkv.live.base import cache_class_of, live_methods
from mlxkv.models import cache_spec

TOKENS = tiny_tokens(700)
BLOCK = 64  # tokens that are packed together
STEP = 256  # tokens by which the whole cache grows
EXACT = ["full", "int8", "int4", "kivi-2", "kivi-4", "h2o-256", "streaming-llm-256", "mp-kvm-256", "sketch-topk-256",
         "sketch-aggregate-256"]  # fmt: skip


def theory(model, name, tokens):
    """Bytes that `tokens` tokens should take, read in one go or in chunks; of smartkv the budget, which is a limit."""
    wide = max(parameter.dtype.size for _, parameter in tree_flatten(model.parameters()))
    config = live_config("full" if name == "whole" else name)
    slots = [slots for slots in cache_spec(model).layers if slots]
    return round(
        sum(
            layer_bytes(config, tokens, sum(slot.heads * slot.dim for slot in each), each[0].heads, wide)
            for each in slots
        )
    )


def layer_bytes(config, tokens, elements, heads, wide):
    """Bytes of one layer with so many elements a token and kv heads.

    Numbers kept for a token and head have 4 bytes, tokens kept as they are 2 an element, but in the whole cache, which
    takes them as the model gives them: `wide`.
    """
    method = live_methods.name_of(cache_class_of(config))
    if method.startswith("sketch"):
        return sketch_bytes(config, tokens, elements, heads)
    if method == "full":
        return math.ceil(tokens / STEP) * STEP * elements * wide
    if method == "smartkv":
        return config.budget * 2 * elements * tokens
    if method == "int4":  # keys in groups of 60 tokens, values of 128 elements, half of the elements each
        packed = max(0, tokens - config.sinks) // 60 * 60
        return elements * (packed * (4 / 8 + (4 / 60 + 4 / 128) / 2) + 2 * (tokens - packed))
    if method in ("int8", "kivi"):
        kivi = method == "kivi"
        bits, group, newest = (config.bits, config.group, config.recent + config.sinks) if kivi else (8, 64, 0)
        packed = max(0, tokens - newest) // BLOCK * BLOCK
        return elements * (packed * (bits / 8 + 4 / group) + 2 * (tokens - packed))
    if method == "streaming-llm":
        return 2 * elements * min(tokens, config.sinks + config.recent)
    if method == "h2o":
        return (2 * elements + 4 * heads) * min(tokens, config.heavy + config.recent)
    if method == "mp-kvm":
        left = max(0, tokens - config.recent) // config.flush * config.flush
        centroids, tail = min(left, config.centroids), tokens - left
        return 2 * elements * (centroids + tail) + 4 * heads * (3 * centroids + tail)
    raise ValueError(f"no theory of {method}")


def sketch_bytes(config, tokens, elements, heads):
    """Bytes of a sketch method's layer.

    Also of a sketch for each head, of a position for each heavy token and a count for each merged entry.
    """
    entries = getattr(config, "entries", 0)
    room = config.sinks + config.heavy + config.recent + config.interval + entries
    settled = 0 if tokens < room else (tokens - config.recent) // config.interval * config.interval
    heavy = min(settled, config.sinks + config.heavy)
    entries = entries if settled > heavy else 0
    kept = heavy + tokens - settled + entries
    return 2 * elements * kept + 4 * heads * (heavy + entries + config.depth * config.width)


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", head_dim=64, num_hidden_layers=1)


@pytest.mark.parametrize("tokens", [150, 700])
@pytest.mark.parametrize("preset", EXACT)
def test_theory_is_what_a_cache_holds(model, preset, tokens):
    held = live_variant(preset).build(model, TOKENS[:tokens])
    assert held.sizes["cache_bytes"] == theory(model, preset, tokens)


def test_theory_of_smartkv_is_its_budget_and_of_the_whole_cache_that_of_full(model):
    assert theory(model, "smartkv-0.3", 700) == round(0.3 * 2 * 700 * 2 * 2 * 64)
    assert theory(model, "whole", 700) == theory(model, "full", 700) == 768 * 2 * 2 * 64 * 4
    assert theory(model, "whole", 700) == baseline().build(model, TOKENS).sizes["cache_bytes"]
