"""Random batches of live caches: requests that join, leave, are copied and taken back, each beside one that runs alone."""

import copy
import random
import zlib

import mlx.core as mx
import numpy as np
from conftest import tiny_model
from live_checks import small
from zoo.build import build

from mlxkv import stock
from mlxkv.live import make_cache
from mlxkv.live.base import LayerCache
from mlxkv.live.group import CacheGroup

SCALE = 0.3
MOST_ROWS, MOST_TOKENS = 5, 220
MODELS = {"llama": tiny_model, "gemma3_text": build, "glm4_moe_lite": tiny_model, "gemma3n": build}
KINDS = {"all tokens": "llama", "window": "gemma3_text", "latents": "glm4_moe_lite", "read by the model": "gemma3n"}


class Request:
    """A request with a cache of its own, which is what the batch is held to."""

    def __init__(self, make):
        self.alone, self.seen = make(), 0


class Storm:
    """A batch of one layer's caches, and as many requests that run alone, given the same tokens."""

    def __init__(self, kind, method, seed):
        seed = zlib.crc32(seed.encode())
        model = MODELS[KINDS[kind]](KINDS[kind])
        self.random, self.draw = random.Random(seed), np.random.default_rng(seed)
        self.make = lambda: self._layer(make_cache(model, method, **small(method)), kind)
        self.latent = kind == "latents"
        described = self.make()
        (self.heads, self.dim), (_, self.value_dim) = ((slot.heads, slot.dim) for slot in described.slots)
        self.weights = [mx.array(self.draw.normal(size=(4, self.dim, 12)).astype(np.float32)) for _ in range(2)]
        self.requests, self.batch, self.counts = [], None, {}

    @staticmethod
    def _layer(caches, kind):
        """The first live layer; of a model with windows the first that has one."""
        live = [entry for entry in stock.entries(caches) if isinstance(entry, LayerCache)]
        found = next((each for each in live if (each.window is not None) == (kind == "window")), live[0])
        found.join(CacheGroup({}, set()))  # of a layer alone: the others see no token
        return found

    def step(self):
        """One random step, checked."""
        possible = ["join"] if len(self.requests) < MOST_ROWS else []
        if self.requests:
            possible += ["leave", "extract", "copy", "again", "prompt", "prompt", "decode", "decode", "decode", "trim"]
        action = self.random.choice(possible)
        self.counts[action] = self.counts.get(action, 0) + 1
        getattr(self, f"_{action}")()
        if self.requests:
            assert self.batch.offset.tolist() == [each.seen for each in self.requests]
            assert self.batch.empty() == (not any(each.seen for each in self.requests))
        long = [i for i, each in enumerate(self.requests) if each.seen > MOST_TOKENS]
        if long:
            self._keep([i for i in range(len(self.requests)) if i not in long])

    def finish(self):
        """Everything that rows hold is what the requests hold that ran alone."""
        for i, each in enumerate(self.requests):
            self._same_state(self.batch.extract(i), each.alone)

    def _join(self):
        new = [Request(self.make) for _ in range(self.random.randint(1, 2))]
        for each in new:
            if self.random.random() < 0.5:
                self._run([each.alone], [each], [self.random.randint(1, 30)])
        merged = new[0].alone.merge([each.alone for each in new])
        if self.batch is None:
            self.batch = merged
        else:
            self.batch.extend(merged)
            self._spoil(merged)  # which is another's now
        self.requests += new

    def _leave(self):
        count = self.random.randint(0, len(self.requests))
        self._keep(self.random.sample(range(len(self.requests)), count))

    def _keep(self, indices):
        self.requests = [self.requests[i] for i in indices]
        if indices:
            self.batch.filter(mx.array(indices) if self.random.random() < 0.5 else indices)
        else:
            self.batch = None

    def _extract(self):
        """A request goes on alone, and the batch without it."""
        index = self.random.randrange(len(self.requests))
        out, one = self.batch.extract(index), copy.deepcopy(self.requests[index])
        assert out.offset == one.seen
        other = copy.deepcopy(one)
        for length in (1, 3):
            self._run([out], [one], [length], beside=[other.alone])
        self._same_state(out, other.alone)

    def _copy(self):
        old, self.batch = self.batch, copy.deepcopy(self.batch)
        self._spoil(old)

    def _again(self):
        """All leave, and join in another order."""
        order = self.random.sample(range(len(self.requests)), len(self.requests))
        rows = [self.batch.extract(i) for i in order]
        self.batch, self.requests = rows[0].merge(rows), [self.requests[i] for i in order]

    def _prompt(self):
        """A chunk or two in which shorter texts are padded on the right, some of them without a token."""
        lengths = [self.random.choice((0, 1, 2, 5, 17, 40)) for _ in self.requests]
        if max(lengths) == 0:
            lengths[0] = 1
        if len(set(lengths)) > 1 or self.random.random() < 0.5:
            self.batch.prepare(lengths=lengths, right_padding=[max(lengths) - each for each in lengths])
        self._run_batch(lengths, self.random.choice((max(lengths), 7)))
        self.batch.finalize()

    def _decode(self):
        self._run_batch([1] * len(self.requests), 1)

    def _trim(self):
        count = self.random.randint(0, 4)
        if self.batch.is_trimmable():
            assert self.batch.trim(count) == max(min(count, each.seen) for each in self.requests)
            for each in self.requests:
                each.alone.trim(count)
                each.seen = each.alone.offset

    def _spoil(self, batch):
        """Run a batch on that another was made from: the other must not notice."""
        self._attend(batch, *self._draw(len(batch.rows), 2), 2)

    # Attention as models call it

    def _draw(self, rows, length):
        shapes = [(rows, 4, length, 12 if self.latent else self.dim)]
        shapes += [(rows, self.heads, length, self.dim), (rows, self.heads, length, self.value_dim)]
        if self.latent:
            shapes += [(rows, 4, length, self.value_dim)]
        return [mx.array(self.draw.normal(size=shape).astype(np.float32)) for shape in shapes]

    def _attend(self, cache, queries, keys, values, *rest):
        *rotated, length = rest
        mask = cache.make_mask(length, return_array=self.latent)
        keys, values = cache.update_and_fetch(keys, values)
        if not self.latent:
            return cache.attend(queries, keys, values, SCALE, mask)
        scores = rotated[0] @ values.swapaxes(-1, -2) * SCALE
        if mask is not None:
            scores = mx.where(mask, scores, mx.finfo(scores.dtype).min)
        embed, unembed = self.weights
        if length == 1:
            return cache.attend(queries @ embed.swapaxes(-1, -2), keys, keys, SCALE, scores) @ unembed
        return cache.attend(queries, keys @ embed, keys @ unembed, SCALE, scores)

    def _run(self, caches, requests, lengths, beside=()):
        """Run single caches, which must give the same beside one another."""
        drawn = self._draw(1, lengths[0])
        outputs = [self._attend(cache, *drawn, lengths[0]) for cache in (*caches, *beside)]
        for output in outputs[1:]:
            self._same(output, outputs[0])
        requests[0].seen += lengths[0]

    def _run_batch(self, lengths, step):
        most = max(lengths)
        drawn = self._draw(len(lengths), most)
        for start in range(0, most, step):
            stop = min(start + step, most)
            part = [x[:, :, start:stop] for x in drawn]
            output = self._attend(self.batch, *part, stop - start)
            for i, (each, length) in enumerate(zip(self.requests, lengths)):
                count = max(0, min(stop, length) - start)
                if count:
                    alone = self._attend(each.alone, *[x[i : i + 1, :, :count] for x in part], count)
                    self._same(output[i : i + 1, :, :count], alone)
                    each.seen += count
                elif not self.batch._fetching:
                    assert not mx.any(output[i]).item()

    def _same(self, one, other):
        # Keys derived from latents are products of other shapes, of which a stored mean may be rounded otherwise.
        close = 2e-3 if self.latent else 2e-5
        np.testing.assert_allclose(np.array(one), np.array(other), atol=close, rtol=close)

    @staticmethod
    def _same_state(one, other):
        assert (one.offset, one.kept, one.nbytes) == (other.offset, other.kept, other.nbytes)
        for a, b in zip(one._arrays(), other._arrays(), strict=True):
            close = {"atol": 2e-3, "rtol": 2e-3} if mx.issubdtype(a.dtype, mx.floating) else {"atol": 0, "rtol": 0}
            np.testing.assert_allclose(*(np.array(x.astype(mx.float32)) for x in (a, b)), **close)
