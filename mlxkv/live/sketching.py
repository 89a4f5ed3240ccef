"""What methods share that keep the newest tokens and those that, by a sketch, got most attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, cast

import mlx.core as mx

from mlxkv.config import Config, choice, integer, number
from mlxkv.errors import InputError, UnsupportedError
from mlxkv.kernels.decode_attention import Bucket
from mlxkv.live.base import KeysValues, LayerCache, append_chunk
from mlxkv.live.sketches import SKETCHES
from mlxkv.spec import CacheSpec

PER = ("head", "layer")
MIN_SCALE, MAX_SCALE = 0.5, 2.0  # limits of the controller: times `heavy` and `recent`
SHRINK, GROW = 0.9, 1.25  # its steps: quick to keep more, slow to keep less


@dataclass(frozen=True, kw_only=True)
class SketchConfig(Config):
    """Settings that all sketch methods have.

    Parameters
    ----------
    sinks
        First tokens, which always stay.
    heavy
        Tokens that stay because they got most attention.
    recent
        Newest tokens that stay, at least.
    interval
        Tokens that leave the newest ones together.
    sketch
        The sketch that counts attention: "count-min", "count-sketch" or "race".
    width
        Counters of a row of the sketch; a power of 2 for "race".
    depth
        Rows of the sketch.
    seed
        Seed of the sketch's hash functions.
    per
        Whether each kv "head" or each "layer" has a sketch and a choice of tokens.
    queries
        Last queries of each chunk whose attention is counted.
    decay
        Factor by which earlier attention fades with each query that is counted.
    target
        Share of the counted attention that should go to tokens still kept; a controller scales `heavy` and `recent` to
        reach it. 0 leaves them as they are.
    """

    sinks: int = integer(4)
    heavy: int = integer(252, least=1)
    recent: int = integer(248)
    interval: int = integer(16, least=1)
    sketch: str = choice("count-min", SKETCHES)
    width: int = integer(256, least=1)
    depth: int = integer(2, least=1)
    seed: int = integer(0)
    per: str = choice("head", PER)
    queries: int = integer(256, least=1)
    decay: float = number(0.99, above=0, most=1)
    target: float = number(0.0, least=0, below=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        SKETCHES[self.sketch](self.width, self.depth, self.seed)  # refuses widths that the sketch cannot have
        if self.target and self.sketch != "count-min":
            raise InputError(f"target needs count-min, whose rows add up to all that was counted, not {self.sketch}")


class SketchingCache(LayerCache):
    """Heavy tokens in the order they came, the sinks first; then the tail, the newest. While all fit, all are the tail.

    How many tokens leave the tail follows from how many have come, not from their chunks; which of them stay follows
    from the sketch. A method says in `evict` what becomes of the others.

    The controller (`target`) reads at an interval's end what the interval before computed, which has long been
    evaluated, for all rows of a batch together.

    Parameters
    ----------
    config
        Settings, of the method's `config_class`.
    spec
        Description of the model's cache.
    layer
        The layer's index in the model.

    Attributes
    ----------
    counters
        `[B or B * Hkv, depth, width]`: attention by token position, also of tokens that have been evicted since.
    heavy
        Tokens that stay.
    positions
        `[B, 1 or Hkv, heavy]` int32, by which heavy tokens are found in the sketch; None for RACE, which finds them by
        their keys.
    tail
        The newest tokens.
    evicted_attention
        `[B or B * Hkv]`, the fading attention that evicted tokens had got; only where the controller is on.
    coverage
        The share of counted attention that went to tokens still kept, at the last interval's end.
    size_factor
        Factor that the controller applies to `heavy` and `recent`.
    merged_entries
        Number of entries that the method has for evicted tokens.

    Raises
    ------
    UnsupportedError
        For a controller with MLA: layers would keep different numbers of tokens, and MLA has one mask for all.
    """

    config: SketchConfig
    state_fields: ClassVar[tuple[str, ...]] = (
        "counters",
        "heavy",
        "positions",
        "tail",
        "evicted_attention",
        "coverage",
        "size_factor",
    )
    state_types: ClassVar = {"heavy": KeysValues, "tail": KeysValues}
    merged_entries = 0

    def __init__(self, config: SketchConfig, spec: CacheSpec, layer: int) -> None:
        super().__init__(config, spec, layer)
        if config.target and self.latent:
            raise UnsupportedError("an MLA model's layers must keep equally many tokens: leave target at 0")
        self.observation_window = config.queries
        self.sketch = SKETCHES[config.sketch](config.width, config.depth, config.seed + layer)
        self.counters: mx.array | None = None
        self.heavy: KeysValues | None = None
        self.positions: mx.array | None = None
        self.tail: KeysValues | None = None
        self.evicted_attention: mx.array | None = None
        self.coverage: mx.array | None = None
        self.size_factor = 1.0

    def evict(self, tokens: KeysValues, indices: mx.array) -> None:
        """Do what the method does with tokens that are evicted, which by default is nothing.

        Parameters
        ----------
        tokens
            T tokens, the evicted ones among them.
        indices
            `[B, Hkv, n]`, those that are evicted, from the most attention to the least.
        """

    def buckets(self) -> list[Bucket]:
        """Return the heavy tokens, then the tail."""
        return [part.as_bucket() for part in (self.heavy, self.tail) if part is not None]

    def absorb(self, keys: mx.array, values: mx.array, mass: mx.array | None) -> None:
        """Count the attention of the chunk's queries, append the chunk to the tail, flush whole intervals."""
        assert mass is not None  # since observation_window is never 0
        self.tail = append_chunk(self.tail, keys, values)
        sketch_keys = self._sketch_keys()
        attention = self._to_tables(mass[..., -sketch_keys.shape[1] :])
        fade = self.config.decay ** min(keys.shape[2], self.config.queries)
        past = self.sketch.empty(len(attention)) if self.counters is None else fade * self.counters
        self.counters = self.sketch.update(past, sketch_keys, attention)
        if self.config.target:
            old = self.evicted_attention
            self.evicted_attention = mx.zeros(len(attention)) if old is None else fade * old
        leaving = self._flushed_tokens() - (self.offset - self.tail.tokens)
        if leaving > 0:
            # The chunk's attention is known exactly: only what came before is asked of the sketch.
            self._flush_tail(leaving, sketch_keys, self.sketch.query(past, sketch_keys) + attention)

    def _trim(self, count: int) -> None:
        """Drop the last tokens of the tail; attention that the trimmed tokens' queries gave stays counted."""
        assert self.tail is not None
        assert self.heavy is None  # else tokens have been evicted
        self.tail = self.tail.copy_tokens(0, -count)

    def _target_sizes(self) -> tuple[int, int]:
        """Return how many heavy and how many recent tokens there should be."""
        return max(1, round(self.size_factor * self.config.heavy)), round(self.size_factor * self.config.recent)

    def _flushed_tokens(self) -> int:
        """Return how many tokens of the text have left the tail: whole intervals, and none while all tokens fit."""
        (heavy, recent), interval = self._target_sizes(), self.config.interval
        if self.offset < self.config.sinks + heavy + self.merged_entries + recent + interval:
            return 0
        return (self.offset - recent) // interval * interval

    def _flush_tail(self, leaving: int, sketch_keys: mx.array, attention: mx.array) -> None:
        """Move the oldest `leaving` tokens of the tail to the heavy ones, then evict those with least attention.

        `attention` `[N, T]` is of the heavy tokens and the tail, as `sketch_keys` are.
        """
        assert self.tail is not None
        sinks, (room, _) = self.config.sinks, self._target_sizes()
        old = KeysValues(*(part[..., :leaving, :] for part in self.tail))
        tokens = old if self.heavy is None else self.heavy.append(old)
        self.tail = self.tail.copy_tokens(leaving)
        ranking = sinks + mx.argsort(-attention[:, sinks : tokens.tokens], axis=-1)
        first = mx.broadcast_to(mx.arange(sinks, dtype=ranking.dtype), (len(ranking), sinks))
        stay = mx.sort(mx.concatenate([first, ranking[:, :room]], axis=-1), axis=-1)
        if self.config.sketch != "race":
            positions = mx.take_along_axis(sketch_keys, stay, axis=-1)
            self.positions = positions.reshape(len(tokens.keys), -1, stay.shape[-1])
        self.heavy = gather_tokens(tokens, self._to_heads(stay))
        if tokens.tokens - sinks > room:
            self.evict(tokens, self._to_heads(ranking[:, room:]))
        if self.config.target:
            self._update_controller(mx.take_along_axis(attention, ranking[:, room:], axis=-1).sum(axis=-1))

    def _update_controller(self, evicted: mx.array) -> None:
        """Scale the sizes by the coverage that the interval before found; `evicted` `[N]` is attention just evicted."""
        assert self.counters is not None
        assert self.evicted_attention is not None
        if self.coverage is not None:
            step = GROW if cast(float, self.coverage.item()) < self.config.target else SHRINK
            self.size_factor = min(MAX_SCALE, max(MIN_SCALE, step * self.size_factor))
        self.evicted_attention = self.evicted_attention + evicted
        self.coverage = 1 - (self.evicted_attention / self.counters[:, 0].sum(axis=-1)).mean()

    def _sketch_keys(self) -> mx.array:
        """Return the sketch's keys of heavy tokens and tail: positions `[N, T]`, or for RACE vectors `[N, T, D]`."""
        assert self.tail is not None
        B, H, T, _ = self.tail.keys.shape
        if self.config.sketch == "race":
            keys = self.tail.keys if self.heavy is None else mx.concatenate([self.heavy.keys, self.tail.keys], axis=2)
            if self.config.per == "layer":
                keys = keys.swapaxes(1, 2).reshape(B, 1, keys.shape[2], -1)
            return keys.reshape(-1, *keys.shape[2:])
        tables = B * (H if self.config.per == "head" else 1)
        tail = mx.broadcast_to(mx.arange(self.offset - T, self.offset), (tables, T))
        if self.positions is None:
            return tail
        return mx.concatenate([self.positions.reshape(tables, -1), tail], axis=-1)

    def _to_tables(self, attention: mx.array) -> mx.array:
        """Return `[B, Hkv, T]` as `[N, T]`: a table for each head, or the sum over heads."""
        if self.config.per == "layer":
            return attention.sum(axis=1)
        return attention.reshape(-1, attention.shape[-1])

    def _to_heads(self, indices: mx.array) -> mx.array:
        """Return `[N, n]` as `[B, Hkv, n]`: each head's own, or the same for all heads."""
        heads, n = self.slots[0].heads, indices.shape[-1]
        if self.config.per == "layer":
            return mx.broadcast_to(indices[:, None], (len(indices), heads, n))
        return indices.reshape(-1, heads, n)


def gather_tokens(tokens: KeysValues, indices: mx.array) -> KeysValues:
    """Return some tokens, another choice for each head.

    Parameters
    ----------
    tokens
        T tokens of H heads.
    indices
        `[B, H, n]`.

    Returns
    -------
    KeysValues
        n tokens of each head.
    """
    B, H = indices.shape[:2]
    rows = mx.arange(B)[:, None, None], mx.arange(H)[:, None], indices
    return KeysValues(tokens.keys[rows], tokens.values[rows])
