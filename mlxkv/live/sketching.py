"""Base class of methods that keep the newest tokens and those that got most attention, as estimated by a sketch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, cast

import mlx.core as mx

from mlxkv.config import Config, choice, integer, number
from mlxkv.errors import FormatError, InputError, UnsupportedError
from mlxkv.kernels.decode_attention import Bucket
from mlxkv.live.arrays import iter_arrays
from mlxkv.live.base import KeysValues, append_chunk
from mlxkv.live.checks import check_array, check_ascending, check_values
from mlxkv.live.counting import CountedRows
from mlxkv.live.in_place import Field, InPlaceCache
from mlxkv.live.sketches import SKETCHES
from mlxkv.spec import CacheSpec

PER = ("head", "layer")
MIN_SCALE, MAX_SCALE = 0.5, 2.0  # limits of the controller's factor of `heavy` and `recent`
SHRINK, GROW = 0.9, 1.25  # its steps: grow quickly, shrink slowly


@dataclass(frozen=True, kw_only=True)
class SketchConfig(Config):
    """Settings common to all sketch methods.

    Parameters
    ----------
    sinks
        Number of first tokens, which always stay.
    heavy
        Number of tokens that stay because they got most attention.
    recent
        Minimal number of newest tokens that stay.
    interval
        Number of tokens that leave the tail of newest tokens together.
    sketch
        The sketch that counts attention: "count-min", "count-sketch" or "race".
    width
        Counters per row of the sketch; a power of 2 for "race".
    depth
        Rows of the sketch.
    seed
        Seed of the sketch's hash functions.
    per
        "head": each kv head has a sketch and selects tokens by itself; "layer": all kv heads share both.
    queries
        Number of queries at the end of each chunk whose attention is counted.
    decay
        Factor by which earlier attention fades with each query that is counted.
    target
        Share of the counted attention that should belong to tokens still kept; a controller scales `heavy` and `recent`
        to reach it. 0 turns the controller off.
    """

    sinks: int = integer(4)
    heavy: int = integer(252, least=1)
    recent: int = integer(248)
    interval: int = integer(16, least=1)
    sketch: str = choice("count-min", SKETCHES)
    width: int = integer(256, least=1, most=2**20)
    depth: int = integer(2, least=1, most=64)
    seed: int = integer(0, most=2**63 - 1)
    per: str = choice("head", PER)
    queries: int = integer(256, least=1)
    decay: float = number(0.99, above=0, most=1)
    target: float = number(0.0, least=0, below=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        SKETCHES[self.sketch](self.width, self.depth, self.seed)  # refuses widths that the sketch cannot have
        if self.target and self.sketch != "count-min":
            raise InputError(f"target needs count-min, whose rows add up to all that was counted, not {self.sketch}")


class SketchedRows(CountedRows):
    """Rows of a sketching cache; their attention is what they got since they were made, fading.

    Attributes
    ----------
    fields
        Fields of the state that are beside the rows, as they were then.
    left
        Number of tokens that have left the tail.
    leaving_at
        Number of tokens seen when the next leave it.
    heavy, in_tail
        Numbers of heavy tokens and of those in the tail.
    steps
        Number of tokens written.
    """

    fields: dict[str, Any]
    left = leaving_at = heavy = in_tail = steps = 0

    def arrays(self) -> list[mx.array]:
        """Return all arrays held.

        Returns
        -------
        list of mx.array
            Those of the rows, then those of other fields.
        """
        return [*super().arrays(), *iter_arrays(self.fields)]


class SketchingCache(InPlaceCache):
    """Base class of methods that keep the newest tokens and those that got most attention, as estimated by a sketch.

    The cache has two parts. `tail` holds the newest tokens. `heavy` holds the sinks and the older tokens that were
    selected, in the order of the text. While all tokens fit, all are in the tail. Later, tokens leave the tail in
    groups of `interval`: they join the heavy tokens, and those with the smallest estimates are evicted. How many tokens
    leave depends only on how many have come, not on how the text was split into chunks. A method implements `evict` if
    evicted tokens are not simply dropped.

    The controller (`target`) sets one size for all sequences of a batch. At the end of an interval it reads a value
    that was computed an interval earlier, so it does not wait for the device in practice.

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
        `[B or B * Hkv, depth, width]` float32, the sketch: attention by token, evicted tokens included.
    heavy
        Sinks and heavy tokens, None while all tokens are in the tail.
    positions
        Positions of the heavy tokens, `[B, 1 or Hkv, heavy]` int32, which are their keys in the sketch; None for RACE,
        where the key vectors themselves are.
    tail
        The newest tokens.
    evicted_attention
        `[B or B * Hkv]` float32, the attention of evicted tokens, fading; None if the controller is off.
    coverage
        Share of the counted attention that belongs to tokens still kept, as of the end of the last interval.
    size_factor
        Factor that the controller applies to `heavy` and `recent`.
    merged_entries
        Number of entries that the method holds for evicted tokens.

    Raises
    ------
    UnsupportedError
        For a controller with multi-head latent attention: layers would keep different numbers of tokens, but they share
        one mask.
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
    counters = Field[mx.array | None]()
    heavy = Field[KeysValues | None]()
    positions = Field[mx.array | None]()
    tail = Field[KeysValues | None]()
    evicted_attention = Field[mx.array | None]()
    merged_entries = 0
    _unmoved: ClassVar[tuple[str, ...]] = ("counters", "positions", "evicted_attention")  # beside rows

    def __init__(self, config: SketchConfig, spec: CacheSpec, layer: int) -> None:
        super().__init__(config, spec, layer)
        if config.target and self.latent:
            raise UnsupportedError("an MLA model's layers must keep equally many tokens: leave target at 0")
        self.observation_window = config.queries
        self.sketch = SKETCHES[config.sketch](config.width, config.depth, config.seed + layer)
        self.counters = self.heavy = self.positions = self.tail = self.evicted_attention = None
        self.coverage: mx.array | None = None
        self.size_factor = 1.0

    def evict(self, tokens: KeysValues, indices: mx.array) -> None:
        """Process tokens that are about to be evicted; by default they are dropped.

        Parameters
        ----------
        tokens
            T tokens, which include the evicted ones.
        indices
            Indices of the evicted tokens, `[B, Hkv, n]`, most attention first.
        """

    def parts(self) -> list[KeysValues]:
        """Return all stored tokens in the order of `buckets`.

        Returns
        -------
        list of KeysValues
            The heavy tokens, then the tail, as far as there are any.
        """
        return [part for part in (self.heavy, self.tail) if part is not None]

    def buckets(self) -> list[Bucket]:
        """Return all stored tokens."""
        return [part.as_bucket() for part in self.parts()]

    def check_state(self) -> None:
        """Check what every method has, then the sketch, the positions of heavy tokens and the controller's numbers."""
        super().check_state()
        config, stored = self.config, self.buckets()
        if not MIN_SCALE <= self.size_factor <= MAX_SCALE:
            raise FormatError(f"size_factor is {self.size_factor}, not {MIN_SCALE} to {MAX_SCALE}")
        if self.tail is None:
            if stored or self.offset:
                raise FormatError("there is no tail")
            return
        tables = self.tail.keys.shape[0] * (self.slots[0].heads if config.per == "head" else 1)
        check_array(self.counters, "counters", (tables, config.depth, config.width), mx.float32)
        left = self.offset - self.tail.tokens
        if left % config.interval or (self.heavy is None) != (left == 0):
            raise FormatError(f"{left} of {self.offset} tokens have left the tail, in intervals of {config.interval}")
        if self.heavy is not None:
            self._check_heavy(self.heavy.tokens, tables, left)
        elif self.positions is not None:
            raise FormatError("positions are there, but no heavy tokens")
        for name, value, shape in (
            ("evicted_attention", self.evicted_attention, (tables,)),
            ("coverage", self.coverage, ()),
        ):
            if value is not None or (config.target and (name != "coverage" or left)):
                check_array(value, name, shape, mx.float32)
            if value is not None and not config.target:
                raise FormatError(f"{name} is there, but the controller is off")

    def _check_heavy(self, heavy: int, tables: int, left: int) -> None:
        """Check the number of heavy tokens and their positions: each once, and of tokens that have left the tail."""
        sinks, most = self.config.sinks, round(MAX_SCALE * self.config.heavy)
        if not sinks < heavy <= min(left, sinks + most):
            raise FormatError(f"there are {heavy} heavy tokens and sinks, of {left} tokens; {sinks} are sinks")
        if self.config.sketch == "race":
            if self.positions is not None:
                raise FormatError("positions are there, which this sketch does not use")
            return
        assert self.tail is not None
        batch = self.tail.keys.shape[0]
        check_array(self.positions, "positions", (batch, tables // batch, heavy), mx.int32)
        assert self.positions is not None
        check_values(self.positions, "positions", 0, left - 1)
        check_ascending(self.positions, "positions")

    def absorb(self, keys: mx.array, values: mx.array, mass: mx.array | None) -> None:
        """Append the chunk to the tail, count the attention of its queries, and flush complete intervals."""
        assert mass is not None  # since observation_window is never 0
        self.tail = append_chunk(self.tail, keys, values)
        sketch_keys = self._sketch_keys(self.heavy, self.positions, self.tail, self.offset)
        attention = self._to_tables(mass[..., -sketch_keys.shape[1] :])
        fade = self.config.decay ** min(keys.shape[2], self.config.queries)
        past = self.sketch.empty(len(attention)) if self.counters is None else fade * self.counters
        self.counters = self.sketch.update(past, sketch_keys, attention)
        if self.config.target:
            old = self.evicted_attention
            self.evicted_attention = mx.zeros(len(attention)) if old is None else fade * old
        leaving = self._flushed_tokens() - (self.offset - self.tail.tokens)
        if leaving > 0:
            # The chunk's attention is known exactly: the sketch estimates only the attention before it.
            self._flush_tail(leaving, sketch_keys, self.sketch.query(past, sketch_keys) + attention)

    def _target_sizes(self) -> tuple[int, int]:
        """Return the current target numbers of heavy and of recent tokens."""
        return max(1, round(self.size_factor * self.config.heavy)), round(self.size_factor * self.config.recent)

    def _flushed_tokens(self) -> int:
        """Return how many tokens should have left the tail: whole intervals, and none while all tokens fit."""
        (heavy, recent), interval = self._target_sizes(), self.config.interval
        if self.offset < self.config.sinks + heavy + self.merged_entries + recent + interval:
            return 0
        return (self.offset - recent) // interval * interval

    def _flush_tail(self, leaving: int, sketch_keys: mx.array, attention: mx.array) -> None:
        """Move the oldest `leaving` tokens of the tail to the heavy tokens, then evict those with least attention.

        `sketch_keys` and `attention` `[N, T]` cover the heavy tokens, then the tail.
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

    def _leaving_at(self, left: int) -> int:
        """Return how many tokens have been seen when the next leave the tail, of which `left` have left."""
        (heavy, recent), interval = self._target_sizes(), self.config.interval
        return max(self.config.sinks + heavy + self.merged_entries + recent + interval, left + recent + interval)

    def _open_rows(self) -> SketchedRows | None:
        """Return rows of all that is stored, unless tokens leave the tail with the next."""
        rows: SketchedRows | None = self._rows
        if rows is None:
            if self.tail is None or self._offset >= self._leaving_at(self._offset - 1 - self.tail.tokens):
                return None
            return self._new_rows()
        if self._offset >= rows.leaving_at:
            return None
        if rows.used == rows.room:
            self._settle()
            return self._new_rows()
        return rows

    def _new_rows(self) -> SketchedRows:
        """Move all that is stored into rows."""
        assert self.tail is not None
        parts, left = self.parts(), self._offset - 1 - self.tail.tokens
        leaving_at = self._leaving_at(left)
        tokens = KeysValues(*(mx.concatenate([*same], axis=2) for same in zip(*parts)))
        rows = SketchedRows(
            tokens, mx.zeros(tokens.keys.shape[:3]), tokens.tokens + leaving_at - self._offset, self.score_bias()
        )
        rows.left, rows.leaving_at, rows.in_tail = left, leaving_at, self.tail.tokens
        rows.heavy = 0 if self.heavy is None else self.heavy.tokens
        rows.fields = {name: getattr(self, name) for name in self._unmoved}
        self.__dict__.update(dict.fromkeys(("heavy", "tail", *self._unmoved)))
        return rows

    def _attend_rows(
        self, rows: SketchedRows, queries: mx.array, token: KeysValues, scale: float, sinks: mx.array | None
    ) -> mx.array:
        """Attend to all tokens; the sketch is told of what they get when tokens leave the tail."""
        output, mass = rows.attend(queries, token, scale, sinks)
        rows.attention = rows.attention * self.config.decay + mass
        rows.steps += 1
        rows.in_tail += 1
        return mx.depends(output, [rows.attention])

    def _settled(self, rows: SketchedRows) -> dict[str, Any]:
        """Return all fields, with a sketch that has been told of the attention."""
        fields, used = dict(rows.fields), rows.used
        start = used - rows.in_tail - rows.heavy
        heavy = rows.tokens(start, start + rows.heavy) if rows.heavy else None
        tail = rows.tokens(start + rows.heavy, used)
        if rows.steps:
            fade = self.config.decay**rows.steps
            keys = self._sketch_keys(heavy, fields["positions"], tail, rows.left + rows.in_tail)
            attention = self._to_tables(rows.attention[..., start:used])
            fields["counters"] = self.sketch.update(fade * fields["counters"], keys, attention)
            if fields["evicted_attention"] is not None:
                fields["evicted_attention"] = fade * fields["evicted_attention"]
        return {**fields, "heavy": heavy, "tail": tail}

    def _update_controller(self, evicted: mx.array) -> None:
        """Scale the sizes by the previous interval's coverage; `evicted` `[N]` is the attention just evicted."""
        assert self.counters is not None
        assert self.evicted_attention is not None
        if self.coverage is not None:
            step = GROW if cast(float, self.coverage.item()) < self.config.target else SHRINK
            self.size_factor = min(MAX_SCALE, max(MIN_SCALE, step * self.size_factor))
        self.evicted_attention = self.evicted_attention + evicted
        self.coverage = 1 - (self.evicted_attention / self.counters[:, 0].sum(axis=-1)).mean()

    def _sketch_keys(
        self, heavy: KeysValues | None, positions: mx.array | None, tail: KeysValues, seen: int
    ) -> mx.array:
        """Return the sketch's keys of heavy tokens and tail: positions `[N, T]`, or for RACE vectors `[N, T, D]`."""
        B, H, T, _ = tail.keys.shape
        if self.config.sketch == "race":
            keys = tail.keys if heavy is None else mx.concatenate([heavy.keys, tail.keys], axis=2)
            if self.config.per == "layer":
                keys = keys.swapaxes(1, 2).reshape(B, 1, keys.shape[2], -1)
            return keys.reshape(-1, *keys.shape[2:])
        tables = B * (H if self.config.per == "head" else 1)
        newest = mx.broadcast_to(mx.arange(seen - T, seen), (tables, T))
        if positions is None:
            return newest
        return mx.concatenate([positions.reshape(tables, -1), newest], axis=-1)

    def _to_tables(self, attention: mx.array) -> mx.array:
        """Return `[B, Hkv, T]` as `[N, T]`: one table per head, or the sum over heads."""
        if self.config.per == "layer":
            return attention.sum(axis=1)
        return attention.reshape(-1, attention.shape[-1])

    def _to_heads(self, indices: mx.array) -> mx.array:
        """Return indices `[N, n]` as `[B, Hkv, n]`: those of each head, or the same for all heads."""
        heads, n = self.slots[0].heads, indices.shape[-1]
        if self.config.per == "layer":
            return mx.broadcast_to(indices[:, None], (len(indices), heads, n))
        return indices.reshape(-1, heads, n)


def gather_tokens(tokens: KeysValues, indices: mx.array) -> KeysValues:
    """Gather tokens, with different indices for each head.

    Parameters
    ----------
    tokens
        T tokens in each of H heads.
    indices
        `[B, H, n]`.

    Returns
    -------
    KeysValues
        n tokens per head.
    """
    B, H = indices.shape[:2]
    rows = mx.arange(B)[:, None, None], mx.arange(H)[:, None], indices
    return KeysValues(tokens.keys[rows], tokens.values[rows])
