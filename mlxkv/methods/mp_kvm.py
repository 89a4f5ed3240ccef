"""MP-KVM: sinks and a recent window as they are; the tokens in between as centroids of keys and values, clustered as they
leave the window by the keys they had before rotation, each with the logarithm of its count added to its scores.

Each token weighs in the means, and in what it costs to merge it, as much as the attention that it draws: so what the
queries look for stays apart, and the rest is pooled. Without that (weights "count", as planned) a tenth of SmolLM2's cache
has four times the KL, more than StreamingLLM; without counts in the scores 2.6 times. Clustering keys as they are rotated
does as well there (1.05 times): the gain of pre-RoPE keys is that centroids do not depend on the position. From
benchmarks/results/mp_kvm_ablation.json.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlxkv.cache import CacheSpec, is_whole
from mlxkv.clustering import Clusters, Rules, inserted, shown
from mlxkv.errors import InputError
from mlxkv.kernels.decode_attention import Bucket
from mlxkv.live import LayerCache, narrowed, own, raw
from mlxkv.methods._importance import updated

METHOD = "mp-kvm"
WEIGHTS = ("attention", "count")
ROTATIONS = ("mean", "slot", "kept")
PARTITIONS = ("head", "shared")


@dataclass(frozen=True)
class Settings(Rules):
    """How to cluster (`Rules`: `centroids` are most slots, the `preserve` first tokens, the sinks, among them), and:

    window: newest tokens that stay as they are, at least. flush: tokens that leave the window together. stride: only
    every stride-th of them is taken, for that many tokens. weights: of a token, the attention it draws or 1. queries: of
    a prefill chunk that are asked what they attend to, the last ones. decay: of that attention, by query. floor: of it,
    what a token that draws none weighs. rotation: of a centroid, that of the mean position of its tokens, that of its
    slot's place, right behind the sinks, or what its tokens had: then keys are clustered rotated. partition: each
    head by itself, or all heads' keys together.
    Raises InputError for impossible settings.
    """

    centroids: int = 198
    value_weight: float = 1.0
    preserve: int = 4
    window: int = 32
    flush: int = 32
    stride: int = 1
    weights: str = "attention"
    queries: int = 64
    decay: float = 0.98
    floor: float = 1e-4
    rotation: str = "mean"
    partition: str = "head"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("window", 0), ("flush", 1), ("stride", 1), ("queries", 1)):
            if not is_whole(getattr(self, name), least):
                raise InputError(f"{name} must be {least} or more, not {getattr(self, name)!r}")
        for name, most in (("decay", 1.0), ("floor", np.inf)):
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0 < value <= most:
                raise InputError(f"{name} must be more than 0 and at most {most}, not {value!r}")
        for name, known in (("weights", WEIGHTS), ("rotation", ROTATIONS), ("partition", PARTITIONS)):
            if getattr(self, name) not in known:
                raise InputError(f"{name} must be one of {', '.join(known)}, not {getattr(self, name)!r}")


class Cache(LayerCache):
    """`centroids`: keys and values `[B, Hkv, M, D]` as attention takes them, then float32 `[B, H, M]` mean positions, counts
    and, where weights are attention, the attention drawn; H is 1 for a shared partition. `tail`: keys and values of the
    window and of what waits to leave it, and the attention drawn.

    M is the number of tokens that have left the window, at most `centroids`; slots may be empty. Blocks of `flush` tokens
    leave at fixed places of the text, so with weights "count" what is stored does not depend on the chunks. Attention is
    asked for once a chunk, of its last `queries` queries. Means are rounded to the model's type after every block. For
    MLA a token is its latent and its k_pe together.

    Departs from the plan in what happens when there are `centroids`: there the nearest one takes a token, here those that
    are cheapest to merge make room. An interval of steps would be another name for `flush`.
    """

    HELD = ("centroids", "tail")
    settings: Settings

    def __init__(self, settings: Settings, spec: CacheSpec, layer: int) -> None:
        super().__init__(settings, spec, layer)
        self.mass_queries = settings.queries if settings.weights == "attention" else 0
        self.centroids: tuple[mx.array, ...] | None = None
        self.tail: tuple[mx.array, ...] | None = None

    def buckets(self) -> list[Bucket]:
        return [(raw(part[0]), raw(part[1])) for part in (self.centroids, self.tail) if part is not None]

    def bias(self) -> mx.array | None:
        if self.centroids is None or self.tail is None:
            return None
        counts = mx.log(shown(self.centroids[3], self.settings))
        return mx.pad(counts, [(0, 0), (0, 0), (0, self.tail[0].shape[2])])

    def absorb(self, keys: mx.array, values: mx.array, mass: mx.array | None) -> None:
        new = [narrowed(keys), narrowed(values)]
        if mass is not None:
            new.append(self._weighed(mass, keys.shape[2]))
        old = [part[:, :, :0] for part in new] if self.tail is None else self.tail
        new = [mx.concatenate([*pair], axis=2) for pair in zip(old, new)]
        start, flush = 0, self.settings.flush
        while new[0].shape[2] - start >= self.settings.window + flush:
            self._flush([part[:, :, start : start + flush] for part in new], self.offset - new[0].shape[2] + start)
            start += flush
        self.tail = tuple(own(part[:, :, start:]) if start else part for part in new)

    def cut(self, count: int) -> None:
        if self.tail is not None:
            self.tail = tuple(own(part[:, :, :-count]) for part in self.tail)

    def is_trimmable(self) -> bool:
        """As long as no token has left the window."""
        return self.centroids is None

    def clusters(self) -> Clusters | None:
        """The centroids, un-rotated, in float32: `[B * Hkv, M, D]`, or for a shared partition `[B, M, Hkv * D]`."""
        return None if self.centroids is None else self._clusters(self.centroids, self._places(self.centroids[2]))

    def _weighed(self, mass: mx.array, count: int) -> mx.array:
        """Bring the attention drawn by stored tokens up to date; that of the `count` new ones."""
        if self.settings.partition == "shared":
            mass = mass.mean(axis=1, keepdims=True)
        stored = [part[-1] for part in (self.centroids, self.tail) if part is not None]
        drawn = mx.concatenate([mass[..., :0], *stored], axis=-1)
        drawn = updated(drawn, mass, min(count, self.settings.queries), self.settings.decay)
        slots = 0 if self.centroids is None else self.centroids[0].shape[2]
        if self.centroids is not None:
            self.centroids = (*self.centroids[:-1], own(drawn[..., :slots]))
        if self.tail is not None:
            self.tail = (*self.tail[:-1], own(drawn[..., slots:-count]))
        return drawn[..., -count:]

    def _flush(self, block: list[mx.array], first: int) -> None:
        """A block of `flush` tokens, from position `first` on, leaves the window."""
        settings = self.settings
        places = np.arange(settings.flush)
        sinks = first + places < settings.preserve
        taken = places[sinks | ((first + places) % settings.stride == 0)]
        if not len(taken):
            return
        block = [part[:, :, mx.array(taken)] for part in block]
        shape = (block[0].shape[0], 1 if settings.partition == "shared" else block[0].shape[1], len(taken))
        positions, counts = (
            mx.broadcast_to(mx.array(numbers, mx.float32), shape)
            for numbers in (first + taken, np.where(sinks[taken], 1, settings.stride))
        )
        drawn = [part * counts for part in block[2:]]
        new = self._clusters([block[0], block[1], positions, counts, *drawn], positions)
        self.centroids = self._stored(inserted(self.clusters(), new, settings), shape[0], block[0].dtype)

    def _clusters(self, parts: Sequence[mx.array], at: mx.array) -> Clusters:
        """Parts like those of `centroids`, rotated to positions `at`, as clusters of un-rotated float32 keys."""
        keys, values, positions, counts, *drawn = parts
        keys, values = self._turned(keys.astype(mx.float32), values.astype(mx.float32), at, inverse=True)
        if self.latent:
            keys, values = mx.concatenate([keys, values], axis=-1), values[..., :0]
        weights = drawn[0] + self.settings.floor * counts if drawn else counts
        if self.settings.partition == "shared":
            rows = (x.swapaxes(1, 2).flatten(2) for x in (keys, values))
        else:
            rows = (x.flatten(0, 1) for x in (keys, values))
        return Clusters(*rows, *(x.flatten(0, 1) for x in (positions, counts, weights)))

    def _stored(self, clusters: Clusters, batch: int, dtype: mx.Dtype) -> tuple[mx.array, ...]:
        """The inverse of `_clusters`."""
        M, heads = clusters.counts.shape[1], self.slots[0].heads
        if self.settings.partition == "shared":
            keys, values = (x.reshape(batch, M, heads, x.shape[-1] // heads).swapaxes(1, 2) for x in clusters[:2])
        else:
            keys, values = (x.reshape(batch, heads, M, x.shape[-1]) for x in clusters[:2])
        if self.latent:
            keys, values = mx.split(keys, [self.slots[0].dim], axis=-1)
        positions, counts, weights = (x.reshape(batch, -1, M) for x in clusters[2:])
        keys, values = self._turned(keys, values, self._places(positions), inverse=False)
        drawn = [] if self.settings.weights == "count" else [mx.maximum(weights - self.settings.floor * counts, 0)]
        return keys.astype(dtype), values.astype(dtype), own(positions), own(counts), *drawn

    def _places(self, positions: mx.array) -> mx.array:
        """The positions that centroids are rotated to, `[B, H, M]`."""
        if self.settings.rotation == "slot":
            return mx.broadcast_to(mx.arange(positions.shape[-1]), positions.shape)
        return positions

    def _turned(self, keys: mx.array, values: mx.array, at: mx.array, inverse: bool) -> tuple[mx.array, mx.array]:
        """Keys, or for MLA the k_pe that are where others have values, rotated to positions, rounded, or back."""
        rope = self.slots[self.latent].rope
        if rope is None or self.settings.rotation == "kept":
            return keys, values
        x = values if self.latent else keys
        start = mx.broadcast_to(mx.round(at).astype(mx.int32), x.shape[:3]).flatten()
        turn = rope.unrotate if inverse else rope.rotate
        turned = turn(x.reshape(-1, 1, 1, x.shape[-1]), start).reshape(x.shape)
        return (keys, turned) if self.latent else (turned, values)
