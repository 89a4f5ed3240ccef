"""MP-KVM: the first and the newest tokens unchanged, the tokens in between as centroids of keys and values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import mlx.core as mx
import numpy as np

from mlxkv.config import choice, integer, number
from mlxkv.errors import FormatError
from mlxkv.kernels.decode_attention import Bucket
from mlxkv.live.arrays import KeysValues, copy_without_parent
from mlxkv.live.base import live_methods
from mlxkv.live.checks import MAX_OFFSET, check_array, check_values
from mlxkv.live.clustering import ClusteringConfig, Clusters, insert, visible_counts
from mlxkv.live.counting import CountedRows
from mlxkv.live.importance import update_importance
from mlxkv.live.in_place import Field, InPlaceCache
from mlxkv.live.storage import to_storage_dtype
from mlxkv.spec import CacheSpec

WEIGHTS = ("attention", "count")
ROTATIONS = ("mean", "slot", "kept")
PARTITIONS = ("head", "shared")


@dataclass(frozen=True, kw_only=True)
class MPKVMConfig(ClusteringConfig):
    """Settings of MP-KVM, which extend those of the clustering.

    Parameters
    ----------
    centroids
        Maximal number of centroids, those of the sinks included.
    value_weight
        Factor of values in the distance, relative to keys; with 0 only keys are compared.
    sinks
        Number of first tokens, which keep centroids of their own.
    recent
        Minimal number of newest tokens that stay unchanged.
    flush
        Number of tokens that leave the tail of newest tokens together.
    stride
        Of the tokens after the sinks only every stride-th is clustered, with a count of `stride`; others are dropped.
    weights
        Weight of a token in means and in merging costs: the "attention" that it gets, or its "count", 1.
    queries
        Number of queries at the end of a prefill chunk whose attention is averaged.
    decay
        Factor by which earlier attention fades with each query.
    floor
        Weight of a token that gets no attention.
    rotation
        Position that a centroid's key is rotated to: the "mean" of its tokens' positions, or "slot", the centroid's
        index. With "kept" keys are clustered as they come, with the rotation of their positions.
    partition
        "head" clusters each kv head separately; "shared" clusters the concatenated vectors of all kv heads.
    """

    centroids: int = integer(198, least=1)
    value_weight: float = number(1.0, least=0)
    sinks: int = integer(4, key="preserve")
    recent: int = integer(32, key="window")
    flush: int = integer(32, least=1)
    stride: int = integer(1, least=1)
    weights: str = choice("attention", WEIGHTS)
    queries: int = integer(64, least=1)
    decay: float = number(0.98, above=0, most=1)
    floor: float = number(1e-4, above=0)
    rotation: str = choice("mean", ROTATIONS)
    partition: str = choice("head", PARTITIONS)


class Tail(NamedTuple):
    """The newest tokens, unchanged.

    Parameters
    ----------
    keys, values
        `[B, Hkv, T, D]` and `[B, Hkv, T, Dv]`.
    attention
        `[B, H, T]` float32, the importance of each token; H is 1 for a shared partition. None if weights are counts.
    """

    keys: mx.array
    values: mx.array
    attention: mx.array | None = None


class Centroids(NamedTuple):
    """Centroids in the form that attention uses: keys are rotated.

    Parameters
    ----------
    keys, values
        Means, `[B, Hkv, M, D]` and `[B, Hkv, M, Dv]`.
    positions
        Mean positions, `[B, H, M]` float32; H is 1 for a shared partition.
    counts
        Number of tokens that each centroid stands for, `[B, H, M]` float32.
    attention
        Sum of the tokens' importance, `[B, H, M]` float32. None if weights are counts.
    """

    keys: mx.array
    values: mx.array
    positions: mx.array
    counts: mx.array
    attention: mx.array | None = None


@live_methods.register("mp-kvm")
class MPKVMCache(InPlaceCache):
    """MP-KVM: the first and the newest tokens stay; those between are clustered, and a centroid stands for many.

    Tokens are clustered when they leave the tail of newest tokens. The rotation of their keys (RoPE) is removed first,
    so that similar tokens at different positions are similar keys; a centroid's key is rotated again before it is
    stored. The logarithm of a centroid's count is added to its attention scores. By default the attention that a token
    gets is its weight in means and in merging costs: tokens that queries look for stay apart, and others are merged.

    The number of centroids grows with the tokens that have left the tail, up to `config.centroids`; some may be empty.
    Blocks of `flush` tokens leave the tail at fixed positions in the text, so with weights "count" the result does not
    depend on how the text was split into chunks. Means are rounded to the model's type after every block. With
    multi-head latent attention (MLA) the vector of a token is its latent followed by its k_pe.

    Parameters
    ----------
    config
        Settings.
    spec
        Description of the model's cache.
    layer
        The layer's index in the model.

    Attributes
    ----------
    centroids
        The centroids, None while no token has left the tail.
    tail
        The newest tokens, None before the first chunk.

    Notes
    -----
    There is no paper of this method. When all centroids are in use, the cheapest mergers of all make room for a new
    token; it does not have to join its nearest centroid.

    Measured on SmolLM2 at a tenth of the cache (benchmarks/results/mp_kvm_ablation.json): weights "count" have 4 times
    the KL divergence of the default, more than StreamingLLM; leaving counts out of the scores has 2.6 times; clustering
    rotated keys (rotation "kept") is about as good as the default (1.05 times).
    """

    config_class = MPKVMConfig
    config: MPKVMConfig

    state_fields = ("centroids", "tail")
    state_types: ClassVar = {"centroids": Centroids, "tail": Tail}
    centroids = Field[Centroids | None]()
    tail = Field[Tail | None]()

    def __init__(self, config: MPKVMConfig, spec: CacheSpec, layer: int) -> None:
        super().__init__(config, spec, layer)
        self.observation_window = config.queries if config.weights == "attention" else 0
        self.centroids = self.tail = None

    def parts(self) -> list[KeysValues]:
        """Return what is stored in the order of `buckets`.

        Returns
        -------
        list of KeysValues
            The centroids, then the tail, as far as there are any.
        """
        return [KeysValues(part.keys, part.values) for part in (self.centroids, self.tail) if part is not None]

    def buckets(self) -> list[Bucket]:
        """Return the centroids, then the tail."""
        return [part.as_bucket() for part in self.parts()]

    def score_bias(self) -> mx.array | None:
        """Return the logarithms of the centroids' counts, and 0 for the tail."""
        if self.centroids is None or self.tail is None:
            return None
        counts = mx.log(visible_counts(self.centroids.counts, self.config))
        return mx.pad(counts, [(0, 0), (0, 0), (0, self.tail.keys.shape[2])])

    def tokens_as_large(self, tokens: int) -> int:
        """Return a text that fills all centroids and leaves as many tokens in the tail."""
        config = self.config
        blocks = -(-config.centroids * config.stride // config.flush) + 1
        filled = config.recent + config.flush * blocks
        return filled + (tokens - filled) % config.flush if tokens > filled else tokens

    def check_state(self) -> None:
        """Check what every method has, then counts, positions and attention of centroids and tail."""
        super().check_state()
        waiting = 0
        if self.tail is not None:
            waiting = self.tail.keys.shape[2]
            self._check_attention("tail", self.tail)
        elif self.centroids is not None:
            raise FormatError("there are centroids but no tail")
        if self.centroids is not None:
            shape = self._check_attention("centroids", self.centroids)
            check_array(self.centroids.positions, "centroids.positions", shape, mx.float32)
            check_values(self.centroids.positions, "centroids.positions", 0, self.offset - waiting)
            check_array(self.centroids.counts, "centroids.counts", shape, mx.float32)
            check_values(self.centroids.counts, "centroids.counts", 0, MAX_OFFSET)
            if not 0 < shape[-1] <= self.config.centroids:
                raise FormatError(f"there are {shape[-1]} centroids; the settings say at most {self.config.centroids}")
        if waiting > self.offset or (self.offset - waiting) % self.config.flush:
            raise FormatError(
                f"{waiting} of {self.offset} tokens wait, and others leave in blocks of {self.config.flush}"
            )

    def _check_attention(self, name: str, part: Tail | Centroids) -> tuple[int, ...]:
        """Check the attention of centroids or tail; return the shape of what there is of each of their entries."""
        batch, heads, entries, _ = part.keys.shape
        shape = batch, 1 if self.config.partition == "shared" else heads, entries
        if self.config.weights == "attention":
            check_array(part.attention, f"{name}.attention", shape, mx.float32)
        elif part.attention is not None:
            raise FormatError(f"{name}.attention is there, but weights are counts")
        return shape

    def absorb(self, keys: mx.array, values: mx.array, mass: mx.array | None) -> None:
        """Append the chunk to the tail and cluster the blocks that are old enough."""
        attention = None if mass is None else self._update_attention(mass, keys.shape[2])
        tail = Tail(to_storage_dtype(keys), to_storage_dtype(values), attention)
        tail = _concat(_slice(tail, 0, 0) if self.tail is None else self.tail, tail)
        start, flush = 0, self.config.flush
        while tail.keys.shape[2] - start >= self.config.recent + flush:
            self._flush_block(_slice(tail, start, start + flush), self.offset - tail.keys.shape[2] + start)
            start += flush
        self.tail = _copy(tail, start, None) if start else tail

    def _open_rows(self) -> ClusteredRows | None:
        """Return rows of centroids and tail, unless a block leaves the tail with the next token."""
        rows: ClusteredRows | None = self._rows
        if rows is None or rows.used == rows.room:
            self._settle()
            if self.tail is None or self.tail.keys.shape[2] + 1 >= self.config.recent + self.config.flush:
                return None
            return self._new_rows()
        in_tail = rows.used - rows.slots
        return rows if in_tail + 1 < self.config.recent + self.config.flush else None

    def _new_rows(self) -> ClusteredRows:
        """Move what is stored into rows."""
        centroids, tail, bias = self.centroids, self.tail, self.score_bias()
        assert tail is not None
        slots = 0 if centroids is None else centroids.keys.shape[2]
        tokens = KeysValues(*(mx.concatenate([*same], axis=2) for same in zip(*self.parts())))
        stored = [part.attention for part in (centroids, tail) if part is not None and part.attention is not None]
        attention = mx.concatenate(stored, axis=-1) if stored else mx.zeros((len(tail.keys), 1, tokens.tokens))
        rows = ClusteredRows(tokens, attention, slots + self.config.recent + self.config.flush - 1, bias)
        rows.slots, rows.counts, rows.positions = slots, None, None
        if centroids is not None:
            rows.counts, rows.positions = centroids.counts, centroids.positions
        self.centroids = self.tail = None
        # Importance is an average but for a new token, whose own query is its first.
        share = 1 - self.config.decay
        rows.shares = mx.full(2 * rows.room + 1, share or 1.0)
        rows.shares[rows.room] = 1.0
        return rows

    def _attend_rows(
        self, rows: ClusteredRows, queries: mx.array, token: KeysValues, scale: float, sinks: mx.array | None
    ) -> mx.array:
        """Attend to all entries, and update their importance."""
        output, mass = rows.attend(queries, token, scale, sinks)
        if self.config.weights == "count":
            return output
        if self.config.partition == "shared":
            mass = mass.mean(axis=1, keepdims=True)
        first = rows.room - rows.used + 1
        share = mass * rows.shares[first : first + rows.room]
        rows.attention = rows.attention * self.config.decay + share
        return mx.depends(output, [rows.attention])

    def _settled(self, rows: ClusteredRows) -> dict[str, Any]:
        """Return centroids and tail."""
        slots, counted = rows.slots, self.config.weights == "attention"
        parts = []
        for start, stop in ((0, slots), (slots, rows.used)):
            attention = copy_without_parent(rows.attention[..., start:stop]) if counted else None
            parts.append((*rows.tokens(start, stop), attention))
        (keys, values, attention), tail = parts
        centroids = None
        if rows.counts is not None and rows.positions is not None:
            centroids = Centroids(keys, values, rows.positions, rows.counts, attention)
        return {"centroids": centroids, "tail": Tail(*tail)}

    def unrotated_clusters(self) -> Clusters | None:
        """Return the centroids in float32, with the rotation of their keys removed.

        Returns
        -------
        Clusters or None
            Keys are `[B * Hkv, M, D]`, or `[B, M, Hkv * D]` for a shared partition. None while there are no centroids.
        """
        if self.centroids is None:
            return None
        return self._to_clusters(self.centroids, self._rotation_positions(self.centroids.positions))

    def _update_attention(self, mass: mx.array, count: int) -> mx.array:
        """Update the importance of centroids and tail; return that of the `count` new tokens."""
        if self.config.partition == "shared":
            mass = mass.mean(axis=1, keepdims=True)
        parts = [part for part in (self.centroids, self.tail) if part is not None]
        stored = [part.attention for part in parts if part.attention is not None]
        importance = mx.concatenate([mass[..., :0], *stored], axis=-1)
        importance = update_importance(importance, mass, min(count, self.config.queries), self.config.decay)
        slots = 0 if self.centroids is None else self.centroids.keys.shape[2]
        if self.centroids is not None:
            self.centroids = self.centroids._replace(attention=copy_without_parent(importance[..., :slots]))
        if self.tail is not None:
            self.tail = self.tail._replace(attention=copy_without_parent(importance[..., slots:-count]))
        return importance[..., -count:]

    def _flush_block(self, block: Tail, first: int) -> None:
        """Cluster a block of `flush` tokens that leaves the tail; `first` is the position of the first one."""
        config = self.config
        offsets = np.arange(config.flush)
        sinks = first + offsets < config.sinks
        chosen = offsets[sinks | ((first + offsets) % config.stride == 0)]
        if not len(chosen):
            return
        keys, values = (part[:, :, mx.array(chosen)] for part in (block.keys, block.values))
        shape = (keys.shape[0], 1 if config.partition == "shared" else keys.shape[1], len(chosen))
        positions, counts = (
            mx.broadcast_to(mx.array(numbers, mx.float32), shape)
            for numbers in (first + chosen, np.where(sinks[chosen], 1, config.stride))
        )
        attention = None if block.attention is None else block.attention[:, :, mx.array(chosen)] * counts
        new = self._to_clusters(Centroids(keys, values, positions, counts, attention), positions)
        self.centroids = self._rotate_back(insert(self.unrotated_clusters(), new, config), shape[0], keys.dtype)

    def _to_clusters(self, centroids: Centroids, positions: mx.array) -> Clusters:
        """Convert centroids (or tokens), rotated to `positions` `[B, H, M]`, into clusters with unrotated keys."""
        keys, values = centroids.keys.astype(mx.float32), centroids.values.astype(mx.float32)
        keys, values = self._unrotate(keys, values, positions)
        if self.latent:
            keys, values = mx.concatenate([keys, values], axis=-1), values[..., :0]
        weights = centroids.counts
        if centroids.attention is not None:
            weights = centroids.attention + self.config.floor * centroids.counts
        if self.config.partition == "shared":
            vectors = (x.swapaxes(1, 2).flatten(2) for x in (keys, values))
        else:
            vectors = (x.flatten(0, 1) for x in (keys, values))
        return Clusters(*vectors, *(x.flatten(0, 1) for x in (centroids.positions, centroids.counts, weights)))

    def _rotate_back(self, clusters: Clusters, batch: int, dtype: mx.Dtype) -> Centroids:
        """Convert clusters into centroids with rotated keys: the inverse of `_to_clusters`."""
        M, heads = clusters.counts.shape[1], self.slots[0].heads
        if self.config.partition == "shared":
            keys, values = (x.reshape(batch, M, heads, x.shape[-1] // heads).swapaxes(1, 2) for x in clusters[:2])
        else:
            keys, values = (x.reshape(batch, heads, M, x.shape[-1]) for x in clusters[:2])
        if self.latent:
            keys, values = mx.split(keys, [self.slots[0].dim], axis=-1)
        positions, counts, weights = (x.reshape(batch, -1, M) for x in clusters[2:])
        keys, values = self._rotate(keys, values, self._rotation_positions(positions))
        attention = None if self.config.weights == "count" else mx.maximum(weights - self.config.floor * counts, 0)
        positions, counts = copy_without_parent(positions), copy_without_parent(counts)
        return Centroids(keys.astype(dtype), values.astype(dtype), positions, counts, attention)

    def _rotation_positions(self, positions: mx.array) -> mx.array:
        """Return the positions that centroids' keys are rotated to, `[B, H, M]`, given their mean positions."""
        if self.config.rotation == "slot":
            return mx.broadcast_to(mx.arange(positions.shape[-1]), positions.shape)
        return positions

    def _rotate(self, keys: mx.array, values: mx.array, positions: mx.array) -> tuple[mx.array, mx.array]:
        """Apply RoPE at positions `[B, H, M]`, rounded, to the keys, or for MLA to k_pe (passed as values)."""
        return self._apply_rope(keys, values, positions, inverse=False)

    def _unrotate(self, keys: mx.array, values: mx.array, positions: mx.array) -> tuple[mx.array, mx.array]:
        """Remove the RoPE that `_rotate` applies."""
        return self._apply_rope(keys, values, positions, inverse=True)

    def _apply_rope(
        self, keys: mx.array, values: mx.array, positions: mx.array, inverse: bool
    ) -> tuple[mx.array, mx.array]:
        """Apply RoPE, or its inverse, to the vectors that the model rotates."""
        rope = self.slots[1 if self.latent else 0].rope
        if rope is None or self.config.rotation == "kept":
            return keys, values
        x = values if self.latent else keys
        start = mx.broadcast_to(mx.round(positions).astype(mx.int32), x.shape[:3]).flatten()
        apply = rope.unrotate if inverse else rope.rotate
        rotated = apply(x.reshape(-1, 1, 1, x.shape[-1]), start).reshape(x.shape)
        return (keys, rotated) if self.latent else (rotated, values)


class ClusteredRows(CountedRows):
    """Rows of centroids, then of the tail; their attention is their importance.

    Attributes
    ----------
    slots
        Number of centroids.
    counts, positions
        Those of the centroids, None where there are none.
    shares
        `[2 * R + 1]`: what an entry's importance takes of its attention now, around that of a new token.
    """

    slots: int
    counts: mx.array | None
    positions: mx.array | None
    shares: mx.array

    def arrays(self) -> list[mx.array]:
        """Return all arrays held.

        Returns
        -------
        list of mx.array
            Those of the rows, then those beside them.
        """
        beside = (self.counts, self.positions, self.shares)
        return [*super().arrays(), *(array for array in beside if array is not None)]


def _used(tail: Tail) -> Sequence[mx.array]:
    """Return the arrays of a tail, without attention if it is None."""
    return [part for part in tail if part is not None]


def _slice(tail: Tail, start: int, stop: int | None) -> Tail:
    """Return tokens start..stop of a tail."""
    return Tail(*(part[:, :, start:stop] for part in _used(tail)))


def _copy(tail: Tail, start: int, stop: int | None) -> Tail:
    """Return copies of tokens start..stop of a tail, which own their memory."""
    return Tail(*(copy_without_parent(part) for part in _used(_slice(tail, start, stop))))


def _concat(first: Tail, second: Tail) -> Tail:
    """Concatenate two tails."""
    return Tail(*(mx.concatenate([*pair], axis=2) for pair in zip(_used(first), _used(second))))
