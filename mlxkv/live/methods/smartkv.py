"""SmartKV: more bits for the tokens that get more attention, within a budget of bytes.

The newest tokens wait as they are. Every few tokens the oldest of them join the first bucket, in 8 bits; where the
budget asks for it, the tokens of this bucket that each kv head attends to least go on, 32 at a time, to a bucket of
fewer bits, and stay there. Keys of 4 bits or fewer are packed by channel as in KIVI (https://arxiv.org/abs/2402.02750),
which a token can enter but not leave without packing its neighbours again; 8-bit keys and all values are packed by token.
Importance is the moving average of attention probabilities: H2O (https://arxiv.org/abs/2306.14048) sums them instead.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import mlx.core as mx
import numpy as np

from mlxkv.config import Config, choice, integer, number
from mlxkv.errors import UnsupportedError
from mlxkv.kernels.bits import QuantizedArray, pack, unpack
from mlxkv.kernels.decode_attention import Bucket
from mlxkv.live.allocation import Allocator, exact, greedy, layer_shares, uniform
from mlxkv.live.base import LayerCache, copy_without_parent, live_methods, to_storage_dtype, unquantized
from mlxkv.live.importance import update_importance
from mlxkv.live.packing import concat_tokens, quantize_per_token
from mlxkv.spec import CacheSpec, Slot

TILE = 32  # tokens whose keys share a scale in each channel
SHORT_FACTOR = (
    3  # times the tokens at which the budget first has room for all in the lowest bucket: from there on it is held
)
# Bits of keys and values, and about the KL in nats that SmolLM2 shows with all tokens there (of keys and of values,
# added): errors of keys do most harm.
PRECISIONS = ((2, 2), (3, 3), (4, 3), (4, 4), (8, 4), (8, 8))
TOP = len(PRECISIONS) - 1
ERRORS = (0.22, 0.028, 0.0097, 0.0054, 0.0019, 0.00002)
SKEW = 0.9  # the weight of the token of rank r is taken for r ** -SKEW, so that nothing waits for real weights
ALLOCATORS: dict[str, Allocator] = {"greedy": greedy, "exact": exact, "uniform": uniform}
ORDERS = ("importance", "random", "early", "late")
SPLITS = ("equal", "linear", "exponential")


@dataclass(frozen=True, kw_only=True)
class SmartKVConfig(Config):
    """Settings of SmartKV.

    Parameters
    ----------
    budget
        Bytes held, scales, importance and waiting tokens included, as a share of 2 bytes an element; it is held from
        100 to 400 tokens on (`LayerBudget.short`).
    sinks
        First tokens, the last ones to leave 8 bits.
    recent
        Newest tokens that stay unquantized, at least; more where the budget has room for all others in 8 bits.
    interval
        Tokens, at most, that wait to be packed together.
    decay
        Of importance, by query; 1 sums.
    queries
        Queries of a prefill chunk that are asked what they attend to, the last ones.
    hysteresis
        By how much more important a newcomer must be than a token that has been in 8 bits for longer.
    allocator
        Decides how many tokens get which precision.
    order
        Decides which tokens.
    layers
        How the budget is split over layers.
    seed
        Of the random order.
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
    seed: int = integer(0)


@live_methods.register("smartkv")
class SmartKVCache(LayerCache):
    """Stored in the order: `lower` buckets by rising bits, `top`, `tail`; in all but the tail each head has an order of
    its own. `importance` `[B, Hkv, top + tail]` is kept only of tokens whose precision can still go down.

    How many tokens are where follows from their number, the budget and a fixed idea of how skewed attention is; only
    which ones they are depends on values, so nothing waits for the device. Raises UnsupportedError for a budget that
    a layer of these dims cannot meet.
    """

    config_class = SmartKVConfig
    config: SmartKVConfig

    state_fields = ("lower", "top", "tail", "importance")

    def __init__(self, config: SmartKVConfig, spec: CacheSpec, layer: int) -> None:
        super().__init__(config, spec, layer)
        self.observation_window = config.queries
        self.lower: list[Bucket | None] = [None] * TOP
        self.top: Bucket | None = None
        self.tail: tuple[mx.array, mx.array] | None = None
        self.importance: mx.array | None = None
        layers = spec.attention_layers
        share = config.budget * layer_shares(config.layers, len(layers))[layers.index(layer)]
        self.sizes = LayerBudget(self.slots, self.latent, share, config.recent)
        if math.isinf(self.sizes.short):
            raise UnsupportedError(
                f"layer {layer} gets a budget of {share:.3f} of its bytes in float16, but heads of "
                f"{' and '.join(str(slot.dim) for slot in self.slots)} dims need more than {self.sizes.least:.3f}"
            )

    def buckets(self) -> list[Bucket]:
        packed = [bucket for bucket in (*self.lower, self.top) if bucket is not None]
        return packed if self.tail is None else [*packed, (unquantized(self.tail[0]), unquantized(self.tail[1]))]

    def absorb(self, keys: mx.array, values: mx.array, mass: mx.array | None) -> None:
        assert mass is not None  # since observation_window is never 0
        self._weigh(mass, keys.shape[-2])
        keys, values = to_storage_dtype(keys), to_storage_dtype(values)
        if self.tail is not None:
            keys = mx.concatenate([self.tail[0], keys], axis=-2)
            values = mx.concatenate([self.tail[1], values], axis=-2)
        self.tail = keys, values
        held = self.sizes.held(self._lower_counts(), _token_count(self.top), keys.shape[-2])
        recent = self.sizes.recent(self.config.recent, self.config.interval, self.offset)
        most = recent + self.sizes.interval(self.config.interval, self.offset)
        if keys.shape[-2] >= most or held > self.sizes.limit(self.offset):
            self._flush_tail(max(0, keys.shape[-2] - recent))

    def _weigh(self, mass: mx.array, count: int) -> None:
        """Bring importance up to date, count new tokens included; sinks are infinitely important."""
        config, (B, H, _) = self.config, mass.shape
        old = mx.zeros((B, H, 0)) if self.importance is None else self.importance
        first = self.offset - count
        if config.order == "importance":
            new = update_importance(old, mass[..., -old.shape[-1] - count :], min(count, config.queries), config.decay)
        else:
            positions = mx.arange(first, self.offset, dtype=mx.float32)
            key = mx.random.key(hash((config.seed, self.layer, first)) % 2**32)
            drawn = {"random": mx.random.uniform(shape=(B, H, count), key=key), "early": -positions, "late": positions}
            new = mx.concatenate([old, mx.broadcast_to(drawn[config.order], (B, H, count))], axis=-1)
        sinks = min(count, max(0, config.sinks - first))
        if sinks:
            start = old.shape[-1]
            new[..., start : start + sinks] = mx.inf
        self.importance = new

    def _flush_tail(self, count: int) -> None:
        """The oldest `count` tokens of the tail join the top, and where the budget asks for it, the least important ones
        there go to lower buckets, in whole tiles."""
        assert self.tail is not None
        assert self.importance is not None
        keys, values = self.tail
        settled, length = _token_count(self.top), _token_count(self.top) + count
        if count:
            new = self._packed(TOP, keys[..., :count, :], values[..., :count, :])
            self.top = (
                new if self.top is None else (concat_tokens(self.top[0], new[0]), concat_tokens(self.top[1], new[1]))
            )
            self.tail = copy_without_parent(keys[..., count:, :]), copy_without_parent(values[..., count:, :])
        counts = self._plan(length)
        if self.top is None or sum(counts) == 0:
            return
        rank = self.importance[..., :length]
        if self.config.order == "importance":
            rank = rank * mx.where(mx.arange(length) < settled, 1 + self.config.hysteresis, 1)
        order = mx.argsort(rank, axis=-1)
        start = 0
        for level, count in enumerate(counts):
            if count:
                keys, values = (unpack(_gather_rows(x, order[..., start : start + count]), x.dtype) for x in self.top)
                new, old = self._packed(level, keys, values), self.lower[level]
                self.lower[level] = (
                    new if old is None else (concat_tokens(old[0], new[0]), concat_tokens(old[1], new[1]))
                )
                start += count
        stay = mx.sort(order[..., start:], axis=-1)
        self.top = (_gather_rows(self.top[0], stay), _gather_rows(self.top[1], stay)) if start < length else None
        kept, waiting = mx.take_along_axis(self.importance, stay, axis=-1), self.importance[..., length:]
        self.importance = mx.concatenate([kept, waiting], axis=-1)

    def _plan(self, top: int) -> tuple[int, ...]:
        """How many tokens of the top go to each lower bucket. Kept free is what tokens take, beyond their share, that
        come until the next time, and until a tile of the top is full: else all of it would have to go by then."""
        sizes, lower = self.sizes, self._lower_counts()
        reserve = sizes.growth * (sizes.interval(self.config.interval, self.offset) - 1)
        reserve += max(0, sizes.top - sizes.rate) * (TILE - top % TILE)
        room = sizes.limit(self.offset) - sizes.held(lower, 0, self.offset - top - sum(lower)) - math.ceil(reserve)
        return demotions(self.config.allocator, top, room, sizes.spare(self.offset, lower), sizes.tiles, sizes.top)

    def _packed(self, level: int, keys: mx.array, values: mx.array) -> Bucket:
        key_bits, value_bits = _bits(level, self.latent)
        packed_keys = pack(keys, key_bits, TILE, 1) if key_bits < 8 else quantize_per_token(keys, key_bits)
        return packed_keys, quantize_per_token(values, value_bits)

    def _lower_counts(self) -> list[int]:
        return [0 if bucket is None else bucket[0].shape[-2] for bucket in self.lower]


class LayerBudget:
    """Bytes of one layer's parts, for one row of a batch.

    tiles: of TILE tokens in each lower bucket. top, waiting: of a token there, importance included. growth: how much
    faster a waiting token takes bytes than the budget gives. slack: what the
    tokens that cannot be in the lowest bucket take beyond it. short: from how many tokens on the budget is held.
    """

    def __init__(self, slots: tuple[Slot, Slot], latent: bool, share: float, recent: int) -> None:
        elements = sum(slot.heads * slot.dim for slot in slots)
        state = 4 * slots[0].heads
        self.rate = 2 * elements * share
        self.waiting = 2 * elements + state
        self.growth = max(0.0, self.waiting - self.rate)
        costs = [_tile_bytes(slots, _bits(level, latent)) for level in range(len(PRECISIONS))]
        self.tiles, self.top = tuple(costs[:TOP]), costs[TOP] // TILE + state
        lowest = costs[0] / TILE
        self.least = lowest / (2 * elements)
        # All tokens in the lowest bucket but an unfilled tile of the top and the newest: what must always be possible.
        self.slack = (TILE - 1) * (self.top - lowest) + (recent + 1) * (self.waiting - lowest)
        self.short = SHORT_FACTOR * self.slack / (self.rate - lowest) if self.rate > lowest else math.inf

    def limit(self, tokens: int) -> int:
        """What so many tokens may take. A text of fewer than `short` may take more, so that its first tokens need not go
        where they could never come back from; each token then adds three quarters of its share."""
        return math.floor(self.rate * max(tokens, (self.short + 3 * tokens) / 4))

    def spare(self, tokens: int, lower: Sequence[int]) -> int:
        """Bytes that lower buckets may yet take beyond what the same tokens would take in the lowest: they keep them, so
        more would be lacking for the tokens to come."""
        lowest = self.tiles[0] / TILE
        room = min(self.limit(n) - lowest * n for n in (tokens, max(tokens, math.ceil(self.short))))
        taken = sum(count // TILE * (size - self.tiles[0]) for count, size in zip(lower, self.tiles))
        return math.floor(room - self.slack) - taken

    def held(self, lower: Sequence[int], top: int, waiting: int) -> int:
        """Bytes of so many tokens in each part."""
        tiles = sum(count // TILE * size for count, size in zip(lower, self.tiles))
        return tiles + top * self.top + waiting * self.waiting

    def recent(self, least: int, interval: int, tokens: int) -> int:
        """Newest tokens that stay as they are: as many as there is room for with all others in the top."""
        room = self.limit(tokens) - tokens * self.top - math.ceil(self.growth * interval)
        return max(least, int(room // (self.waiting - self.top)))

    def interval(self, most: int, tokens: int) -> int:
        """Tokens that may wait: few for a short text, since a waiting token takes several times its share."""
        return min(most, max(1, tokens // TILE))


@lru_cache(maxsize=4096)
def demotions(
    allocator: str, top: int, room: int, spare: int, tiles: tuple[int, ...], top_cost: int
) -> tuple[int, ...]:
    """How many of the `top` tokens go to each lower bucket, multiples of TILE, for all to fit into `room` bytes, and
    what lower buckets take beyond the lowest into `spare`. Where that cannot be they go to the lowest."""
    items, rest = divmod(top, TILE)
    weights = (np.arange(1, items * TILE + 1) ** -SKEW).reshape(items, TILE).sum(axis=1)
    costs = (*tiles, TILE * top_cost)
    room -= rest * top_cost
    # The first tile stays wherever the others then need not go lower than the third bucket.
    stays = int(items > 0 and room - costs[-1] >= (items - 1) * costs[2])
    room, items = room - stays * costs[-1], items - stays
    levels = ALLOCATORS[allocator](weights[stays:], ERRORS, costs, max(room, items * costs[0]))
    counts = [int((levels == level).sum()) for level in range(len(tiles))]
    while sum(count * (size - tiles[0]) for count, size in zip(counts, tiles)) > max(0, spare):
        highest = max(level for level, count in enumerate(counts) if count)
        counts[highest] -= 1
        counts[0] += 1
    return tuple(count * TILE for count in counts)


def _bits(level: int, latent: bool) -> tuple[int, int]:
    """Of keys and values. For MLA's k_pe, which is where others have values but is part of a key, those of keys."""
    key_bits, value_bits = PRECISIONS[level]
    return key_bits, key_bits if latent else value_bits


def _tile_bytes(slots: tuple[Slot, Slot], bits: tuple[int, int]) -> int:
    """Bytes of TILE tokens of all heads, as `Cache._packed` packs them, scales included."""
    total = 0
    for slot, width, by_channel in zip(slots, bits, (bits[0] < 8, False)):
        groups = slot.dim if by_channel else TILE * (slot.dim // 64 if slot.dim % 64 == 0 else 1)
        total += slot.heads * (TILE * 4 * math.ceil(slot.dim * width / 32) + 4 * groups)
    return total


def _token_count(bucket: Bucket | None) -> int:
    return 0 if bucket is None else bucket[0].shape[-2]


def _gather_rows(packed: QuantizedArray, index: mx.array) -> QuantizedArray:
    """Rows index `[B, H, n]`, another choice for each head, of what is packed by token."""
    words, bias, scale = (
        mx.take_along_axis(x, index[..., None], axis=2) for x in (packed.words, packed.bias, packed.scale)
    )
    return dataclasses.replace(packed, words=words, bias=bias, scale=scale)
