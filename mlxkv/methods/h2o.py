"""H2O: the heavy hitters, tokens that have drawn most attention so far, and a window of the last tokens.

https://arxiv.org/abs/2306.14048
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import mlx.core as mx

from mlxkv.cache import CacheSpec, is_whole
from mlxkv.errors import InputError
from mlxkv.kernels.decode_attention import Bucket
from mlxkv.live import LayerCache, narrowed, own, raw

METHOD = "h2o"


@dataclass(frozen=True)
class Settings:
    """heavy: tokens that stay because they drew most attention. recent: last tokens that stay besides.
    Raises InputError for impossible ones."""

    heavy: int = 256
    recent: int = 256

    def __post_init__(self) -> None:
        if not is_whole(self.heavy, least=1) or not is_whole(self.recent):
            raise InputError(f"heavy must be 1 or more and recent 0 or more, not {self.heavy!r} and {self.recent!r}")


class Cache(LayerCache):
    """Each kv head keeps tokens of its own, in the order they came. `tokens` are keys, values and `[B, Hkv, kept]`
    float32: the attention that each has drawn from all queries since it came, its own included.

    Departs from the paper in grouped queries, whose attention is summed for their kv head, and in prefill, where tokens
    are given up once a chunk and not once a token. As there, tokens keep their own positions, first tokens are nothing
    special, and attention never fades. After `trim` what the trimmed tokens' queries paid attention to stays counted.
    """

    HELD = ("tokens",)
    mass_queries = sys.maxsize
    settings: Settings

    def __init__(self, settings: Settings, spec: CacheSpec, layer: int) -> None:
        super().__init__(settings, spec, layer)
        self.tokens: tuple[mx.array, mx.array, mx.array] | None = None

    def buckets(self) -> list[Bucket]:
        return [] if self.tokens is None else [(raw(self.tokens[0]), raw(self.tokens[1]))]

    def absorb(self, keys: mx.array, values: mx.array, mass: mx.array | None) -> None:
        assert mass is not None  # mass_queries asks for it
        keys, values, drawn = narrowed(keys), narrowed(values), mx.zeros(keys.shape[:3])
        if self.tokens is not None:
            keys, values, drawn = (mx.concatenate([*pair], axis=2) for pair in zip(self.tokens, (keys, values, drawn)))
        self.tokens = keys, values, drawn + mass
        if keys.shape[2] > self.settings.heavy + self.settings.recent:
            self.tokens = self._survivors(*self.tokens)

    def _survivors(self, keys: mx.array, values: mx.array, drawn: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """The recent tokens and, of those before them, each head's heaviest."""
        B, H, T = drawn.shape
        last = T - self.settings.recent
        heavy = mx.argpartition(-drawn[..., :last], self.settings.heavy - 1, axis=-1)[..., : self.settings.heavy]
        recent = mx.broadcast_to(mx.arange(last, T, dtype=heavy.dtype), (B, H, T - last))
        kept = mx.concatenate([mx.sort(heavy, axis=-1), recent], axis=-1)
        rows = mx.arange(B)[:, None, None], mx.arange(H)[:, None], kept
        return keys[rows], values[rows], drawn[rows]

    def cut(self, count: int) -> None:
        if self.tokens is not None:
            keys, values, drawn = (own(part[:, :, :-count]) for part in self.tokens)
            self.tokens = keys, values, drawn
