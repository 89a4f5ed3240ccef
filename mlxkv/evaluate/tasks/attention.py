"""Difference of attention over the tokens of a context from that with the untouched cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlxkv import stock
from mlxkv.config import Config
from mlxkv.errors import UnsupportedError
from mlxkv.evaluate import texts
from mlxkv.evaluate.evaluation import EvalSample, Evaluation, Record, evaluations, option
from mlxkv.evaluate.optional import import_optional
from mlxkv.evaluate.variants import Variant, iter_variants
from mlxkv.kernels.bits import unpack
from mlxkv.live.base import LayerCache, causal_mask
from mlxkv.live.seam import attach
from mlxkv.models import cache_spec

SINKS, BINS = 4, 16  # of positions: the first tokens apart, then bins of equal width
MIN_PROBABILITY = 1e-12  # smaller ones count as this in a logarithm
MIN_SPREAD = 1e-12  # of tokens, which distances are divided by


@dataclass(frozen=True)
class AttentionOptions(Config):
    """Options of `mlxkv eval attention`."""

    text_file: Path | None = option(None, texts.UNSEEN_TEXT_FILE)
    context_tokens: int = option(512, "tokens cached", least=1)
    queries: int = option(32, "tokens after them, whose attention is compared", least=1)
    samples: int = option(1, texts.EXCERPTS, least=1)


@evaluations.register("attention")
class Attention(Evaluation):
    """Measure how far attention over the tokens of a text differs from that with the untouched cache, layer by layer.

    - kl: KL divergence of attention, in nats
    - cosine: cosine of attention
    - entropy: entropy of attention, in nats
    - lost_mass: share of the untouched cache's attention that is on tokens which the other cache has lost

    All are means over layers, heads and queries.

    Notes
    -----
    Records also have the scores by layer, and attention by position (mass_by_position). The queries are the tokens after the text, which the model reads as one chunk; from the second
    layer on the queries differ, too.

    Where a cache merges tokens, the attention of an entry is shared evenly among the tokens that it stands for. These
    are found from keys and values, by the assignment of entries to tokens with the least sum of distances: an entry
    that weighs as n tokens gets n of them, and one that equals a token always gets that one. Tokens without an entry
    are lost.
    """

    options_class = AttentionOptions
    scores = ("kl", "cosine", "entropy", "lost_mass")
    options: AttentionOptions

    def samples(self, tokenizer: Any, seed: int) -> list[EvalSample]:
        """Return one sample for each excerpt of the text."""
        options = self.options
        return texts.text_samples(
            tokenizer, options.text_file, options.context_tokens + options.queries, options.samples, seed,
            partial(_measure, options.context_tokens),
        )  # fmt: skip


def _measure(
    context_tokens: int, tokens: Sequence[int], model: Any, tokenizer: Any, variants: Sequence[Variant]
) -> list[Record]:
    """Return a record for each variant."""
    layers = _recorded_layers(model)
    exact: list[Entries] = []
    reference: list[np.ndarray] = []
    records = []
    for variant, cached in iter_variants(model, variants, tokens[:context_tokens]):
        entries = [stored_entries(stock.entries(cached.cache)[layer]) for layer in layers]
        exact = exact or entries
        shares = [entry_shares(*pair) for pair in zip(entries, exact)]
        weights = attention_weights(model, cached.cache, entries, tokens[context_tokens:])
        found = [to_token_attention(*pair) for pair in zip(weights, shares)]
        reference = reference or found
        by_layer = [compare(*layer) for layer in zip(found, reference, shares)]
        records.append(
            {
                "variant": variant.name,
                **cached.sizes,
                **{score: float(np.mean([layer[score] for layer in by_layer])) for score in Attention.scores},
                "by_layer": {score: [round(layer[score], 6) for layer in by_layer] for score in Attention.scores},
                "mass_by_position": [mass_by_position(layer).round(6).tolist() for layer in found],
            }
        )
    return records


@dataclass(frozen=True)
class Entries:
    """Entries that one layer stores of a text, for a batch of one.

    Parameters
    ----------
    keys, values
        `[H, n, D]` float32; latents and k_pe of MLA.
    bias
        Logarithm of the number of tokens that an entry stands for, `[H, n]`; -inf for none.
    ordered
        Whether entry i is token i.
    """

    keys: np.ndarray
    values: np.ndarray
    bias: np.ndarray
    ordered: bool


def stored_entries(cache: Any) -> Entries:
    """Return the entries of one layer's cache.

    Parameters
    ----------
    cache
        A live cache, or one of mlx-lm's, which holds every token in its place.

    Returns
    -------
    Entries
        Copies of its keys and values.
    """
    live = isinstance(cache, LayerCache)
    pairs = cache.buckets() if live else [cache.keys_and_values()]
    keys, values = (
        np.concatenate([np.array(unpack(x, mx.float32) if live else x.astype(mx.float32))[0] for x in parts], axis=1)
        for parts in zip(*pairs)
    )
    bias = cache.score_bias() if live else None
    added = np.zeros(1) if bias is None else np.array(bias)[0]
    return Entries(keys, values, np.broadcast_to(added, keys.shape[:2]), ordered=not live)


def entry_shares(entries: Entries, exact: Entries) -> np.ndarray:
    """Return the share of each entry's attention that each token gets.

    Parameters
    ----------
    entries
        `n` entries.
    exact
        All `T` tokens, as the untouched cache has them.

    Returns
    -------
    np.ndarray
        `[H, n, T]` float32. A row is even over the entry's tokens and adds up to 1, or to 0 for an entry that stands
        for none.

    Notes
    -----
    A linear assignment with a row for each token that an entry stands for. It minimizes distances and not their
    squares: by the triangle inequality an entry that equals a token then always gets that token.
    """
    H, T = exact.bias.shape
    if entries.ordered:
        return np.broadcast_to(np.eye(T, dtype=np.float32), (H, T, T))
    assign = import_optional("scipy.optimize").linear_sum_assignment
    empty = np.isneginf(entries.bias)
    counts = np.where(empty, 0, np.maximum(1, np.rint(np.exp(entries.bias)))).astype(int)
    shares = np.zeros((H, entries.bias.shape[1], T), np.float32)
    for head, distance in enumerate(_distances(entries, exact)):
        copies = np.repeat(np.arange(len(distance)), counts[head])
        chosen, tokens = assign(distance[copies])
        shares[head, copies[chosen], tokens] = 1
    return shares / np.maximum(1, shares.sum(axis=-1, keepdims=True))


def _distances(entries: Entries, exact: Entries) -> np.ndarray:
    """Return distances of keys and values together, in units of the spread of tokens, `[H, n, T]`."""
    squares = np.zeros((*entries.bias.shape, exact.bias.shape[1]))
    for stored, original in ((entries.keys, exact.keys), (entries.values, exact.values)):
        center = original.mean(axis=1, keepdims=True, dtype=np.float64)
        a, b = stored - center, original - center
        lengths = np.square(a).sum(axis=-1)[..., None], np.square(b).sum(axis=-1)[:, None]
        spread = lengths[1].mean(axis=-1, keepdims=True)
        squares += (lengths[0] + lengths[1] - 2 * a @ b.swapaxes(-1, -2)) / np.maximum(spread, MIN_SPREAD)
    return np.sqrt(np.maximum(squares, 0))


def attention_weights(
    model: Any, cache: list[Any], entries: Sequence[Entries], tokens: Sequence[int]
) -> list[np.ndarray]:
    """Let the model read tokens as one chunk, and record their attention.

    Parameters
    ----------
    model
        A model that mlx-lm loaded.
    cache
        A prompt cache; the chunk is in it afterwards.
    entries
        Entries of the cache, by layer: those that keep all tokens and are attended to by mlx-lm's attention function alone.
    tokens
        The `L` tokens of the chunk.

    Returns
    -------
    list of np.ndarray
        Attention of each layer's query heads to entries and then to the chunk, `[Hq, L, n + L]` float32, with sums
        of 1.
    """
    attach(model)
    held = stock.entries(cache)
    recorders = {layer: _AttentionRecorder(held[layer], part) for layer, part in zip(_recorded_layers(model), entries)}
    output = model(mx.array([list(tokens)]), cache=stock.with_entries(cache, recorders))
    mx.eval(output, [recorder.weights for recorder in recorders.values()])
    return [np.array(recorder.weights) for recorder in recorders.values()]


def _recorded_layers(model: Any) -> list[int]:
    """Return the layers whose attention to all tokens can be recorded."""
    spec = cache_spec(model)
    found = [i for i, layer in enumerate(spec.layers) if layer and layer.window is None and layer.use == "seam"]
    if not found:
        raise UnsupportedError(f"no layer of this {spec.model_type} model has attention that can be recorded")
    return found


class _AttentionRecorder:
    """Stand-in for a layer's cache that records the attention of the next chunk."""

    def __init__(self, cache: Any, entries: Entries) -> None:
        self.cache, self.entries = cache, entries
        self.weights = mx.zeros(0)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.cache, name)

    def attend(
        self,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        scale: float,
        mask: Any = None,
        sinks: mx.array | None = None,
    ) -> mx.array:
        """Record the attention, and return what the cache itself attends to."""
        everything = keys.astype(mx.float32)
        n, (Hq, L, D) = self.entries.keys.shape[1], queries.shape[1:]
        if keys.shape[2] < n + L:  # a live cache that gave the model the chunk alone
            everything = mx.concatenate([mx.array(self.entries.keys)[None], everything], axis=2)
        # Query heads that share a kv head are queries of it.
        shared = queries.astype(mx.float32).reshape(1, everything.shape[1], -1, D)
        scores = (scale * shared @ everything.swapaxes(-1, -2)).reshape(Hq, L, n + L)
        bias = mx.array(self.entries.bias, mx.float32)
        scores += mx.pad(mx.repeat(bias, Hq // len(bias), axis=0), [(0, 0), (0, L)])[:, None]
        visible = causal_mask(L, n + L) if isinstance(mask, str) else mask
        if visible is not None:
            scores = mx.where(visible, scores, -mx.inf) if visible.dtype == mx.bool_ else scores + visible
        scores = scores.reshape(Hq, L, n + L)
        if sinks is not None:  # a part of the attention goes to no token
            nothing = mx.broadcast_to(sinks.astype(mx.float32)[:, None, None], (Hq, L, 1))
            scores = mx.concatenate([scores, nothing], axis=-1)
        self.weights = mx.softmax(scores, axis=-1)[..., : n + L]
        if isinstance(self.cache, LayerCache):
            return self.cache.attend(queries, keys, values, scale, mask, sinks)
        return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask, sinks=sinks)


def to_token_attention(weights: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """Turn attention to entries into attention to tokens.

    Parameters
    ----------
    weights
        Attention to entries and the chunk, `[Hq, L, n + L]`.
    shares
        As `entry_shares` returns them, `[H, n, T]`.

    Returns
    -------
    np.ndarray
        Attention to the text's tokens and the chunk, `[Hq, L, T + L]`.
    """
    Hq, L, _ = weights.shape
    H, n, T = shares.shape
    text = weights[..., :n].reshape(H, -1, n) @ shares
    return np.concatenate([text.reshape(Hq, L, T), weights[..., n:]], axis=-1)


def compare(attention: np.ndarray, reference: np.ndarray, shares: np.ndarray) -> dict[str, float]:
    """Compare attention to tokens with that of the untouched cache.

    Parameters
    ----------
    attention, reference
        Attention `[Hq, L, T + L]`.
    shares
        As `entry_shares` returns them for the cache of `attention`, `[H, n, T]`.

    Returns
    -------
    dict
        Means over heads and queries: `kl`, KL(attention || reference) in nats (the other direction is infinite wherever
        a token is lost); `cosine`; `entropy` of `attention`, in nats; and `lost_mass`, 0 to 1, which the reference
        gives to tokens that no entry stands for.
    """
    logs = np.log(np.maximum(attention, MIN_PROBABILITY))
    lost = np.repeat(shares.sum(axis=1) == 0, len(attention) // len(shares), axis=0)  # [Hq, T]
    pairs = ((attention, reference), (attention, attention), (reference, reference))
    products = [(a * b).sum(axis=-1) for a, b in pairs]
    by_query = {
        "kl": (attention * (logs - np.log(np.maximum(reference, MIN_PROBABILITY)))).sum(axis=-1),
        "cosine": products[0] / np.sqrt(products[1] * products[2]),
        "entropy": -(attention * logs).sum(axis=-1),
        "lost_mass": (reference[..., : lost.shape[-1]] * lost[:, None]).sum(axis=-1),
    }
    return {score: float(values.mean()) for score, values in by_query.items()}


def mass_by_position(attention: np.ndarray) -> np.ndarray:
    """Sum attention over ranges of positions.

    Parameters
    ----------
    attention
        Attention `[Hq, L, T + L]`.

    Returns
    -------
    np.ndarray
        Means over heads and queries, `[18]`: attention to the first 4 tokens, to each of 16 equal parts of the text
        after them, and to the chunk itself.
    """
    text = attention.shape[-1] - attention.shape[1]
    mass = attention.mean(axis=(0, 1))
    parts = [mass[:SINKS], *np.array_split(mass[SINKS:text], BINS), mass[text:]]
    return np.array([part.sum() for part in parts])
