"""Sensitivity of a model's predictions to its cache: the Fisher information of cached keys and values.

The Kullback-Leibler divergence to the untouched cache is 1/2 e' F e for a small error e, where F = E[g g'] and g is the
gradient of the loss of labels that the model itself draws (the true Fisher; Kunstner et al., arXiv 1905.12558). A text is
split the way a cache is used: its first part is the cached context, and the rest is predicted from it. Errors in the cache
appear after the context was computed, so the gradient flows through the predicted part alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from mlxkv import lm
from mlxkv.errors import InputError
from mlxkv.models import cache_spec
from mlxkv.spec import STREAMS, CacheSpec, Layer

CONTEXT_TOKENS, PREDICTED_TOKENS = 512, 160  # of each stretch of text
# Sinks and the newest quarter of the context: codecs keep both as they are, and they matter several times as much.
SKIPPED_SINKS, SKIPPED_RECENT_DIVISOR = 4, 4
Progress = Callable[[int], None]
Pairs = list[tuple[mx.array, mx.array]]


def sensitivity(
    model: Any, tokens: Sequence[int], *, seed: int = 0, start: Sequence[int] = (), progress: Progress | None = None
) -> dict[str, np.ndarray]:
    """Return the mean of g g' over tokens for every layer and head, in nats per unit squared, with the rotation undone.

    Parameters
    ----------
    model
        A loaded mlx-lm model; its weights may be quantized.
    tokens
        Token ids of a text; at least 16. They are read in stretches of 672 tokens, each from its own start: 512 of context
        and 160 that follow.
    seed
        Seed of the labels that the model draws.
    start
        Tokens that every text of this model begins with, as `lm.text_start` finds them: a stretch that does not is given
        them, and becomes shorter by as many.
    progress
        Called with the number of tokens of each stretch that is done.

    Returns
    -------
    dict[str, np.ndarray]
        `k` and `v`, float32 `[layers, H, D, D]` in the layout of a dump (MLA: latent and k_pe together in k, v of width 0):
        means over tokens 4 to 383 of each stretch, of a shorter text over the same shares. `k.energy` and `v.energy`,
        float32 `[layers, H, T]`: g'g of each token, 0 for tokens outside the mean; it measures the attention that a token gets.

    Raises
    ------
    InputError
        For a text of fewer than 16 tokens.
    UnsupportedError
        For a model without an adapter.
    """
    spec = cache_spec(model)
    if len(tokens) < 4 * SKIPPED_SINKS:
        raise InputError(f"sensitivity needs at least {4 * SKIPPED_SINKS} tokens, the text has {len(tokens)}")
    sums = {name: _zeros(spec, name) for name in STREAMS}
    energies = {name: np.zeros((*sums[name].shape[:2], len(tokens)), np.float32) for name in STREAMS}
    count = 0
    for index, (first, stretch) in enumerate(_stretches(tokens, start)):
        split = len(stretch) * CONTEXT_TOKENS // (CONTEXT_TOKENS + PREDICTED_TOKENS)
        counted = _counted_tokens(split)
        gradients = _gradients(model, spec, stretch[:split], stretch[split:], mx.random.key(seed + index))
        for name, layers in zip(STREAMS, gradients):
            for layer, gradient in enumerate(layers):
                sums[name][layer] += np.array(gradient.swapaxes(-1, -2) @ gradient)
                part = slice(first + counted.start, first + counted.stop)
                energies[name][layer, :, part] = np.array(mx.square(gradient).sum(axis=-1))
        count += len(counted)
        if progress:
            progress(len(stretch))
    means = {name: total / np.float32(count) for name, total in sums.items()}
    return means | {f"{name}.energy": energy for name, energy in energies.items()}


def _counted_tokens(context: int) -> range:
    """Return the tokens of the context whose gradients count."""
    return range(SKIPPED_SINKS, context - context // SKIPPED_RECENT_DIVISOR)


def _zeros(spec: CacheSpec, name: str) -> np.ndarray:
    """Return zeros `[layers, H, D, D]` float32 for one stream."""
    stream = spec.stream(name)
    return np.zeros((stream.layers, stream.heads, stream.dim, stream.dim), np.float32)


def _stretches(tokens: Sequence[int], start: Sequence[int] = ()) -> Iterator[tuple[int, list[int]]]:
    """Yield the position in the text that each complete stretch begins at, and its tokens; an incomplete one if there is no other.

    A stretch that is given the tokens that every text begins with begins so many positions earlier.
    """
    size, first = CONTEXT_TOKENS + PREDICTED_TOKENS, 0
    start = list(start[:SKIPPED_SINKS])  # those that are never counted
    while first == 0 or first + size - len(start) <= len(tokens):
        added = [] if list(tokens[first : first + len(start)]) == start else start
        part = tokens[first : first + size - len(added)]
        yield first - len(added), [*added, *part]
        first += len(part)


def _gradients(
    model: Any, spec: CacheSpec, context: Sequence[int], following: Sequence[int], key: mx.array
) -> tuple[list[mx.array], list[mx.array]]:
    """Return the gradients of the context's counted tokens, `[H, T, D]` of each layer, for the k and the v stream."""
    cache = make_prompt_cache(model)
    lm.prefill(model, context, cache)
    slots = [layer for layer in spec.layers if layer is not None]
    pairs = [cache[layer].keys_and_values() for layer in spec.attention_layers]
    inputs = mx.array([following])

    def loss(errors: Pairs) -> mx.array:
        changed = [_perturb(pair, error, slot) for pair, error, slot in zip(pairs, errors, slots)]
        logits = model(inputs, cache=_rebuild_cache(model, spec, cache, changed))[0].astype(mx.float32)
        labels = mx.random.categorical(mx.stop_gradient(logits), key=key)
        return nn.losses.cross_entropy(logits, labels, reduction="sum")

    gradients: Pairs = mx.grad(loss)([(mx.zeros_like(keys), mx.zeros_like(values)) for keys, values in pairs])
    joined, counted = spec.mode == "single_stream", _counted_tokens(len(context))
    k = [mx.concatenate(list(pair), axis=-1) if joined else pair[0] for pair in gradients]
    v = [pair[1][..., :0] if joined else pair[1] for pair in gradients]
    k, v = ([layer[0, :, counted.start : counted.stop].astype(mx.float32) for layer in layers] for layers in (k, v))
    mx.eval(k, v)
    return k, v


def _perturb(pair: tuple[mx.array, mx.array], error: tuple[mx.array, mx.array], slots: Layer) -> Pairs:
    """Return a layer's keys and values plus their error, which is given before rotation."""
    return [array + (slot.rope.rotate(e) if slot.rope else e) for array, e, slot in zip(pair, error, slots)]  # type: ignore[misc]


def _rebuild_cache(model: Any, spec: CacheSpec, cache: list[Any], pairs: Sequence[Any]) -> list[Any]:
    """Return a new prompt cache that holds these pairs, and copies of the other layers of `cache`, whatever they keep."""
    fresh = make_prompt_cache(model)
    for layer, entry in enumerate(cache):
        if layer not in spec.attention_layers:
            fresh[layer] = copy.deepcopy(entry)
    for layer, pair in zip(spec.attention_layers, pairs):
        fresh[layer].update_and_fetch(*pair)
    return fresh
