"""What methods share that ask a sketch which tokens have drawn most attention, to keep those and the newest as they are."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from mlxkv.config import Config, choice, integer, number
from mlxkv.errors import InputError, UnsupportedError
from mlxkv.kernels.decode_attention import Bucket
from mlxkv.live.base import LayerCache, copy_without_parent, to_storage_dtype, unquantized
from mlxkv.live.sketches import SKETCHES
from mlxkv.spec import CacheSpec

PER = ("head", "layer")
MIN_SCALE, MAX_SCALE = 0.5, 2.0  # times `heavy` and `recent`: as far as the controller goes
SHRINK, GROW = 0.9, 1.25  # its steps: quick to keep more, slow to keep less


@dataclass(frozen=True, kw_only=True)
class SketchConfig(Config):
    """Settings that all sketch methods have.

    Parameters
    ----------
    sinks, recent
        First and newest tokens that stay.
    heavy
        Tokens that stay because they drew most attention.
    interval
        Tokens that leave the recent ones together.
    sketch, width, depth, seed
        What counts the attention, as in mlxkv/live/sketches.py.
    per
        Whether each kv "head" or each "layer" has a sketch and a choice of tokens.
    queries
        Queries of a chunk that are asked what they attend to, the last ones.
    decay
        What was counted before fades by it with each query of a chunk that is asked.
    target
        The share of the counted attention that went to tokens still kept exactly, which the controller holds by widening
        and narrowing `heavy` and `recent`; 0 leaves them as they are.
    """

    sinks: int = integer(4)
    heavy: int = integer(252, least=1)
    recent: int = integer(248)
    interval: int = integer(16, least=1)
    sketch: str = choice("count-min", SKETCHES)
    width: int = 256
    depth: int = 2
    seed: int = 0
    per: str = choice("head", PER)
    queries: int = integer(256, least=1)
    decay: float = number(0.99, above=0, most=1)
    target: float = number(0.0, least=0, below=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        SKETCHES[self.sketch](self.width, self.depth, self.seed)  # checks these three
        if self.target and self.sketch != "count-min":
            raise InputError(f"target needs count-min, whose rows add up to all that was counted, not {self.sketch}")


class SketchingCache(LayerCache):
    """`heavy`, in the order they came, the sinks first; then `tail`, the newest. While all fit, all are the tail. How many
    tokens leave it follows from how many have come, not from their chunks; which of them stay, from the sketch.

    `counters` `[B or B * Hkv, depth, width]` collect attention by token position, also of tokens that are given up later:
    what they drew fades by `decay`. `positions` `[B, 1 or Hkv, heavy]` int32 are how heavy tokens are found in them;
    RACE finds them by their keys. A method says in `evict` what becomes of the others, and has room for `entries`.

    The controller (`target`) reads at an interval's end what the one before computed, which has long been evaluated, for
    all rows of a batch together. Layers then keep different numbers of tokens, and MLA's one mask for all cannot have
    that: UnsupportedError.
    """

    config: SketchConfig
    state_fields: tuple[str, ...] = ("counters", "heavy", "positions", "tail", "lost", "covered", "scale")
    entries = 0

    def __init__(self, config: SketchConfig, spec: CacheSpec, layer: int) -> None:
        super().__init__(config, spec, layer)
        if config.target and self.latent:
            raise UnsupportedError("an MLA model's layers must keep equally many tokens: leave target at 0")
        self.observation_window = config.queries
        self.sketch = SKETCHES[config.sketch](config.width, config.depth, config.seed + layer)
        self.counters: mx.array | None = None
        self.heavy: tuple[mx.array, mx.array] | None = None
        self.positions: mx.array | None = None
        self.tail: tuple[mx.array, mx.array] | None = None
        self.lost: mx.array | None = None
        self.covered: mx.array | None = None
        self.scale = 1.0

    def evict(self, keys: mx.array, values: mx.array, places: mx.array) -> None:
        """Take leave of tokens: those at places `[B, Hkv, n]`, falling in attention, of keys and values `[B, Hkv, T, D]`."""

    def buckets(self) -> list[Bucket]:
        return [(unquantized(part[0]), unquantized(part[1])) for part in (self.heavy, self.tail) if part is not None]

    def absorb(self, keys: mx.array, values: mx.array, mass: mx.array | None) -> None:
        assert mass is not None  # since observation_window is never 0
        chunk = to_storage_dtype(keys), to_storage_dtype(values)
        self.tail = chunk if self.tail is None else _concat(self.tail, chunk)
        names = self._names()
        drawn = self._by_table(mass[..., -names.shape[1] :])
        fade = self.config.decay ** min(keys.shape[2], self.config.queries)
        past = self.sketch.empty(len(drawn)) if self.counters is None else fade * self.counters
        self.counters = self.sketch.update(past, names, drawn)
        if self.config.target:
            self.lost = mx.zeros(len(drawn)) if self.lost is None else fade * self.lost
        leaving = self._flushed_tokens() - (self.offset - self.tail[0].shape[2])
        if leaving > 0:
            # What the chunk drew is known exactly: only what was before is asked of the sketch.
            self._flush_tail(leaving, names, self.sketch.query(past, names) + drawn)

    def _trim(self, count: int) -> None:
        """What the trimmed tokens' queries paid attention to stays counted."""
        assert self.tail is not None
        assert self.heavy is None  # else tokens have been given up
        self.tail = (
            copy_without_parent(self.tail[0][..., :-count, :]),
            copy_without_parent(self.tail[1][..., :-count, :]),
        )

    def _sizes(self) -> tuple[int, int]:
        """How many heavy and how many recent tokens there are to be."""
        return max(1, round(self.scale * self.config.heavy)), round(self.scale * self.config.recent)

    def _flushed_tokens(self) -> int:
        """Tokens of the text that have left the tail: whole intervals, and none while all tokens fit."""
        (heavy, recent), interval = self._sizes(), self.config.interval
        if self.offset < self.config.sinks + heavy + self.entries + recent + interval:
            return 0
        return (self.offset - recent) // interval * interval

    def _flush_tail(self, leaving: int, names: mx.array, drawn: mx.array) -> None:
        """The oldest `leaving` tokens of the tail join the heavy ones, of which then the lightest go. drawn `[N, T]`: the
        attention of heavy tokens and tail, names as in `_names`."""
        assert self.tail is not None
        sinks, (room, _) = self.config.sinks, self._sizes()
        old = tuple(part[..., :leaving, :] for part in self.tail)
        keys, values = old if self.heavy is None else _concat(self.heavy, old)
        self.tail = (
            copy_without_parent(self.tail[0][..., leaving:, :]),
            copy_without_parent(self.tail[1][..., leaving:, :]),
        )
        T = keys.shape[2]
        ranking = sinks + mx.argsort(-drawn[:, sinks:T], axis=-1)
        first = mx.broadcast_to(mx.arange(sinks, dtype=ranking.dtype), (len(ranking), sinks))
        stay = mx.sort(mx.concatenate([first, ranking[:, :room]], axis=-1), axis=-1)
        if self.config.sketch != "race":
            self.positions = mx.take_along_axis(names, stay, axis=-1).reshape(len(keys), -1, stay.shape[-1])
        stay = self._by_head(stay)
        self.heavy = gather_tokens(keys, stay), gather_tokens(values, stay)
        if T - sinks > room:
            self.evict(keys, values, self._by_head(ranking[:, room:]))
        if self.config.target:
            self._update_controller(mx.take_along_axis(drawn, ranking[:, room:], axis=-1).sum(axis=-1))

    def _update_controller(self, drawn: mx.array) -> None:
        """One step of the controller, by what the interval before found covered. drawn `[N]`: by tokens just given up."""
        assert self.counters is not None
        assert self.lost is not None
        if self.covered is not None:
            step = GROW if self.covered.item() < self.config.target else SHRINK
            self.scale = min(MAX_SCALE, max(MIN_SCALE, step * self.scale))
        self.lost = self.lost + drawn
        self.covered = 1 - (self.lost / self.counters[:, 0].sum(axis=-1)).mean()

    def _names(self) -> mx.array:
        """What the sketch knows the heavy tokens and the tail by: `[N, T]` positions, or vectors `[N, T, D]` for RACE."""
        assert self.tail is not None
        B, H, T, _ = self.tail[0].shape
        if self.config.sketch == "race":
            keys = self.tail[0] if self.heavy is None else mx.concatenate([self.heavy[0], self.tail[0]], axis=2)
            if self.config.per == "layer":
                keys = keys.swapaxes(1, 2).reshape(B, 1, keys.shape[2], -1)
            return keys.reshape(-1, *keys.shape[2:])
        parts = H if self.config.per == "head" else 1
        tail = mx.broadcast_to(mx.arange(self.offset - T, self.offset), (B * parts, T))
        if self.positions is None:
            return tail
        return mx.concatenate([self.positions.reshape(B * parts, -1), tail], axis=-1)

    def _by_table(self, drawn: mx.array) -> mx.array:
        """`[B, Hkv, T]` as `[N, T]`: apart, or the sum over heads."""
        if self.config.per == "layer":
            return drawn.sum(axis=1)
        return drawn.reshape(-1, drawn.shape[-1])

    def _by_head(self, places: mx.array) -> mx.array:
        """`[N, n]` as `[B, Hkv, n]`: apart, or the same for all heads."""
        heads, n = self.slots[0].heads, places.shape[-1]
        if self.config.per == "layer":
            return mx.broadcast_to(places[:, None], (len(places), heads, n))
        return places.reshape(-1, heads, n)


def gather_tokens(x: mx.array, places: mx.array) -> mx.array:
    """Rows places `[B, H, n]` of x `[B, H, T, D]`, another choice for each head."""
    B, H = places.shape[:2]
    return x[mx.arange(B)[:, None, None], mx.arange(H)[:, None], places]


def _concat(first: tuple[mx.array, ...], second: tuple[mx.array, ...]) -> tuple[mx.array, mx.array]:
    keys, values = (mx.concatenate([*pair], axis=2) for pair in zip(first, second))
    return keys, values
