"""Running live caches side by side: one prefill for all, then the same tokens through each, scored against `full`.

A variant is a method's settings, or a codec that files what the prefill left and restores it. Variants are dicts of them
by name, and the first is the yardstick.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any
from unittest import mock

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import KVCache, make_prompt_cache
from rich.progress import track

from mlxkv import live, lm
from mlxkv.codec.session import CacheCodec
from mlxkv.dump import KVDump
from mlxkv.errors import UnsupportedError
from mlxkv.evaluate import metrics
from mlxkv.models import cache_spec
from mlxkv.spec import STREAMS

Variants = Mapping[str, Any]
CHUNK = 16  # tokens: far faster than single ones, and nearly the same, as every method keeps the newest as they are


def caches_of(model: Any, settings: Any) -> list[Any]:
    """A prompt cache of these settings, which may be of a method outside mlxkv."""
    caches, spec = make_prompt_cache(model), cache_spec(model)
    for layer in spec.attention_layers:
        caches[layer] = live.cache_class_of(settings)(settings, spec, layer)
    live.attach(model)
    return caches


def possible(model: Any, variants: Variants) -> Variants:
    """Those that this model can have; says which it cannot and why."""
    left = dict(variants)
    for name, settings in variants.items():
        if isinstance(settings, CacheCodec):
            continue
        try:
            caches_of(model, settings)
        except UnsupportedError as error:
            print(f"left out: {name}: {error}")
            del left[name]
    return left


class Restored(KVCache):
    """mlx-lm's cache of a layer that was restored from files. `nbytes` is its part of them and, of tokens that came
    since, 2 bytes an element; in memory it has its full size."""

    def __init__(self, keys: mx.array, values: mx.array, file_bytes: float) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.update_and_fetch(keys, values)  # type: ignore[no-untyped-call]
        self.filed, self.file_bytes = self.offset, file_bytes

    @property
    def nbytes(self) -> float:  # type: ignore[override]
        keys, values = self.keys_and_values()  # type: ignore[no-untyped-call]
        return self.file_bytes + 2 * (keys[..., self.filed :, :].size + values[..., self.filed :, :].size)


class SharedPrefill:
    """One layer's caches of all variants during their first chunk, in which all see the same keys and values.

    exact: an mlx-lm cache that keeps them for the codecs, or None.
    """

    def __init__(self, caches: Sequence[live.LayerCache], exact: Any = None) -> None:
        self.caches, self.exact = caches, exact
        self.offset = 0

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        if self.exact is not None:
            self.exact.update_and_fetch(keys, values)
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
    codecs = {name: variant for name, variant in variants.items() if isinstance(variant, CacheCodec)}
    caches = {name: caches_of(model, settings) for name, settings in variants.items() if name not in codecs}
    shared, spec = make_prompt_cache(model), cache_spec(model)
    for layer in spec.attention_layers:
        exact = shared[layer] if codecs else None
        shared[layer] = SharedPrefill([own[layer] for own in caches.values()], exact)
    mx.eval(model(rows, cache=shared)[:, -1])
    for own in caches.values():
        for layer in set(range(len(own))) - set(spec.attention_layers):
            own[layer] = copy.deepcopy(shared[layer])
    if not codecs:
        return caches
    whole = [entry.exact if isinstance(entry, SharedPrefill) else entry for entry in shared]
    tokens: Any = rows.tolist()
    dump = lm.extract_cache(whole, spec, tokens, fingerprint=lm.fingerprint(model), dtype="float16")
    del shared, whole
    filed = {name: restored(model, codec, dump) for name, codec in codecs.items()}
    return {name: (caches | filed)[name] for name in variants}


def restored(model: Any, codec: CacheCodec, dump: KVDump) -> list[Any]:
    """mlx-lm's caches of the dump's texts, each compressed into a file of its own and read back."""
    sizes, decoded = [], []
    for i in range(len(dump.tokens)):
        states = {key: state[i : i + 1] for key, state in dump.states.items()}
        blob = codec.compress_dump(
            dataclasses.replace(
                dump, k=dump.k[:, i : i + 1], v=dump.v[:, i : i + 1], tokens=dump.tokens[i : i + 1], states=states
            )
        )
        sizes.append(len(blob))
        decoded.append(codec.decompress_dump(blob))
    k, v = (np.concatenate([text.stream(name) for text in decoded], axis=1) for name in STREAMS)
    caches, layers = lm.restore(model, dataclasses.replace(dump, k=k, v=v)), dump.spec.attention_layers
    for layer in layers:
        keys, values = caches[layer].keys_and_values()
        caches[layer] = Restored(keys, values, sum(sizes) / len(layers))
    return caches


def held_bytes(caches: Sequence[Any]) -> float:
    """Bytes of the live and restored ones among a model's caches."""
    return sum(entry.nbytes for entry in caches if isinstance(entry, live.LayerCache | Restored))


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
