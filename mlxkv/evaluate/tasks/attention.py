"""Where does the model look? Attention over the tokens of a held text, from the whole cache and from every other one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlxkv.config import Config
from mlxkv.evaluate import texts
from mlxkv.evaluate.answer_scores import library
from mlxkv.evaluate.evaluation import EvalSample, Evaluation, evaluations, option
from mlxkv.evaluate.variants import Variant, iter_variants
from mlxkv.kernels.bits import unpack
from mlxkv.live.base import LayerCache, causal_mask
from mlxkv.live.seam import attach
from mlxkv.models import cache_spec

SINKS, BINS = 4, 16  # of positions: the first tokens apart, then bins of equal width
LEAST = 1e-12  # probabilities below count as this in a logarithm


@dataclass(frozen=True)
class AttentionOptions(Config):
    text_file: Path | None = option(None, texts.TEXT_FILE)
    context_tokens: int = option(512, "tokens that are held", least=1)
    queries: int = option(32, "tokens that follow, whose attention is compared", least=1)
    samples: int = option(1, "stretches of the text for each seed", least=1)


@evaluations.register("attention")
class Attention(Evaluation):
    """Where does the model look? Attention over the tokens of a held text, from the whole cache and from every other one.

    The tokens that follow are given as one chunk, so all of them find stored what the text left there. Their attention is
    compared with the whole cache's layer by layer as the model computes it: behind the first layer the queries differ, too.

    An entry's attention goes to the tokens that it stands for. No method is asked which those are: they are read off its keys
    and values. An entry that weighs as n tokens (`LayerCache.bias`) is n times in an assignment of entries to tokens, each to
    at most one, that makes the sum of distances least; it shares its attention evenly among its tokens. By the triangle
    inequality (so distances, not their squares) an entry that is a token as it was always gets that one. Tokens without an
    entry are lost. Caches that are mlx-lm's own, such as those that codecs restore, hold every token in its place.
    """

    options_class = AttentionOptions
    scores = ("kl", "cosine", "entropy", "lost_mass")
    options: AttentionOptions

    def samples(self, tokenizer: Any, seed: int) -> list[EvalSample]:
        """One for each stretch of the text. Raises InputError for a text that is too short."""
        return texts.text_samples(
            tokenizer,
            self.options,
            self.options.context_tokens + self.options.queries,
            seed,
            partial(_measure, self.options.context_tokens),
        )


def _measure(
    context_tokens: int, tokens: Sequence[int], model: Any, tokenizer: Any, variants: Sequence[Variant]
) -> list[dict[str, Any]]:
    layers = cache_spec(model).attention_layers
    exact: list[Entries] = []
    reference: list[np.ndarray] = []
    records = []
    for variant, held in iter_variants(model, variants, tokens[:context_tokens]):
        entries = [stored_entries(held.cache[layer]) for layer in layers]
        exact = exact or entries
        shares = [entry_shares(*pair) for pair in zip(entries, exact)]
        weights = attention_weights(model, held.cache, entries, tokens[context_tokens:])
        found = [to_token_attention(*pair) for pair in zip(weights, shares)]
        reference = reference or found
        by_layer = [compare(*layer) for layer in zip(found, reference, shares)]
        records.append(
            {
                "variant": variant.name,
                **held.sizes,
                **{score: float(np.mean([layer[score] for layer in by_layer])) for score in Attention.scores},
                "by_layer": {score: [round(layer[score], 6) for layer in by_layer] for score in Attention.scores},
                "mass_by_position": [mass_by_position(layer).round(6).tolist() for layer in found],
            }
        )
    return records


@dataclass(frozen=True)
class Entries:
    """What one layer stores of a text, for a batch of one. keys, values `[H, n, D]` float32, of MLA latents and k_pe.
    bias `[H, n]`: the logarithm of how many tokens an entry stands for, -inf for none. ordered: whether entry i is token i.
    """

    keys: np.ndarray
    values: np.ndarray
    bias: np.ndarray
    ordered: bool


def stored_entries(cache: Any) -> Entries:
    """What a live cache, or one of mlx-lm's, holds."""
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
    """The share of each entry's attention that each token gets, `[H, n, T]`: rows are even and add up to 1, or to 0 for
    entries that stand for none. exact: all tokens, as the whole cache holds them."""
    H, T = exact.bias.shape
    if entries.ordered:
        return np.broadcast_to(np.eye(T, dtype=np.float32), (H, T, T))
    assign = library("scipy.optimize").linear_sum_assignment
    empty = np.isneginf(entries.bias)
    counts = np.where(empty, 0, np.maximum(1, np.rint(np.exp(entries.bias)))).astype(int)
    shares = np.zeros((H, entries.bias.shape[1], T), np.float32)
    for head, distance in enumerate(_distances(entries, exact)):
        copies = np.repeat(np.arange(len(distance)), counts[head])
        chosen, tokens = assign(distance[copies])
        shares[head, copies[chosen], tokens] = 1
    return shares / np.maximum(1, shares.sum(axis=-1, keepdims=True))


def _distances(entries: Entries, exact: Entries) -> np.ndarray:
    """`[H, n, T]`: of keys and values together, each by how far those of tokens spread."""
    squares = np.zeros((*entries.bias.shape, exact.bias.shape[1]))
    for ours, theirs in ((entries.keys, exact.keys), (entries.values, exact.values)):
        center = theirs.mean(axis=1, keepdims=True, dtype=np.float64)
        a, b = ours - center, theirs - center
        lengths = np.square(a).sum(axis=-1)[..., None], np.square(b).sum(axis=-1)[:, None]
        spread = lengths[1].mean(axis=-1, keepdims=True)
        squares += (lengths[0] + lengths[1] - 2 * a @ b.swapaxes(-1, -2)) / np.maximum(spread, LEAST)
    return np.sqrt(np.maximum(squares, 0))


def attention_weights(
    model: Any, cache: list[Any], entries: Sequence[Entries], tokens: Sequence[int]
) -> list[np.ndarray]:
    """Give the model `tokens` as one chunk: by layer what each pays attention to, `[Hq, L, n + L]`, entries first.

    entries: what the cache holds, by attention layer. The chunk is in the cache afterwards.
    """
    attach(model)
    watched = list(cache)
    layers = cache_spec(model).attention_layers
    for layer, own in zip(layers, entries):
        watched[layer] = _Watched(cache[layer], own)
    mx.eval(model(mx.array([list(tokens)]), cache=watched), [watched[layer].weights for layer in layers])
    return [np.array(watched[layer].weights) for layer in layers]


class _Watched:
    """Stands before a layer's cache and remembers the attention of its next chunk."""

    def __init__(self, cache: Any, entries: Entries) -> None:
        self.cache, self.entries = cache, entries
        self.weights = mx.zeros(0)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.cache, name)

    def attend(self, queries: mx.array, keys: mx.array, values: mx.array, scale: float, mask: Any = None) -> mx.array:
        everything = keys.astype(mx.float32)
        n, (Hq, L, D) = self.entries.keys.shape[1], queries.shape[1:]
        if keys.shape[2] < n + L:  # a live cache that gave the model the chunk alone
            everything = mx.concatenate([mx.array(self.entries.keys)[None], everything], axis=2)
        # Query heads that share a kv head are queries of it.
        shared = queries.astype(mx.float32).reshape(1, everything.shape[1], -1, D)
        scores = (scale * shared @ everything.swapaxes(-1, -2)).reshape(Hq, L, n + L)
        bias = mx.array(self.entries.bias, mx.float32)
        scores += mx.pad(mx.repeat(bias, Hq // len(bias), axis=0), [(0, 0), (0, L)])[:, None]
        seen = causal_mask(L, n + L) if isinstance(mask, str) else mask
        if seen is not None:
            scores = mx.where(seen, scores, -mx.inf) if seen.dtype == mx.bool_ else scores + seen
        self.weights = mx.softmax(scores, axis=-1).reshape(Hq, L, n + L)
        if isinstance(self.cache, LayerCache):
            return self.cache.attend(queries, keys, values, scale, mask)
        return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask)


def to_token_attention(weights: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """Attention to entries and the chunk, `[Hq, L, n + L]`, as attention to the text's tokens and the chunk."""
    Hq, L, _ = weights.shape
    H, n, T = shares.shape
    text = weights[..., :n].reshape(H, -1, n) @ shares
    return np.concatenate([text.reshape(Hq, L, T), weights[..., n:]], axis=-1)


def compare(ours: np.ndarray, whole: np.ndarray, shares: np.ndarray) -> dict[str, float]:
    """Attention `[Hq, L, T + L]` against the whole cache's, means over heads and queries.

    kl: KL(ours || whole) in nats; the other way round it would be infinite wherever a token is lost. entropy: of ours, in
    nats. lost_mass: what the whole cache's attention gives to tokens that no entry `[H, n, T]` stands for.
    """
    logs = np.log(np.maximum(ours, LEAST))
    lost = np.repeat(shares.sum(axis=1) == 0, len(ours) // len(shares), axis=0)  # [Hq, T]
    products = [(a * b).sum(axis=-1) for a, b in ((ours, whole), (ours, ours), (whole, whole))]
    by_query = {
        "kl": (ours * (logs - np.log(np.maximum(whole, LEAST)))).sum(axis=-1),
        "cosine": products[0] / np.sqrt(products[1] * products[2]),
        "entropy": -(ours * logs).sum(axis=-1),
        "lost_mass": (whole[..., : lost.shape[-1]] * lost[:, None]).sum(axis=-1),
    }
    return {score: float(values.mean()) for score, values in by_query.items()}


def mass_by_position(attention: np.ndarray) -> np.ndarray:
    """Of attention `[Hq, L, T + L]`, means over heads and queries: what goes to the first SINKS tokens, to each of BINS
    equal parts of the text behind them, and to the chunk itself, `[BINS + 2]`."""
    text = attention.shape[-1] - attention.shape[1]
    mass = attention.mean(axis=(0, 1))
    parts = [mass[:SINKS], *np.array_split(mass[SINKS:text], BINS), mass[text:]]
    return np.array([part.sum() for part in parts])
