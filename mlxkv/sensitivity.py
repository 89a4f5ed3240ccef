"""Sensitivity of a model's predictions to its cache: the Fisher information of cached keys and values.

The Kullback-Leibler divergence to the untouched cache is 1/2 e' F e for a small error e, where F = E[g g'] and g is the
gradient of the loss of labels that the model itself draws (the true Fisher; Kunstner et al., arXiv 1905.12558). A text is
split the way a cache is used: its first part is the cached context, and the rest is predicted from it. Errors in the cache
appear after the context was computed, so the gradient flows through the predicted part alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import RotatingKVCache, make_prompt_cache

from mlxkv import lm, stock
from mlxkv.dump import KVDump, stream_key
from mlxkv.errors import InputError
from mlxkv.models import cache_spec
from mlxkv.spec import STREAMS, CacheSpec, Layer

CONTEXT_TOKENS, PREDICTED_TOKENS = 512, 160  # of each stretch of text
STRETCH_TOKENS = CONTEXT_TOKENS + PREDICTED_TOKENS
# Sinks and the newest quarter of the context: codecs keep both as they are, and they matter several times as much.
SKIPPED_SINKS, SKIPPED_RECENT_DIVISOR = 4, 4
Progress = Callable[[int], None]
Pair = tuple[mx.array, mx.array]
Gradients = dict[str, tuple[range, list[mx.array]]]


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
        Other groups of layers have theirs under the names of a dump, such as `1.k`; of a window the oldest three quarters
        count.

    Raises
    ------
    InputError
        For a text of fewer than 16 tokens.
    UnsupportedError
        For a model that `cache_spec` refuses.
    """
    spec = cache_spec(model)
    _check_length(tokens)
    sums = _Sums(spec, len(tokens))
    for index, (first, stretch) in enumerate(_stretches(tokens, start)):
        split = context_length(len(stretch))
        found, _ = _gradients(model, spec, stretch[:split], stretch[split:], mx.random.key(seed + index))
        sums.add(first, found)
        if progress:
            progress(len(stretch))
    return sums.means()


def context_length(tokens: int) -> int:
    """Return how many tokens of a stretch are its context; the rest is predicted from it.

    Parameters
    ----------
    tokens
        Tokens of the stretch.

    Returns
    -------
    int
        About three quarters of them.

    Examples
    --------
    >>> context_length(672)
    512
    """
    return tokens * CONTEXT_TOKENS // STRETCH_TOKENS


def dump_with_sensitivity(
    model: Any, tokens: Sequence[int], *, seed: int = 0, name: str = "", fingerprint: str = "", dtype: str = "auto",
    cache: Sequence[Any] | None = None,
) -> KVDump:  # fmt: skip
    """Run a stretch of text through a model once, and copy its cache together with its sensitivity.

    A dump and a sensitivity of the same tokens compute them twice.

    Parameters
    ----------
    model
        A loaded mlx-lm model.
    tokens
        16 to 672 token ids; they begin as every text of the model does.
    seed
        Seed of the labels that the model draws.
    name, fingerprint, dtype
        As for `lm.extract_cache`.
    cache
        A prompt cache of the first `context_length` tokens, which stays as it is; None to make one.

    Returns
    -------
    KVDump
        The cache of all tokens, with what `sensitivity` measures of them.

    Raises
    ------
    InputError
        For fewer or more tokens, and for what `lm.extract_cache` refuses.
    UnsupportedError
        For a model that `cache_spec` refuses, and for an entry of its cache that cannot be copied.
    """
    spec = cache_spec(model)
    _check_length(tokens)
    if len(tokens) > STRETCH_TOKENS:
        raise InputError(f"a stretch has at most {STRETCH_TOKENS} tokens, not {len(tokens)}: cut the text")
    split, sums = context_length(len(tokens)), _Sums(spec, len(tokens))
    found, after = _gradients(model, spec, tokens[:split], tokens[split:], mx.random.key(seed), cache)
    sums.add(0, found)
    dump = lm.extract_cache(after, spec, [tokens], model=name, fingerprint=fingerprint, dtype=dtype)
    return replace(dump, sensitivity=sums.means())


class _Sums:
    """Sums of g g' over tokens, and the energy of each token, of a text of so many tokens."""

    def __init__(self, spec: CacheSpec, tokens: int) -> None:
        keys = [stream_key(number, name) for number in range(len(spec.groups)) for name in STREAMS]
        self._sums = {key: _zeros(spec, key) for key in keys}
        self._energies = {key: np.zeros((*self._sums[key].shape[:2], tokens), np.float32) for key in keys}
        self._counts = dict.fromkeys(keys, 0)

    def add(self, first: int, found: Gradients) -> None:
        """Add what was found of a stretch that begins at position `first` of the text."""
        for key, (counted, layers) in found.items():
            for layer, gradient in enumerate(layers):
                self._sums[key][layer] += np.array(gradient.swapaxes(-1, -2) @ gradient)
                part = slice(first + counted.start, first + counted.stop)
                self._energies[key][layer, :, part] = np.array(mx.square(gradient).sum(axis=-1))
            self._counts[key] += len(counted)

    def means(self) -> dict[str, np.ndarray]:
        """Return the means and energies by the names of a dump."""
        means = {key: total / np.float32(max(1, self._counts[key])) for key, total in self._sums.items()}
        return means | {f"{key}.energy": energy for key, energy in self._energies.items()}


def _check_length(tokens: Sequence[int]) -> None:
    if len(tokens) < 4 * SKIPPED_SINKS:
        raise InputError(f"sensitivity needs at least {4 * SKIPPED_SINKS} tokens, the text has {len(tokens)}")


def _counted_tokens(context: int, rows: int | None = None) -> range:
    """Return the tokens of the context whose gradients count, of those that a cache of so many rows still has."""
    rows = context if rows is None else rows
    first = max(SKIPPED_SINKS, context - rows)
    return range(first, max(first, context - rows // SKIPPED_RECENT_DIVISOR))


def _zeros(spec: CacheSpec, key: str) -> np.ndarray:
    """Return zeros `[layers, H, D, D]` float32 for one stream."""
    number, _, name = key.rpartition(".")
    stream = spec.groups[int(number or 0)].stream(name)
    return np.zeros((stream.layers, stream.heads, stream.dim, stream.dim), np.float32)


def _stretches(tokens: Sequence[int], start: Sequence[int] = ()) -> Iterator[tuple[int, list[int]]]:
    """Yield the position in the text that each complete stretch begins at, and its tokens; an incomplete one if there is no other.

    A stretch that is given the tokens that every text begins with begins so many positions earlier.
    """
    size, first = STRETCH_TOKENS, 0
    start = list(start[:SKIPPED_SINKS])  # those that are never counted
    while first == 0 or first + size - len(start) <= len(tokens):
        added = [] if list(tokens[first : first + len(start)]) == start else start
        part = tokens[first : first + size - len(added)]
        yield first - len(added), [*added, *part]
        first += len(part)


def _gradients(
    model: Any, spec: CacheSpec, context: Sequence[int], following: Sequence[int], key: mx.array,
    cache: Sequence[Any] | None = None,
) -> tuple[Gradients, list[Any]]:  # fmt: skip
    """Return the counted tokens of each stream with their gradients `[H, T, D]` of each layer, and the cache of all tokens."""
    if cache is None:
        cache = make_prompt_cache(model)
        lm.prefill(model, context, cache)
    held = {index: _tokens_of(entry) for index, entry in _described(cache, spec)}
    inputs = mx.array([following])
    after: list[Any] = []

    def loss(errors: dict[int, Pair]) -> mx.array:
        changed = {i: _perturb(held[i], error, spec.layers[i], len(context)) for i, error in errors.items()}
        after[:] = _rebuild_cache(model, spec, cache, changed)
        logits = model(inputs, cache=after)[0].astype(mx.float32)
        labels = mx.random.categorical(mx.stop_gradient(logits), key=key)
        return nn.losses.cross_entropy(logits, labels, reduction="sum")

    with _differentiable(model):
        gradients = mx.grad(loss)({i: (mx.zeros_like(pair[0]), mx.zeros_like(pair[1])) for i, pair in held.items()})
    found: Gradients = {}
    for number, group in enumerate(spec.groups):
        rows = group.rows(len(context))
        counted = _counted_tokens(len(context), rows)
        part = slice(counted.start - len(context) + rows, counted.stop - len(context) + rows)
        pairs = [gradients[index] for index in group.indices]
        if group.latent:
            pairs = [(mx.concatenate(pair, axis=-1), pair[1][..., :0]) for pair in pairs]
        for i, name in enumerate(STREAMS):
            layers = [pair[i][0, :, part].astype(mx.float32) for pair in pairs]
            found[stream_key(number, name)] = counted, layers
    mx.eval([layers for _, layers in found.values()], [entry.state for entry in after])
    return found, after


@contextmanager
def _differentiable(model: Any) -> Iterator[None]:
    """Set the modules to training, in which mlx-lm's models leave kernels without gradients out; dropout stays off."""
    changed = [part for part in model.modules() if not part.training and "Dropout" not in type(part).__name__]
    for part in changed:
        part._training = True
    try:
        yield
    finally:
        for part in changed:
            part._training = False


def _described(cache: Sequence[Any], spec: CacheSpec) -> list[tuple[int, Any]]:
    """Return the entries that keep keys and values, with their indices."""
    return [(i, entry) for i, entry in enumerate(stock.entries(cache)) if spec.layers[i] is not None]


def _tokens_of(entry: Any) -> Pair:
    """Return the keys and values of an entry, in the order of the text."""
    keys, values, *_ = stock.window_tokens(entry) if isinstance(entry, RotatingKVCache) else entry.keys_and_values()
    return keys, values


def _perturb(pair: Pair, error: Pair, layer: Layer | None, tokens: int) -> Pair:
    """Return a layer's keys and values plus their error, which is given before rotation."""
    start = tokens - pair[0].shape[2]
    keys, values = (
        array + (slot.rope.rotate(e, start) if slot.rope else e)
        for array, e, slot in zip(pair, error, layer)  # type: ignore[arg-type]
    )
    return keys, values


def _rebuild_cache(model: Any, spec: CacheSpec, cache: Sequence[Any], pairs: Mapping[int, Pair]) -> list[Any]:
    """Return a new prompt cache that holds these pairs, and copies of the other entries of `cache`, whatever they keep."""
    fresh = make_prompt_cache(model)
    entries, before = stock.entries(fresh), stock.entries(cache)
    for index, pair in pairs.items():
        if isinstance(entries[index], RotatingKVCache):
            stock.fill_window(entries[index], *pair, before[index].offset, pair[0].shape[2])
        else:
            entries[index].update_and_fetch(*pair)
    others = {i: copy.deepcopy(entry) for i, entry in enumerate(before) if spec.layers[i] is None}
    return stock.with_entries(fresh, others)
