"""Running live caches side by side: one prefill for all, then the same tokens through each, scored against `full`.

A variant is a method's settings; variants are dicts of them by name, and the first is the yardstick.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from time import perf_counter
from typing import Any
from unittest import mock

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import make_prompt_cache
from rich.progress import track

from mlxkv import live, metrics
from mlxkv.errors import UnsupportedError
from mlxkv.models import cache_spec

Variants = Mapping[str, Any]
CHUNK = 16  # tokens: far faster than single ones, and nearly the same, as every method keeps the newest as they are


def caches_of(model: Any, settings: Any) -> list[Any]:
    """A prompt cache of these settings, which may be of a method outside mlxkv."""
    caches, spec = make_prompt_cache(model), cache_spec(model)
    for layer in spec.attention_layers:
        caches[layer] = live.cache_of(settings)(settings, spec, layer)
    live.attach(model)
    return caches


def possible(model: Any, variants: Variants) -> Variants:
    """Those that this model can have; says which it cannot and why."""
    left = dict(variants)
    for name, settings in variants.items():
        try:
            caches_of(model, settings)
        except UnsupportedError as error:
            print(f"left out: {name}: {error}")
            del left[name]
    return left


class SharedPrefill:
    """One layer's caches of all variants during their first chunk, in which all see the same keys and values."""

    def __init__(self, caches: Sequence[live.LayerCache]) -> None:
        self.caches = caches
        self.offset = 0

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        chunks = [cache.update_and_fetch(keys, values) for cache in self.caches]
        return chunks[0]

    def attend(self, *args: Any, **kwargs: Any) -> mx.array:
        """Each cache's own `attend`; of the outputs, all equal, only the first is ever computed."""
        masses: dict[int, mx.array] = {}

        def once(queries: mx.array, keys: mx.array, scale: float, mask: Any, last: int, kv_heads: int) -> mx.array:
            if last not in masses:
                masses[last] = attention_mass(queries, keys, scale, mask, last, kv_heads)
            return masses[last]

        attention_mass = live.attention_mass
        with mock.patch.object(live, "attention_mass", once):  # most of the seconds, and the same for all
            outputs = [cache.attend(*args, **kwargs) for cache in self.caches]
        mx.eval(outputs[0], [cache.state for cache in self.caches])
        return outputs[0]

    def make_mask(self, *args: Any, **kwargs: Any) -> Any:
        return self.caches[0].make_mask(*args, **kwargs)


def prefilled(model: Any, rows: mx.array, variants: Variants) -> dict[str, list[Any]]:
    """Each variant's caches after `rows` `[B, T]` in one chunk, from a single run of the model."""
    caches = {name: caches_of(model, settings) for name, settings in variants.items()}
    shared = make_prompt_cache(model)
    layers = cache_spec(model).attention_layers
    for layer in layers:
        shared[layer] = SharedPrefill([own[layer] for own in caches.values()])
    mx.eval(model(rows, cache=shared)[:, -1])
    for own in caches.values():
        for layer in set(range(len(own))) - set(layers):
            own[layer] = copy.deepcopy(shared[layer])
    return caches


def held_bytes(caches: Sequence[Any]) -> int:
    """Bytes of the live ones among a model's caches."""
    return sum(entry.nbytes for entry in caches if isinstance(entry, live.LayerCache))


def fp16_bytes(model: Any, tokens: int) -> int:
    """Of `tokens` tokens at 2 bytes an element."""
    slots = [slot for layer in cache_spec(model).layers if layer for slot in layer]
    return 2 * tokens * sum(slot.heads * slot.dim for slot in slots)


def continued(model: Any, rows: np.ndarray, context: int, variants: Variants, what: str) -> list[dict[str, Any]]:
    """Records of every variant on every text `[B, T]`: `context` tokens in one chunk, the rest given CHUNK at a time.

    Bytes are what a chunk finds stored, averaged over the chunks, and a text's share of the batch.
    """
    caches = prefilled(model, mx.array(rows[:, :context]), variants)
    reference: list[mx.array] = []
    records = []
    for name in track(variants, what):
        # Popped, so that no variant's cache outlives its turn.
        held, scores = followed(model, caches.pop(name), rows[:, context:], reference)
        shares = held / [fp16_bytes(model, context + i * CHUNK) for i in range(len(held))]
        means = {key: score.mean(axis=1) for key, score in scores.items()}
        perplexity, exact = np.exp(means["loss"]), np.exp(means["loss_reference"])
        for text in range(len(rows)):
            records.append(
                {
                    "variant": name,
                    "text": text,
                    "cache_bytes": float(held.mean()),
                    "share_of_fp16": float(shares.mean()),
                    "kl": float(means["kl"][text]),
                    "top1_agreement": float(means["agrees"][text]),
                    "perplexity_reference": float(exact[text]),
                    "perplexity": float(perplexity[text]),
                    "perplexity_delta": float(perplexity[text] - exact[text]),
                }
            )
    return records


def followed(
    model: Any, caches: list[Any], rows: np.ndarray, reference: list[mx.array]
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Teacher-forced through `rows` `[B, n + 1]`: bytes a text before each chunk; KL, agreement and losses `[B, n]`.

    reference: the yardstick's logits of each chunk, filled by the first call.
    """
    tokens, first = mx.array(rows), not reference
    held, chunks = [], []
    for i, start in enumerate(range(0, rows.shape[1] - 1, CHUNK)):
        stop = min(start + CHUNK, rows.shape[1] - 1)
        held.append(held_bytes(caches) / len(rows))
        logits = model(tokens[:, start:stop], cache=caches)
        if first:
            reference.append(logits)
        following = tokens[:, start + 1 : stop + 1]
        scores = (
            metrics.kl_divergence(reference[i], logits),
            mx.argmax(reference[i], axis=-1) == mx.argmax(logits, axis=-1),
            nn.losses.cross_entropy(logits, following),
            nn.losses.cross_entropy(reference[i], following),
        )
        mx.eval(scores, [entry.state for entry in caches])
        chunks.append([np.array(score) for score in scores])
    joined = (np.concatenate(parts, axis=1) for parts in zip(*chunks))
    return np.array(held), dict(zip(("kl", "agrees", "loss", "loss_reference"), joined))


def timed(model: Any, tokens: Sequence[int], context: int, variants: Variants, rounds: int) -> list[dict[str, Any]]:
    """Seconds and peak bytes of every variant, alone and in turn: a prefill of `context` tokens, then `rounds` of decoding.

    The prefill is one chunk and the token that gives the first logits, as in mlx-lm. All decode the same tokens, the
    rest of `tokens` in equal parts. Peak bytes are those above what was held before the round.
    """
    caches, records = {}, []
    for name, settings in track(variants.items(), "prefill, one by one"):
        caches[name] = caches_of(model, settings)
        start = perf_counter()
        for part in (tokens[: context - 1], tokens[context - 1 : context]):
            logits = model(mx.array([part]), cache=caches[name])[:, -1]
            mx.eval(logits if len(part) == 1 else [], [entry.state for entry in caches[name]])
        seconds = perf_counter() - start
        records.append({"variant": name, "step": "prefill", "tokens": context, "seconds": seconds})
    each = (len(tokens) - context) // rounds
    for i in range(rounds):
        part = tokens[context + i * each : context + (i + 1) * each]
        for name in track(variants, f"decode, round {i + 1} of {rounds}"):
            before = mx.get_active_memory()
            mx.reset_peak_memory()
            start = perf_counter()
            for token in part:
                mx.eval(model(mx.array([[token]]), cache=caches[name])[:, -1], [entry.state for entry in caches[name]])
            seconds = perf_counter() - start
            peak = mx.get_peak_memory() - before
            records.append({"variant": name, "step": "decode", "tokens": each, "seconds": seconds, "peak_bytes": peak})
    return records
