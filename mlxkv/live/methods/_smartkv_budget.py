"""SmartKV's bytes: what each part of a layer takes, and how many tokens go to which precision within the budget."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from mlxkv.live.allocation import Allocator
from mlxkv.spec import Slot

TILE = 32  # tokens whose keys share a minimum and a step in each channel
SHORT_FACTOR = 3  # the budget holds from so many times the tokens on that first have room in the lowest bucket
# Bits of keys and values, and about the KL in nats that SmolLM2 shows with all tokens there (of keys and of values,
# added): errors of keys do most harm.
PRECISIONS = ((2, 2), (3, 3), (4, 3), (4, 4), (8, 4), (8, 8))
TOP = len(PRECISIONS) - 1
ERRORS = (0.22, 0.028, 0.0097, 0.0054, 0.0019, 0.00002)
SKEW = 0.9  # the token of rank r counts as r ** -SKEW in allocation, so that nothing waits for real importance


class LayerBudget:
    """Bytes of one layer's parts, for one row of a batch.

    Parameters
    ----------
    slots
        Heads and dims of keys and values.
    latent
        Whether this is MLA.
    share
        The layer's budget, as a share of 2 bytes an element.
    recent
        Newest tokens that stay unquantized, at least.

    Attributes
    ----------
    bytes_per_token
        Bytes that the budget gives for each token of the text.
    tail_token_bytes
        Bytes of a token in the tail, importance included.
    tail_overdraft
        Bytes that a token takes in the tail beyond what the budget gives for it.
    tile_bytes
        Bytes of TILE tokens in each lower bucket.
    top_token_bytes
        Bytes of a token in the top bucket, importance included.
    min_share
        The share that all tokens in the lowest bucket would take.
    reserved_bytes
        Bytes beyond the lowest bucket's that tokens take which cannot be in it.
    holds_from
        Tokens from which on the budget is held; infinite where it never can be.
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
        # All tokens in the lowest bucket but an unfilled tile of the top and the newest: what must always be possible.
        unfilled, newest = self.top_token_bytes - lowest, self.tail_token_bytes - lowest
        self.reserved_bytes = (TILE - 1) * unfilled + (recent + 1) * newest
        spare_per_token = self.bytes_per_token - lowest
        self.holds_from = SHORT_FACTOR * self.reserved_bytes / spare_per_token if spare_per_token > 0 else math.inf

    def max_bytes(self, tokens: int) -> int:
        """Return what a text may take.

        Parameters
        ----------
        tokens
            Its length.

        Returns
        -------
        int
            Bytes. A text of fewer than `holds_from` tokens may take more than its share, so that its first tokens need
            not go where they could never come back from; each further token then adds three quarters of its share.
        """
        return math.floor(self.bytes_per_token * max(tokens, (self.holds_from + 3 * tokens) / 4))

    def spare_bytes(self, tokens: int, lower: Sequence[int]) -> int:
        """Return how much lower buckets may still take beyond what the same tokens would take in the lowest.

        Parameters
        ----------
        tokens
            The text's length.
        lower
            Tokens in each lower bucket.

        Returns
        -------
        int
            Bytes. Lower buckets keep what they have, so it would be lacking for tokens to come.
        """
        lowest = self.tile_bytes[0] / TILE
        room = min(self.max_bytes(n) - lowest * n for n in (tokens, max(tokens, math.ceil(self.holds_from))))
        taken = sum(count // TILE * (size - self.tile_bytes[0]) for count, size in zip(lower, self.tile_bytes))
        return math.floor(room - self.reserved_bytes) - taken

    def used_bytes(self, lower: Sequence[int], top: int, tail: int) -> int:
        """Return the bytes of so many tokens in each part.

        Parameters
        ----------
        lower
            Tokens in each lower bucket.
        top, tail
            Tokens in the top bucket and in the tail.

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
            At least so many.
        interval
            Tokens that may wait to be flushed.
        tokens
            The text's length.

        Returns
        -------
        int
            As many as there is room for with all others in the top bucket.
        """
        room = self.max_bytes(tokens) - tokens * self.top_token_bytes - math.ceil(self.tail_overdraft * interval)
        return max(least, int(room // (self.tail_token_bytes - self.top_token_bytes)))

    def flush_interval(self, most: int, tokens: int) -> int:
        """Return how many tokens may wait to be flushed.

        Parameters
        ----------
        most
            At most so many.
        tokens
            The text's length.

        Returns
        -------
        int
            Few for a short text, since a token that waits takes several times its share.
        """
        return min(most, max(1, tokens // TILE))

    def demotion_reserve(self, top: int, interval: int) -> int:
        """Return what to keep free for tokens to come, until the next flush and until a tile of the top is full.

        Parameters
        ----------
        top
            Tokens in the top bucket.
        interval
            Tokens until the next flush.

        Returns
        -------
        int
            Bytes. Without them all of the top would have to go down by then.
        """
        waiting = self.tail_overdraft * (interval - 1)
        return math.ceil(waiting + max(0, self.top_token_bytes - self.bytes_per_token) * (TILE - top % TILE))


@lru_cache(maxsize=4096)
def demotion_counts(
    allocate: Allocator, top: int, room: int, spare: int, tile_bytes: tuple[int, ...], top_token_bytes: int
) -> tuple[int, ...]:
    """Return how many tokens of the top bucket go to each lower bucket.

    Parameters
    ----------
    allocate
        Decides how many tokens get which precision.
    top
        Tokens in the top bucket.
    room
        Bytes that all of them may take afterwards.
    spare
        Bytes that lower buckets may take beyond the lowest one's.
    tile_bytes, top_token_bytes
        As in `LayerBudget`.

    Returns
    -------
    tuple of int
        Multiples of TILE. Where the budget cannot be met, all go to the lowest bucket.
    """
    items, rest = divmod(top, TILE)
    weights = (np.arange(1, items * TILE + 1) ** -SKEW).reshape(items, TILE).sum(axis=1)
    costs = (*tile_bytes, TILE * top_token_bytes)
    room -= rest * top_token_bytes
    # The first tile stays wherever the others then need not go lower than the third bucket.
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
        Whether this is MLA: k_pe, in place of values, is a part of the keys and has their bits.

    Returns
    -------
    tuple of int
        Bits of keys, and of values.
    """
    key_bits, value_bits = PRECISIONS[level]
    return key_bits, key_bits if latent else value_bits


def _tile_bytes(slots: tuple[Slot, Slot], bits: tuple[int, int]) -> int:
    """Return the bytes of TILE tokens of all heads, minima and steps included."""
    total = 0
    for slot, width, by_channel in zip(slots, bits, (bits[0] < 8, False)):
        groups = slot.dim if by_channel else TILE * (slot.dim // 64 if slot.dim % 64 == 0 else 1)
        total += slot.heads * (TILE * 4 * math.ceil(slot.dim * width / 32) + 4 * groups)
    return total
