"""What methods share that ask a sketch which tokens have drawn most attention, to keep those and the newest as they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlxkv.cache import CacheSpec, is_whole
from mlxkv.errors import InputError, UnsupportedError
from mlxkv.kernels.decode_attention import Bucket
from mlxkv.live import LayerCache, narrowed, own, raw
from mlxkv.sketches import SKETCHES

PER = ("head", "layer")
NARROWEST, WIDEST = 0.5, 2.0  # times `heavy` and `recent`: as far as the controller goes
NARROWER, WIDER = 0.9, 1.25  # its steps: quick to keep more, slow to keep less


@dataclass(frozen=True)
class SketchSettings:
    """heavy: tokens that stay because they drew most attention. sinks, recent: first and last tokens that stay besides;
    `interval` tokens leave the last together. sketch, width, depth, seed: what counts the attention, as in
    mlxkv/sketches.py. per: whether each kv head or each layer has a sketch and a choice of tokens. queries: of a chunk
    that are asked what they attend to, the last ones. decay: what was counted before fades by it with each query of a
    chunk that is asked. target: the share of the counted attention that went to tokens still kept exactly, which the
    controller holds by widening and narrowing `heavy` and `recent`; 0 leaves them as they are. Raises InputError for
    impossible ones.
    """

    sinks: int = 4
    heavy: int = 252
    recent: int = 248
    interval: int = 16
    sketch: str = "count-min"
    width: int = 256
    depth: int = 2
    seed: int = 0
    per: str = "head"
    queries: int = 256
    decay: float = 0.99
    target: float = 0.0

    def __post_init__(self) -> None:
        for name, least in (("sinks", 0), ("heavy", 1), ("recent", 0), ("interval", 1), ("queries", 1)):
            if not is_whole(getattr(self, name), least):
                raise InputError(f"{name} must be {least} or more, not {getattr(self, name)!r}")
        for name, known in (("sketch", tuple(SKETCHES)), ("per", PER)):
            if getattr(self, name) not in known:
                raise InputError(f"{name} must be one of {', '.join(known)}, not {getattr(self, name)!r}")
        SKETCHES[self.sketch](self.width, self.depth, self.seed)  # checks these three
        if type(self.decay) not in (int, float) or not 0 < self.decay <= 1:
            raise InputError(f"decay must be more than 0 and at most 1, not {self.decay!r}")
        if type(self.target) not in (int, float) or not 0 <= self.target < 1:
            raise InputError(f"target must be 0 or more and less than 1, not {self.target!r}")
        if self.target and self.sketch != "count-min":
            raise InputError(f"target needs count-min, whose rows add up to all that was counted, not {self.sketch}")


class SketchingCache(LayerCache):
    """`heavy`, in the order they came, the sinks first; then `tail`, the newest. While all fit, all are the tail. How many
    tokens leave it follows from how many have come, not from their chunks; which of them stay, from the sketch.

    `counters` `[B or B * Hkv, depth, width]` collect attention by token position, also of tokens that are given up later:
    what they drew fades by `decay`. `positions` `[B, 1 or Hkv, heavy]` int32 are how heavy tokens are found in them;
    RACE finds them by their keys. A method says in `give_up` what becomes of the others, and has room for `entries`.

    The controller (`target`) reads at an interval's end what the one before computed, which has long been evaluated, for
    all rows of a batch together. Layers then keep different numbers of tokens, and MLA's one mask for all cannot have
    that: UnsupportedError.
    """

    HELD: tuple[str, ...] = ("counters", "heavy", "positions", "tail", "lost", "covered", "scale")
    entries = 0
    settings: Any

    def __init__(self, settings: SketchSettings, spec: CacheSpec, layer: int) -> None:
        super().__init__(settings, spec, layer)
        if settings.target and self.latent:
            raise UnsupportedError("an MLA model's layers must keep equally many tokens: leave target at 0")
        self.mass_queries = settings.queries
        self.sketch = SKETCHES[settings.sketch](settings.width, settings.depth, settings.seed + layer)
        self.counters: mx.array | None = None
        self.heavy: tuple[mx.array, mx.array] | None = None
        self.positions: mx.array | None = None
        self.tail: tuple[mx.array, mx.array] | None = None
        self.lost: mx.array | None = None
        self.covered: mx.array | None = None
        self.scale = 1.0

    def give_up(self, keys: mx.array, values: mx.array, places: mx.array) -> None:
        """Take leave of tokens: those at places `[B, Hkv, n]`, falling in attention, of keys and values `[B, Hkv, T, D]`."""

    def buckets(self) -> list[Bucket]:
        return [(raw(part[0]), raw(part[1])) for part in (self.heavy, self.tail) if part is not None]

    def absorb(self, keys: mx.array, values: mx.array, mass: mx.array | None) -> None:
        assert mass is not None  # since mass_queries is never 0
        chunk = narrowed(keys), narrowed(values)
        self.tail = chunk if self.tail is None else _joined(self.tail, chunk)
        names = self._names()
        drawn = self._by_table(mass[..., -names.shape[1] :])
        fade = self.settings.decay ** min(keys.shape[2], self.settings.queries)
        past = self.sketch.empty(len(drawn)) if self.counters is None else fade * self.counters
        self.counters = self.sketch.update(past, names, drawn)
        if self.settings.target:
            self.lost = mx.zeros(len(drawn)) if self.lost is None else fade * self.lost
        leaving = self._settled() - (self.offset - self.tail[0].shape[2])
        if leaving > 0:
            # What the chunk drew is known exactly: only what was before is asked of the sketch.
            self._settle(leaving, names, self.sketch.query(past, names) + drawn)

    def cut(self, count: int) -> None:
        """What the trimmed tokens' queries paid attention to stays counted."""
        assert self.tail is not None
        assert self.heavy is None  # else tokens have been given up
        self.tail = own(self.tail[0][..., :-count, :]), own(self.tail[1][..., :-count, :])

    def _sizes(self) -> tuple[int, int]:
        """How many heavy and how many recent tokens there are to be."""
        return max(1, round(self.scale * self.settings.heavy)), round(self.scale * self.settings.recent)

    def _settled(self) -> int:
        """Tokens of the text that have left the tail: whole intervals, and none while all tokens fit."""
        (heavy, recent), interval = self._sizes(), self.settings.interval
        if self.offset < self.settings.sinks + heavy + self.entries + recent + interval:
            return 0
        return (self.offset - recent) // interval * interval

    def _settle(self, leaving: int, names: mx.array, drawn: mx.array) -> None:
        """The oldest `leaving` tokens of the tail join the heavy ones, of which then the lightest go. drawn `[N, T]`: the
        attention of heavy tokens and tail, names as in `_names`."""
        assert self.tail is not None
        sinks, (room, _) = self.settings.sinks, self._sizes()
        old = tuple(part[..., :leaving, :] for part in self.tail)
        keys, values = old if self.heavy is None else _joined(self.heavy, old)
        self.tail = own(self.tail[0][..., leaving:, :]), own(self.tail[1][..., leaving:, :])
        T = keys.shape[2]
        ranking = sinks + mx.argsort(-drawn[:, sinks:T], axis=-1)
        first = mx.broadcast_to(mx.arange(sinks, dtype=ranking.dtype), (len(ranking), sinks))
        stay = mx.sort(mx.concatenate([first, ranking[:, :room]], axis=-1), axis=-1)
        if self.settings.sketch != "race":
            self.positions = mx.take_along_axis(names, stay, axis=-1).reshape(len(keys), -1, stay.shape[-1])
        stay = self._by_head(stay)
        self.heavy = taken(keys, stay), taken(values, stay)
        if T - sinks > room:
            self.give_up(keys, values, self._by_head(ranking[:, room:]))
        if self.settings.target:
            self._steer(mx.take_along_axis(drawn, ranking[:, room:], axis=-1).sum(axis=-1))

    def _steer(self, drawn: mx.array) -> None:
        """One step of the controller, by what the interval before found covered. drawn `[N]`: by tokens just given up."""
        assert self.counters is not None
        assert self.lost is not None
        if self.covered is not None:
            step = WIDER if self.covered.item() < self.settings.target else NARROWER
            self.scale = min(WIDEST, max(NARROWEST, step * self.scale))
        self.lost = self.lost + drawn
        self.covered = 1 - (self.lost / self.counters[:, 0].sum(axis=-1)).mean()

    def _names(self) -> mx.array:
        """What the sketch knows the heavy tokens and the tail by: `[N, T]` positions, or vectors `[N, T, D]` for RACE."""
        assert self.tail is not None
        B, H, T, _ = self.tail[0].shape
        if self.settings.sketch == "race":
            keys = self.tail[0] if self.heavy is None else mx.concatenate([self.heavy[0], self.tail[0]], axis=2)
            if self.settings.per == "layer":
                keys = keys.swapaxes(1, 2).reshape(B, 1, keys.shape[2], -1)
            return keys.reshape(-1, *keys.shape[2:])
        parts = H if self.settings.per == "head" else 1
        tail = mx.broadcast_to(mx.arange(self.offset - T, self.offset), (B * parts, T))
        if self.positions is None:
            return tail
        return mx.concatenate([self.positions.reshape(B * parts, -1), tail], axis=-1)

    def _by_table(self, drawn: mx.array) -> mx.array:
        """`[B, Hkv, T]` as `[N, T]`: apart, or the sum over heads."""
        if self.settings.per == "layer":
            return drawn.sum(axis=1)
        return drawn.reshape(-1, drawn.shape[-1])

    def _by_head(self, places: mx.array) -> mx.array:
        """`[N, n]` as `[B, Hkv, n]`: apart, or the same for all heads."""
        heads, n = self.slots[0].heads, places.shape[-1]
        if self.settings.per == "layer":
            return mx.broadcast_to(places[:, None], (len(places), heads, n))
        return places.reshape(-1, heads, n)


def taken(x: mx.array, places: mx.array) -> mx.array:
    """Rows places `[B, H, n]` of x `[B, H, T, D]`, another choice for each head."""
    B, H = places.shape[:2]
    return x[mx.arange(B)[:, None, None], mx.arange(H)[:, None], places]


def _joined(first: tuple[mx.array, ...], second: tuple[mx.array, ...]) -> tuple[mx.array, mx.array]:
    keys, values = (mx.concatenate([*pair], axis=2) for pair in zip(first, second))
    return keys, values
