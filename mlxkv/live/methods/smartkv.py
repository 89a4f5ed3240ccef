"""SmartKV: more bits for tokens that get more attention, within a byte budget."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import mlx.core as mx

from mlxkv.config import Config, choice, integer, number
from mlxkv.errors import FormatError, UnsupportedError
from mlxkv.kernels.bits import pack, unpack
from mlxkv.kernels.decode_attention import Bucket, decode_attention
from mlxkv.live.allocation import (
    Allocator,
    allocate_exact,
    allocate_greedy,
    allocate_uniform,
    layer_budget_factors,
)
from mlxkv.live.base import KeysValues, LayerCache, append_chunk, live_methods
from mlxkv.live.checks import check_array, check_kept, check_like
from mlxkv.live.importance import update_importance
from mlxkv.live.methods._smartkv_budget import TILE, TOP, bits_of, demotion_counts, layer_budget
from mlxkv.live.packing import concat_buckets, gather_rows, quantize_per_token, token_count
from mlxkv.live.storage import to_storage_dtype
from mlxkv.spec import CacheSpec

ALLOCATORS: dict[str, Allocator] = {"greedy": allocate_greedy, "exact": allocate_exact, "uniform": allocate_uniform}
ORDERS = ("importance", "random", "early", "late")
SPLITS = ("equal", "linear", "exponential")


@dataclass(frozen=True, kw_only=True)
class SmartKVConfig(Config):
    """Settings of SmartKV.

    Parameters
    ----------
    budget
        Maximal bytes, as a share of the unquantized cache at 2 bytes per element; scales, importance and unquantized
        tokens are included. Texts shorter than 100 to 400 tokens (depending on the heads) may exceed it.
    sinks
        Number of first tokens; they are the last to leave the 8-bit bucket.
    recent
        Minimal number of newest tokens that stay unquantized; more if the budget has room for all others in 8 bits.
    interval
        Maximal number of tokens that wait to be quantized together.
    decay
        Factor by which earlier attention fades with each query; with 1 importance is the sum of all attention.
    queries
        Number of queries at the end of a prefill chunk whose attention is counted.
    hysteresis
        Relative margin by which a token that has just been quantized must be more important than an older token of the
        8-bit bucket to stay there in its place.
    allocator
        Algorithm that decides how many tokens get each precision: "greedy", "exact" or "uniform".
    order
        Order in which tokens lose precision: least "importance" first, or one of the baselines "random", "early" (the
        first tokens keep most bits) and "late" (the last tokens do).
    layers
        Split of the budget over layers: "equal", or decreasing from the first layer to the last in equal differences
        ("linear") or by equal factors ("exponential").
    seed
        Seed of the random order.
    """

    budget: float = number(0.5, above=0, most=1)
    sinks: int = integer(4)
    recent: int = integer(4)
    interval: int = integer(16, least=1)
    decay: float = number(0.9, above=0, most=1)
    queries: int = integer(64, least=1)
    hysteresis: float = number(0.05, least=0)
    allocator: str = choice("exact", ALLOCATORS)
    order: str = choice("importance", ORDERS)
    layers: str = choice("equal", SPLITS)
    seed: int = integer(0, most=2**63 - 1)


class Packed(NamedTuple):
    """Buckets of a layer's packed tokens and the next flush, made anew when tokens are packed.

    Parameters
    ----------
    levels, top
        The low-bit buckets and the 8-bit bucket that it was made of.
    buckets
        Those that hold tokens, fewest bits first.
    flush
        Length of the text at which the tail may have to be flushed.
    """

    levels: list[Bucket | None]
    top: Bucket | None
    buckets: tuple[Bucket, ...]
    flush: int


@live_methods.register("smartkv")
class SmartKVCache(LayerCache):
    """SmartKV: more bits for tokens that get more attention, within a byte budget.

    New tokens wait unquantized in the tail. Every few tokens the oldest of them move to the 8-bit bucket. When the
    budget requires it, the tokens of the 8-bit bucket that get least attention, in each kv head by itself, are demoted:
    they move to a bucket of fewer bits, 32 at a time, and stay there. The low-bit buckets quantize keys of 4 bits or
    fewer by channel, with one scale per channel and 32 tokens, so a token cannot leave without the other 31; 8-bit keys
    and all values are quantized by token.

    How many tokens get each precision depends only on their number, the budget and an assumed skew of attention
    (`demotion_counts`). Which tokens these are depends on their importance (`_demotion_order`), and is computed on the
    device. So no call synchronises with it. When the tail has to be flushed next follows from the same numbers
    (`LayerBudget.next_flush`), so that a token costs no work that does not depend on it.

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
    lower
        The low-bit buckets, fewest bits first; None where empty. Heads may hold different tokens in the same bucket.
    top
        The 8-bit bucket, None where empty.
    tail
        The newest tokens, None before the first chunk.
    importance
        `[B, Hkv, T]` float32, of the T tokens in the 8-bit bucket and the tail, which can still be demoted.
    budget
        The layer's byte budget.

    Raises
    ------
    UnsupportedError
        For a budget that a layer with these head dims cannot meet.

    Notes
    -----
    The low-bit buckets quantize as KIVI does (https://arxiv.org/abs/2402.02750). Importance is a moving average of
    attention probabilities, where H2O (https://arxiv.org/abs/2306.14048) sums them. The budget, the allocation and the
    demotion are this project's own.
    """

    config_class = SmartKVConfig
    config: SmartKVConfig

    state_fields = ("lower", "top", "tail", "importance")
    state_types: ClassVar = {"tail": KeysValues}

    def __init__(self, config: SmartKVConfig, spec: CacheSpec, layer: int) -> None:
        super().__init__(config, spec, layer)
        self.observation_window = config.queries
        self.lower: list[Bucket | None] = [None] * TOP
        self.top: Bucket | None = None
        self.tail: KeysValues | None = None
        self.importance: mx.array | None = None
        layers = spec.attention_layers
        share = config.budget * layer_budget_factors(config.layers, len(layers))[layers.index(layer)]
        self.budget = layer_budget(self.slots, self.latent, share, config.recent)
        self._packed: Packed | None = None
        if math.isinf(self.budget.holds_from):
            raise UnsupportedError(
                f"layer {layer} gets a budget of {share:.3f} of its bytes in float16, but heads of "
                f"{' and '.join(str(slot.dim) for slot in self.slots)} dims need more than {self.budget.min_share:.3f}"
            )

    def buckets(self) -> list[Bucket]:
        """Return the low-bit buckets, fewest bits first, then the 8-bit bucket, then the tail."""
        packed = [bucket for bucket in (*self.lower, self.top) if bucket is not None]
        return packed if self.tail is None else [*packed, self.tail.as_bucket()]

    def expected_bytes(self, tokens: int, batch: int = 1) -> int:
        """Return the budget, of which a text of a thousand tokens leaves up to a twentieth, and longer ones less."""
        return batch * min(self.budget.max_bytes(tokens), tokens * self.budget.tail_token_bytes)

    def check_state(self) -> None:
        """Check how each bucket is packed, what every method has, and importance; no token may be missing."""
        if not isinstance(self.lower, list) or len(self.lower) != TOP:
            raise FormatError(f"lower should be a list of {TOP} buckets")
        block = [mx.zeros((1, slot.heads, TILE, slot.dim)) for slot in self.slots]
        for level, bucket in enumerate((*self.lower, self.top)):
            if bucket is not None:
                check_like(bucket, "top" if level == TOP else f"lower[{level}]", self._quantize(level, *block))
        if any(count % TILE for count in self._lower_counts()):
            raise FormatError(f"the low-bit buckets have {self._lower_counts()} tokens, which are no tiles of {TILE}")
        super().check_state()
        check_kept(self, self.offset)
        if self.tail is not None:
            waiting = token_count(self.top) + self.tail.tokens
            check_array(self.importance, "importance", (*self.tail.keys.shape[:2], waiting), mx.float32)
        elif self.offset or self.importance is not None:
            raise FormatError("there is no tail")

    def attend(
        self,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        scale: float,
        mask: mx.array | str | None = None,
        sinks: mx.array | None = None,
    ) -> mx.array:
        """Return the attention over the stored tokens and the chunk; a single token is stored before it."""
        chunk, tail = self._pending_chunk, self.tail
        if mask is not None or chunk is None or queries.shape[2] != 1 or not self._decodes(chunk):
            return super().attend(queries, keys, values, scale, mask, sinks)
        assert tail is not None
        keys, values = (
            mx.concatenate([old, to_storage_dtype(new, old.dtype)], axis=2) for old, new in zip(tail, chunk)
        )
        self.tail = tail = KeysValues(keys, values)
        packed = self._packed_tokens()
        output, self.importance = decode_attention(
            queries, [*packed.buckets, tail.as_bucket()], scale, None, sinks, self.importance, self.config.decay
        )
        # Generation evaluates only outputs: state that no output depends on yet would keep all earlier steps in memory.
        if self._offset >= packed.flush:
            self._settle()
            output = mx.depends(output, self._arrays())
        self._end()
        return output

    def _decodes(self, chunk: KeysValues) -> bool:
        """Return whether the next token only adds to tail and importance before the tail may have to be flushed."""
        tail = self.tail
        return (
            tail is not None
            and chunk.keys.dtype in (tail.keys.dtype, mx.float32)
            and self._offset > self.config.sinks
            and not self.latent
            and self.config.order == "importance"
        )

    def _packed_tokens(self) -> Packed:
        """Return what follows from the packed tokens; the tail includes a token that is about to be stored."""
        packed = self._packed
        if packed is None or packed.top is not self.top or packed.levels is not self.lower:
            config, tail = self.config, self.tail
            assert tail is not None
            counts, top, waiting = tuple(self._lower_counts()), token_count(self.top), tail.tokens - 1
            more = self.budget.next_flush(counts, top, waiting, config.recent, config.interval)
            buckets = tuple(bucket for bucket in (*self.lower, self.top) if bucket is not None)
            self._packed = packed = Packed(self.lower, self.top, buckets, self._offset - 1 + more)
        return packed

    def absorb(self, keys: mx.array, values: mx.array, mass: mx.array | None) -> None:
        """Update importance, append the chunk to the tail, and flush the tail if it is too long or over budget."""
        assert mass is not None  # since observation_window is never 0
        self._update_importance(mass, keys.shape[-2])
        self.tail = append_chunk(self.tail, keys, values)
        self._settle()

    def _settle(self) -> None:
        """Flush the tail if it is too long or over budget."""
        config, tail = self.config, self.tail
        assert tail is not None
        self._packed = None
        if self.budget.must_flush(
            self._lower_counts(), token_count(self.top), tail.tokens, config.recent, config.interval
        ):
            recent = self.budget.recent_tokens(config.recent, config.interval, self.offset)
            self._flush_tail(max(0, tail.tokens - recent))

    def _update_importance(self, mass: mx.array, count: int) -> None:
        """Update the importance of all tokens that can be demoted, `count` new ones included; sinks get infinity."""
        config, (B, H, _) = self.config, mass.shape
        old = mx.zeros((B, H, 0)) if self.importance is None else self.importance
        first = self.offset - count
        if config.order == "importance":
            new = update_importance(old, mass[..., -old.shape[-1] - count :], min(count, config.queries), config.decay)
        else:
            positions = mx.arange(first, self.offset, dtype=mx.float32)
            key = mx.random.key(hash((config.seed, self.layer, first)) % 2**32)
            ranks = {"random": mx.random.uniform(shape=(B, H, count), key=key), "early": -positions, "late": positions}
            new = mx.concatenate([old, mx.broadcast_to(ranks[config.order], (B, H, count))], axis=-1)
        sinks = min(count, max(0, config.sinks - first))
        if sinks:
            start = old.shape[-1]
            new[..., start : start + sinks] = mx.inf
        self.importance = new

    def _flush_tail(self, count: int) -> None:
        """Move the oldest `count` tokens of the tail to the 8-bit bucket, then demote tokens as the budget requires."""
        assert self.tail is not None
        older, leaving = token_count(self.top), self.tail.slice_tokens(0, count)
        counts = self._demotion_counts(older + count)
        demotes = older + count > 0 and any(counts)
        if count:
            self.tail = self.tail.copy_tokens(count)
            if older or not demotes:
                new = self._quantize(TOP, *leaving)
                self.top = new if self.top is None else concat_buckets(self.top, new)
        if demotes:
            self._demote(counts, self._demotion_order(older, older + count), None if older else leaving)

    def _demotion_counts(self, top: int) -> tuple[int, ...]:
        """Return how many tokens of the 8-bit bucket to demote to each low-bit bucket."""
        budget, lower = self.budget, self._lower_counts()
        interval = budget.flush_interval(self.config.interval, self.offset)
        used = budget.used_bytes(lower, 0, self.offset - top - sum(lower))
        room = budget.max_bytes(self.offset) - used - budget.demotion_reserve(top, interval)
        spare = budget.spare_bytes(self.offset, lower)
        allocate = ALLOCATORS[self.config.allocator]
        return demotion_counts(allocate, top, room, spare, budget.tile_bytes, budget.top_token_bytes)

    def _demotion_order(self, older: int, length: int) -> mx.array:
        """Return the indices of the 8-bit bucket's tokens, `[B, Hkv, length]`, least important first.

        The first `older` tokens were in the bucket before this flush: hysteresis raises their importance.
        """
        assert self.importance is not None
        importance = self.importance[..., :length]
        if self.config.order == "importance":
            importance = importance * mx.where(mx.arange(length) < older, 1 + self.config.hysteresis, 1)
        return mx.argsort(importance, axis=-1)

    def _demote(self, counts: tuple[int, ...], order: mx.array, leaving: KeysValues | None) -> None:
        """Demote tokens of the 8-bit bucket, `counts[i]` to low-bit bucket i, taken from the start of `order`.

        `leaving` are its tokens where all of them have left the tail just now, as a prompt's do: they are quantized once.
        """
        assert self.importance is not None
        start, length, lower, top = 0, order.shape[-1], list(self.lower), self.top
        for level, count in enumerate(counts):
            if count:
                moved = order[..., start : start + count]
                if leaving is not None:
                    rows = _gathered(leaving, moved)
                else:
                    assert top is not None
                    rows = KeysValues(*(unpack(gather_rows(x, moved), x.dtype) for x in top))
                new, old = self._quantize(level, *rows), lower[level]
                lower[level] = new if old is None else concat_buckets(old, new)
                start += count
        stay = mx.sort(order[..., start:], axis=-1)
        if start == length:
            self.top = None
        elif leaving is not None:
            self.top = self._quantize(TOP, *_gathered(leaving, stay))
        elif top is not None:
            self.top = gather_rows(top[0], stay), gather_rows(top[1], stay)
        self.lower = lower
        kept, waiting = mx.take_along_axis(self.importance, stay, axis=-1), self.importance[..., length:]
        self.importance = mx.concatenate([kept, waiting], axis=-1)

    def _quantize(self, level: int, keys: mx.array, values: mx.array) -> Bucket:
        """Quantize tokens for a bucket: low-bit keys by channel, 8-bit keys and all values by token."""
        key_bits, value_bits = bits_of(level, self.latent)
        packed_keys = pack(keys, key_bits, TILE, 1) if key_bits < 8 else quantize_per_token(keys, key_bits)
        return packed_keys, quantize_per_token(values, value_bits)

    def _lower_counts(self) -> list[int]:
        """Return the number of tokens in each low-bit bucket."""
        return [token_count(bucket) for bucket in self.lower]


def _gathered(tokens: KeysValues, indices: mx.array) -> KeysValues:
    """Return some tokens, with different indices `[B, H, n]` for each head."""
    return KeysValues(*(mx.take_along_axis(x, indices[..., None], axis=2) for x in tokens))
