"""Byte budget of SmartKV: how many tokens each precision gets, never which.

Which tokens these are is decided by `SmartKVCache._demotion_order`. The low-bit buckets are numbered like PRECISIONS,
fewest bits first; the last precision is the 8-bit bucket.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Self

import numpy as np

from mlxkv.live.allocation import Allocator
from mlxkv.spec import Slot

TILE = 32  # tokens whose keys share one minimum and one step per channel in the low-bit buckets
LOOK_AHEAD = 64  # tokens for which it is computed at a time when the next flush is due
SHORT_FACTOR = 3  # the budget holds from this many times the length of the shortest text that can meet it
# Bits of keys and of values. ERRORS has roughly the KL divergence of SmolLM2, in nats, with all tokens at each
# precision (the sum of what keys alone and values alone cause). Errors of keys do most harm.
PRECISIONS = ((2, 2), (3, 3), (4, 3), (4, 4), (8, 4), (8, 8))
TOP = len(PRECISIONS) - 1
ERRORS = (0.22, 0.028, 0.0097, 0.0054, 0.0019, 0.00002)
SKEW = 0.9  # assumed importance of the token of rank r: r ** -SKEW; reading the real one would wait for the device


class LayerBudget:
    """Byte budget of one layer, for one sequence of a batch.

    Parameters
    ----------
    slots
        Heads and dims of keys and values.
    latent
        Whether the model uses multi-head latent attention.
    share
        The layer's budget, as a share of the unquantized cache at 2 bytes per element.
    recent
        Minimal number of newest tokens that stay unquantized.

    Attributes
    ----------
    bytes_per_token
        Budget in bytes per token of the text.
    tail_token_bytes
        Bytes of one token in the tail: keys, values and 4 bytes of importance per kv head.
    tail_overdraft
        Bytes by which one token in the tail exceeds `bytes_per_token`; 0 if it does not.
    tile_bytes
        Bytes of TILE tokens in each low-bit bucket, fewest bits first.
    top_token_bytes
        Bytes of one token in the 8-bit bucket, importance included.
    min_share
        Share that a layer takes with all tokens in bucket 0; `share` must be larger.
    reserved_bytes
        Bytes that tokens which cannot be in bucket 0 (an incomplete tile of the 8-bit bucket, and the newest tokens)
        take beyond what they would take in it.
    holds_from
        Number of tokens from which on the budget holds; infinity if it can never be met.
    """

    def __init__(self, slots: tuple[Slot, Slot], latent: bool, share: float, recent: int) -> None:
        elements = sum(slot.heads * slot.dim for slot in slots)
        importance = 4 * slots[0].heads
        self.bytes_per_token = 2 * elements * share
        self.tail_token_bytes = 2 * elements + importance
        self.tail_overdraft = max(0.0, self.tail_token_bytes - self.bytes_per_token)
        tiles = [_tile_bytes(slots, bits_of(level, latent)) for level in range(len(PRECISIONS))]
        self.tile_bytes, self.top_token_bytes = tuple(tiles[:TOP]), tiles[TOP] // TILE + importance
        lowest = tiles[0] / TILE
        self.min_share = lowest / (2 * elements)
        # All tokens but an incomplete 8-bit tile and the newest tokens must always fit into bucket 0.
        unfilled, newest = self.top_token_bytes - lowest, self.tail_token_bytes - lowest
        self.reserved_bytes = (TILE - 1) * unfilled + (recent + 1) * newest
        spare_per_token = self.bytes_per_token - lowest
        self.holds_from = SHORT_FACTOR * self.reserved_bytes / spare_per_token if spare_per_token > 0 else math.inf

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self  # which never changes

    def max_bytes(self, tokens: int) -> int:
        """Return the bytes that the cache of a text may take.

        Parameters
        ----------
        tokens
            The text's length.

        Returns
        -------
        int
            Bytes. A text of fewer than `holds_from` tokens may exceed its share, so that its first tokens are not
            demoted for good while the text is short; up to there each token adds three quarters of `bytes_per_token`.
        """
        return math.floor(self.bytes_per_token * max(tokens, (self.holds_from + 3 * tokens) / 4))

    def spare_bytes(self, tokens: int, lower: Sequence[int]) -> int:
        """Return how many bytes low-bit buckets may still take beyond what their tokens would take in bucket 0.

        Parameters
        ----------
        tokens
            The text's length.
        lower
            Number of tokens in each low-bit bucket.

        Returns
        -------
        int
            Bytes. Tokens never leave a low-bit bucket, so bytes spent there are lacking for later tokens.
        """
        lowest = self.tile_bytes[0] / TILE
        room = min(self.max_bytes(n) - lowest * n for n in (tokens, max(tokens, math.ceil(self.holds_from))))
        taken = sum(count // TILE * (size - self.tile_bytes[0]) for count, size in zip(lower, self.tile_bytes))
        return math.floor(room - self.reserved_bytes) - taken

    def used_bytes(self, lower: Sequence[int], top: int, tail: int) -> int:
        """Return the bytes of a layer with the given numbers of tokens.

        Parameters
        ----------
        lower
            Number of tokens in each low-bit bucket.
        top, tail
            Number of tokens in the 8-bit bucket and in the tail.

        Returns
        -------
        int
            Bytes, scales and importance included.
        """
        tiles = sum(count // TILE * size for count, size in zip(lower, self.tile_bytes))
        return tiles + top * self.top_token_bytes + tail * self.tail_token_bytes

    def recent_tokens(self, least: int, interval: int, tokens: int) -> int:
        """Return how many of the newest tokens stay unquantized.

        Parameters
        ----------
        least
            Minimal number to return.
        interval
            Number of tokens that may wait to be flushed.
        tokens
            The text's length.

        Returns
        -------
        int
            As many as the budget allows with all other tokens in the 8-bit bucket, but at least `least`.
        """
        room = self.max_bytes(tokens) - tokens * self.top_token_bytes - math.ceil(self.tail_overdraft * interval)
        return max(least, int(room // (self.tail_token_bytes - self.top_token_bytes)))

    def flush_interval(self, most: int, tokens: int) -> int:
        """Return how many tokens may wait to be flushed.

        Parameters
        ----------
        most
            Maximal number to return.
        tokens
            The text's length.

        Returns
        -------
        int
            Tokens; fewer for a short text, since an unquantized token takes several times its share.
        """
        return min(most, max(1, tokens // TILE))

    def must_flush(self, lower: Sequence[int], top: int, tail: int, least: int, most: int) -> bool:
        """Return whether the tail is too long, or the layer over budget.

        Parameters
        ----------
        lower, top, tail
            As in `used_bytes`.
        least
            Minimal number of newest tokens that stay unquantized.
        most
            Maximal number of tokens that wait to be flushed.

        Returns
        -------
        bool
            True if the tail is to be flushed now.
        """
        tokens = sum(lower) + top + tail
        longest = self.recent_tokens(least, most, tokens) + self.flush_interval(most, tokens)
        return tail >= longest or self.used_bytes(lower, top, tail) > self.max_bytes(tokens)

    @lru_cache(maxsize=4096)  # noqa: B019  # budgets are few, and kept for good
    def next_flush(self, lower: tuple[int, ...], top: int, tail: int, least: int, most: int) -> int:
        """Return for how many tokens the tail need not be flushed, computed once for layers that hold as many tokens.

        Parameters
        ----------
        lower, top, tail, least, most
            As in `must_flush`, which is false.

        Returns
        -------
        int
            The number of the token after which it has to be asked again, counted from the next, 1 or more; at most
            LOOK_AHEAD.
        """
        later = range(1, LOOK_AHEAD)
        return next((n for n in later if self.must_flush(lower, top, tail + n, least, most)), LOOK_AHEAD)

    def demotion_reserve(self, top: int, interval: int) -> int:
        """Return the bytes to keep free until the next flush and until the next tile of the 8-bit bucket is full.

        Parameters
        ----------
        top
            Number of tokens in the 8-bit bucket.
        interval
            Number of tokens until the next flush.

        Returns
        -------
        int
            Bytes. Without them later tokens would force the whole 8-bit bucket to be demoted.
        """
        waiting = self.tail_overdraft * (interval - 1)
        return math.ceil(waiting + max(0, self.top_token_bytes - self.bytes_per_token) * (TILE - top % TILE))


@lru_cache(maxsize=256)
def layer_budget(slots: tuple[Slot, Slot], latent: bool, share: float, recent: int) -> LayerBudget:
    """Return the budget of a layer, one object for equal layers, so that what it computes is computed once.

    Parameters
    ----------
    slots, latent, share, recent
        As in `LayerBudget`.

    Returns
    -------
    LayerBudget
        The budget.
    """
    return LayerBudget(slots, latent, share, recent)


@lru_cache(maxsize=4096)
def demotion_counts(
    allocate: Allocator, top: int, room: int, spare: int, tile_bytes: tuple[int, ...], top_token_bytes: int
) -> tuple[int, ...]:
    """Return how many tokens of the 8-bit bucket to demote to each low-bit bucket.

    Parameters
    ----------
    allocate
        Allocator of `mlxkv.live.allocation`: decides how many tokens get each precision.
    top
        Number of tokens in the 8-bit bucket.
    room
        Bytes that these tokens may take afterwards.
    spare
        Bytes that low-bit buckets may take beyond what their tokens would take in bucket 0.
    tile_bytes, top_token_bytes
        As in `LayerBudget`.

    Returns
    -------
    tuple of int
        Tokens for each low-bit bucket, multiples of TILE. If the budget cannot be met, all go to bucket 0.
    """
    items, rest = divmod(top, TILE)
    weights = (np.arange(1, items * TILE + 1) ** -SKEW).reshape(items, TILE).sum(axis=1)
    costs = (*tile_bytes, TILE * top_token_bytes)
    room -= rest * top_token_bytes
    # The most important tile stays in 8 bits if the others then still fit in bucket 2 or better.
    stays = int(items > 0 and room - costs[-1] >= (items - 1) * costs[2])
    room, items = room - stays * costs[-1], items - stays
    levels = allocate(weights[stays:], ERRORS, costs, max(room, items * costs[0]))
    counts = [int((levels == level).sum()) for level in range(len(tile_bytes))]
    while sum(count * (size - tile_bytes[0]) for count, size in zip(counts, tile_bytes)) > max(0, spare):
        highest = max(level for level, count in enumerate(counts) if count)
        counts[highest] -= 1
        counts[0] += 1
    return tuple(count * TILE for count in counts)


def bits_of(level: int, latent: bool) -> tuple[int, int]:
    """Return the bits of keys and values in a bucket.

    Parameters
    ----------
    level
        Index in PRECISIONS.
    latent
        Whether the model uses multi-head latent attention. "Values" are then k_pe, which is part of the keys and gets
        their bits.

    Returns
    -------
    tuple of int
        Bits per key element and bits per value element.
    """
    key_bits, value_bits = PRECISIONS[level]
    return key_bits, key_bits if latent else value_bits


def _tile_bytes(slots: tuple[Slot, Slot], bits: tuple[int, int]) -> int:
    """Return the bytes of TILE tokens in all heads, minima and steps included."""
    total = 0
    for slot, width, by_channel in zip(slots, bits, (bits[0] < 8, False)):
        groups = slot.dim if by_channel else TILE * (slot.dim // 64 if slot.dim % 64 == 0 else 1)
        total += slot.heads * (TILE * 4 * math.ceil(slot.dim * width / 32) + 4 * groups)
    return total
