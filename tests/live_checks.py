"""What the tests of live caches share: settings small enough for tiny texts, and caches that check the one rule."""

import copy
import dataclasses

import mlx.core as mx
import numpy as np

from mlxkv.kernels.bits import unpack
from mlxkv.live import live_config, live_methods, make_cache
from mlxkv.live.base import LayerCache, cache_class_of
from mlxkv.live.storage import SMALL_CHUNK

METHODS = live_methods.names()
# So that texts of a hundred tokens are more than a method keeps exactly; each method has some of these.
SMALL = {"sinks": 2, "tokens": 24, "recent": 8, "heavy": 12, "centroids": 12, "flush": 8, "learn": 16}
DECODED = ("klt",)  # whose buckets are rounded to the stored type, which attention is not
WINDOWS = ("mp-kvm", "sliding-window", "streaming-llm")  # of 20 recent tokens


def small(method):
    """Overrides for a tiny text."""
    known = {field.name for field in dataclasses.fields(live_config(method))}
    settings = SMALL | {"recent": 20} if method in WINDOWS else SMALL
    return {key: value for key, value in settings.items() if key in known}


def lone_cache(method, spec, layer=0, **overrides):
    """A cache without a model."""
    settings = live_config(method, **(overrides or small(method)))
    return cache_class_of(settings)(settings, spec, layer)


def feed(cache, keys, values, queries=None):
    """One chunk `[B, H, L, D]` as a model would give it; returns the attention's output."""
    queries = keys if queries is None else queries
    return cache.attend(queries, *cache.update_and_fetch(keys, values), 0.3, "causal" if keys.shape[2] > 1 else None)


def stored(cache, slot):
    """Everything in slot 0 or 1 as float32 `[B, H, kept, D]`, in storage order; None while there is nothing."""
    parts = [np.array(unpack(pair[slot], mx.float32)) for pair in cache.buckets()]
    return np.concatenate(parts, axis=2) if parts else None


def checked_cache(model, method):
    """A live prompt cache whose layers compare every attention with plain NumPy over what they stored before."""
    return [
        Checked(entry) if isinstance(entry, LayerCache) else entry
        for entry in make_cache(model, method, **small(method))
    ]


class Checked:
    """Stands before a live cache and holds it to the rule: stored tokens as stored, the chunk exactly and causally."""

    def __init__(self, cache):
        self.cache, self.attended = cache, 0

    def __getattr__(self, name):
        return getattr(self.cache, name)

    def update_and_fetch(self, keys, values):
        chunk = [np.array(x.astype(mx.float32)) for x in (keys, values)]
        before, bias = [stored(self.cache, slot) for slot in (0, 1)], self.cache.score_bias()
        self.bias = None if bias is None else np.array(bias)
        self.twin = None
        if self.cache.takes_tokens_back and not self.cache.latent and 1 < keys.shape[2] <= SMALL_CHUNK:
            self.twin, self.chunk = Checked(copy.deepcopy(self.cache)), (keys, values)
            self.twin.cache.__dict__["_group"] = None  # which would notice that no other layer goes on
        self.seen = [x if old is None else np.concatenate([old, x], axis=2) for old, x in zip(before, chunk)]
        fetched = self.cache.update_and_fetch(keys, values)
        if self.cache.latent:
            np.testing.assert_allclose(fetched[1], self.seen[1], atol=1e-5)
            if keys.shape[2] > 1:
                np.testing.assert_allclose(fetched[0], self.seen[0], atol=1e-5)
        return fetched

    def attend(self, queries, keys, values, scale, mask=None):
        self.attended += 1
        if self.twin:  # a small chunk is like decoding
            output = self.cache.attend(queries, keys, values, scale, mask)
            for i in range(queries.shape[2]):
                token = self.twin.update_and_fetch(*(part[:, :, i : i + 1] for part in self.chunk))
                expected = self.twin.attend(queries[:, :, i : i + 1], *token, scale)
                np.testing.assert_allclose(output[:, :, i : i + 1], expected, atol=1e-5)
            return output
        if not self.cache.latent:
            keys_seen, values_seen = self.seen
        elif queries.shape[2] == 1:
            keys_seen = values_seen = self.seen[0]
        else:
            keys_seen, values_seen = np.array(keys), np.array(values)
        expected = plain_attention(np.array(queries), keys_seen, values_seen, scale, mask, self.bias)
        output = self.cache.attend(queries, keys, values, scale, mask)
        if queries.shape[2] == 1 and not np.allclose(output, expected, atol=2e-4, rtol=2e-4):
            # A single token may be stored first, and attended to as it is stored.
            keys_seen, values_seen = (
                np.concatenate([part[:, :, :-1], part[:, :, -1:].astype(np.float16)], axis=2) for part in self.seen
            )
            expected = plain_attention(np.array(queries), keys_seen, values_seen, scale, mask, self.bias)
        near = 2e-3 if self.cache.method_name in DECODED else 2e-4
        np.testing.assert_allclose(output, expected, atol=near, rtol=near)
        return output


def plain_attention(queries, keys, values, scale, mask, bias=None):
    """softmax(scale * q . k + mask + bias) . v in NumPy, bias `[B, H, kept]` of the first tokens."""
    repeat, (L, T) = queries.shape[1] // keys.shape[1], (queries.shape[2], keys.shape[2])
    scores = scale * queries @ keys.repeat(repeat, axis=1).swapaxes(-1, -2)
    if bias is not None:
        scores[..., : bias.shape[-1]] += bias.repeat(scores.shape[1] // bias.shape[1], axis=1)[:, :, None]
    if isinstance(mask, mx.array) and mask.dtype != mx.bool_:
        scores = scores + np.array(mask)
    elif mask is not None:
        visible = np.tril(np.ones((L, T), bool), T - L) if isinstance(mask, str) else np.array(mask)
        scores = np.where(visible, scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True) @ values.repeat(repeat, axis=1)
