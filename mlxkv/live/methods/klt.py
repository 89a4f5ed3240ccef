"""KLT: each text's own directions, bits by direction and by attention, for a fifth of the bytes and less."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import mlx.core as mx
import numpy as np

from mlxkv.config import Config, integer, number
from mlxkv.errors import FormatError
from mlxkv.kernels.decode_attention import Bucket
from mlxkv.kernels.digit_attention import DIGITS, TILE, DigitRows, DigitSlot, digit_attention
from mlxkv.live.arrays import KeysValues, iter_arrays, unquantized
from mlxkv.live.base import LayerCache, live_methods
from mlxkv.live.checks import check_array, check_kept, check_values
from mlxkv.live.klt import coding, tables
from mlxkv.live.klt.coding import SHARES
from mlxkv.live.klt.learning import learn
from mlxkv.live.methods.int4 import Int4Cache, Int4Config
from mlxkv.live.storage import to_storage_dtype
from mlxkv.live.tail import STEP, Tail
from mlxkv.spec import CacheSpec

BLOCK = sum(SHARES)  # tokens packed at a time
SHORTEST = 1024  # tokens from which on the budget holds


@dataclass(frozen=True, kw_only=True)
class KLTConfig(Config):
    """Settings of KLT.

    Parameters
    ----------
    budget
        Maximal bytes, as a share of the unquantized cache at 2 bytes per element, of all layers without a window together;
        directions, scales and unquantized tokens are included. Texts shorter than 1,024 tokens may exceed it, and where it is less
        than the directions take (half a head's dims of its tokens in float16: 128 of 4,096 for 256 dims) longer ones too. Layers with a sliding
        window have `int4`.
    sinks
        Number of first tokens that stay unquantized.
    recent
        Minimal number of newest tokens that stay unquantized.
    queries
        Number of queries at the end of a chunk whose attention is counted.
    learn
        Number of tokens that directions are learnt from, at least: until there are so many, none is packed.
    """

    budget: float = number(0.2, least=0.08, most=0.5)
    sinks: int = integer(4)
    recent: int = integer(32)
    queries: int = integer(256, least=1)
    learn: int = integer(256, least=BLOCK)


@live_methods.register("klt")
class KLTCache(LayerCache):
    """KLT: coordinates in the directions of the text itself, with bits by direction and by the attention a token gets.

    A head's keys vary along few directions, other ones in each text, and so do its values. When the first `learn` tokens or
    more are packed (a prompt all at once), their Karhunen-Loeve transform is learnt, and stays. Keys turn with their position, so
    theirs also expects positions up to twice as far. A packed token is its coordinates in 0, 2, 4, 6 or 8 bits, as digits of 2
    bits. Of the tokens that are packed together, the 1/16 that got most attention have most digits, the next 4/16 fewer, the others
    least; which coordinates have them follows from their variance (reverse water-filling), and a scale for each 128 rows
    follows the text. How many digits each layer has, keys and values, follows from what errors there cost: `mlxkv calibrate`
    measures it, else all layers are alike.

    In attention the query is turned in place of the keys, and the output in place of the values.

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
    packed_keys, packed_values
        The packed tokens, None while there are none.
    tail
        The newest tokens; also the sinks, while no token is packed. None before the first chunk.
    first
        The sinks, once tokens are packed; None where there are none.
    attention
        `[B, Hkv, tokens of the tail]` float32: the attention that each has got from the counted queries.
    seen
        `[1, 1, tokens of the tail]` float32: how many of these queries could see it.

    Notes
    -----
    The transform and reverse water-filling are those of transform coding (Goyal, 2001, doi 10.1109/79.952802); KVTC
    (https://arxiv.org/abs/2511.01815) uses them for files, calibrated. Turning the query in place of the keys is common to methods
    that rotate (https://arxiv.org/abs/2404.00456). Learning from the prompt, moments of positions to come, buckets with one order
    of digits, and the split of bytes are this project's own.
    """

    config_class = KLTConfig
    config: KLTConfig

    state_fields = ("packed_keys", "packed_values", "tail", "first", "attention", "seen")
    state_types: ClassVar = {
        "packed_keys": DigitSlot, "packed_values": DigitSlot, "tail": KeysValues, "first": KeysValues,
    }  # fmt: skip

    _learn, _append = staticmethod(learn), staticmethod(coding.append)  # what ablations replace

    def __init__(self, config: KLTConfig, spec: CacheSpec, layer: int) -> None:
        super().__init__(config, spec, layer)
        self.observation_window = config.queries
        self.packed_keys: DigitSlot | None = None
        self.packed_values: DigitSlot | None = None
        self._tail: Tail | None = None
        self.first: KeysValues | None = None
        self.attention: mx.array | None = None
        self.seen: mx.array | None = None

    @property
    def tail(self) -> KeysValues | None:
        """The newest tokens, and the sinks while no token is packed."""
        return None if self._tail is None else self._tail.tokens()

    @tail.setter
    def tail(self, tokens: KeysValues | None) -> None:
        self._tail = None if tokens is None else Tail(*tokens)

    @classmethod
    def in_windows(cls, config: Config) -> tuple[type[LayerCache], Config] | None:
        """Return `int4`: a window is too short to learn from, and its tokens leave in the order of the text."""
        return Int4Cache, Int4Config(sinks=config.sinks) if isinstance(config, KLTConfig) else Int4Config()

    @property
    def packed(self) -> DigitRows | None:
        """The packed tokens, None while there are none."""
        if self.packed_keys is None or self.packed_values is None:
            return None
        return DigitRows(self.packed_keys, self.packed_values)

    def buckets(self) -> list[Bucket]:
        """Return the sinks, the packed tokens as they are decoded, then the tail."""
        if self._tail is None:
            return []
        tail = self._tail.tokens()
        if self.packed is None:
            return [tail.as_bucket()]
        keys, values = (unquantized(to_storage_dtype(coding.decoded(slot), tail.keys.dtype)) for slot in self.packed)
        return [*([] if self.first is None else [self.first.as_bucket()]), (keys, values), tail.as_bucket()]

    @property
    def kept(self) -> int:
        """Number of tokens stored: all."""
        packed = 0 if self.packed_keys is None else sum(self.packed_keys.rows)
        sinks, tail = (0 if part is None else part.keys.shape[2] for part in (self.first, self.tail))
        return packed + sinks + tail

    def _arrays(self) -> list[mx.array]:
        """Return all arrays held: of the tail the whole buffer."""
        tail = self._tail
        held = [self.packed_keys, self.packed_values, self.first, self.attention, self.seen]
        return [*iter_arrays(held), *(() if tail is None else (tail.keys, tail.values))]

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
        token, tail, packed = self._pending_chunk, self._tail, self.packed
        if mask is not None or token is None or tail is None or packed is None or queries.shape[2] != 1 or self.latent:
            return super().attend(queries, keys, values, scale, mask, sinks)
        if token.keys.dtype not in (tail.keys.dtype, mx.float32):
            return super().attend(queries, keys, values, scale, mask, sinks)
        tail.append(to_storage_dtype(token.keys, tail.keys.dtype), to_storage_dtype(token.values, tail.keys.dtype))
        output, mass = digit_attention(queries, self.first, packed, (tail.keys, tail.values), scale, tail.rows, sinks)
        self._count(mass, 1)
        self._pack_old()
        self._end()
        # Generation evaluates only outputs: state that no output depends on yet would keep all earlier steps in memory.
        # What was packed before is in the output's graph as it is.
        if self.packed_keys is not packed.keys:
            return mx.depends(output, self._arrays())
        assert self.attention is not None
        assert self.seen is not None
        return mx.depends(output, [tail.keys, tail.values, self.attention, self.seen])

    def absorb(self, keys: mx.array, values: mx.array, mass: mx.array | None) -> None:
        """Append a chunk to the tail, count attention, and pack what is old."""
        assert mass is not None  # since observation_window is never 0
        if self._tail is None:
            self._tail = Tail(keys, values)
        else:
            self._tail.append(keys, values)
        self._count(mass[..., -self._tail.rows :], keys.shape[2])
        self._pack_old()

    def _count(self, mass: mx.array, new: int) -> None:
        """Add the attention `[B, Hkv, tail]` that the last queries of a chunk of so many tokens gave."""
        queries = min(new, self.config.queries)
        seen = _seen(new, queries)
        if self.attention is None or self.seen is None:
            self.attention, self.seen = mass, seen
            return
        self.attention = mx.pad(self.attention, [(0, 0), (0, 0), (0, new)]) + mass
        self.seen = mx.concatenate([self.seen + queries, seen], axis=-1)

    def _pack_old(self) -> None:
        """Pack all but the newest tokens, as soon as there is a block of them, at first as soon as there is enough to learn from."""
        tail, config = self._tail, self.config
        assert tail is not None
        begins = self.packed_keys is None
        sinks, least = (config.sinks, config.learn) if begins else (0, BLOCK)
        count = (tail.rows - sinks - config.recent) // BLOCK * BLOCK
        if count < least:
            return
        assert self.attention is not None
        assert self.seen is not None
        tokens = tail.tokens()
        if begins:
            self.first = tokens.copy_tokens(0, sinks) if sinks else None
        old = tokens.slice_tokens(sinks, sinks + count)
        importance = (self.attention / self.seen)[..., sinks : sinks + count]
        indices = coding.ranked(importance)
        for name, slot, part, x, digits in zip(
            ("packed_keys", "packed_values"), self.slots, (self.packed_keys, self.packed_values), old,
            self._digits() if begins else (None, None),
        ):  # fmt: skip
            rows = x.astype(mx.float32)
            held = (
                part if digits is None else self._learn(rows, slot, self._offset - tail.rows + sinks, digits, x.dtype)
            )
            assert held is not None
            setattr(self, name, self._append(held, rows, indices))
        rest = sinks + count
        self._tail = Tail.copy_of(tokens.slice_tokens(rest, tail.rows))
        self.attention, self.seen = self.attention[..., rest:], self.seen[..., rest:]

    def _digits(self) -> tuple[tables.Digits, tables.Digits]:
        """Return how many digits each bucket's rows have, of keys and of values."""
        return _split(self._tables(), self.config, self.spec, self._offset)[self.layer]

    def _tables(self) -> tables.Tables:
        """Return what errors in each layer cost."""
        return tables.tables_of(None if self._group is None else self._group.model(), self.spec)

    def expected_bytes(self, tokens: int, batch: int = 1) -> int:
        """Return the bytes after a prompt of all tokens but one, and that one."""
        config, raw = self.config, 2 * sum(slot.heads * slot.dim for slot in self.slots)
        at = next(
            (n for n in (tokens - 1, tokens) if n - config.sinks - config.recent >= -(-config.learn // BLOCK) * BLOCK),
            0,
        )
        rows = (tokens - config.sinks - config.recent) // BLOCK if at else 0
        tail = tokens - (rows * BLOCK + config.sinks if at else 0)
        size = batch * (tail * (raw + 4 * self.slots[0].heads)) + 4 * tail
        if not at:
            return size
        digits = _split(tables.default_of(self.spec), config, self.spec, at)[self.layer]
        for slot, counts in zip(self.slots, digits):
            each = slot.dim * (slot.dim + 2) + max(counts) * (1 if slot.dim <= 256 else 2) + 2 * sum(counts)
            for share, count in zip(SHARES, counts):
                each += rows * share * count // 4 + -(-rows * share // TILE) * slot.dim
            size += batch * slot.heads * each
        return size + batch * config.sinks * raw

    def check_state(self) -> None:
        """Check the packed tokens, then what every method has; no token may be missing."""
        for name, slot in zip(("packed_keys", "packed_values"), self.slots):
            if (packed := getattr(self, name)) is not None:
                _check_slot(packed, name, slot.heads, slot.dim)
        if (self.packed_keys is None) != (self.packed_values is None):
            raise FormatError("keys are packed without values, or values without keys")
        if self.packed_keys is not None and self.packed_values is not None:
            if self.packed_keys.rows != self.packed_values.rows:
                raise FormatError("packed keys and values have different rows")
            sinks = self.config.sinks
            if sinks != (0 if self.first is None else self.first.tokens):
                raise FormatError(f"first should have {sinks} tokens")
        super().check_state()
        check_kept(self, self.offset)
        if self.tail is not None:
            rows = self.tail.tokens
            check_array(self.attention, "attention", (*self.tail.keys.shape[:2], rows), mx.float32)
            check_array(self.seen, "seen", (1, 1, rows), mx.float32)
        elif self.offset:
            raise FormatError("there is no tail")


@lru_cache(maxsize=16)
def _seen(new: int, queries: int) -> mx.array:
    """Return how many of the last queries of a chunk can see each of its tokens, float32 `[1, 1, new]`."""
    return mx.array(np.minimum(np.arange(new, 0, -1), queries).astype(np.float32)[None, None])


@lru_cache(maxsize=8)
def _split(
    known: tables.Tables, config: KLTConfig, spec: CacheSpec, tokens: int
) -> dict[int, tuple[tables.Digits, tables.Digits]]:
    """Return the digits of every layer, so that all layers together keep within the budget after so many tokens and more."""
    slots = tables.live_slots(spec)
    length = max(tokens, SHORTEST)
    packed = (length - config.sinks - config.recent) // BLOCK
    rows = [packed * share for share in SHARES]
    tail = -(-(config.recent + BLOCK) // STEP) * STEP
    room = 0.0
    for pair in slots.values():
        for slot in pair:
            raw = 2 * slot.heads * slot.dim
            scales = sum(-(-count // TILE) for count in rows) * slot.heads * slot.dim
            room += config.budget * length * raw - (config.sinks + tail) * raw
            room -= scales + slot.heads * slot.dim * (slot.dim + 2)
        room -= 4 * (pair[0].heads + 1) * tail
    return known.split(slots, room, rows)


def _check_slot(packed: Any, name: str, heads: int, dim: int) -> None:
    """Check packed keys or values."""
    if not isinstance(packed, DigitSlot):
        raise FormatError(f"{name} should be packed rows, not {str(packed)[:40]!r}")
    batch = packed.mean.shape[0] if packed.mean.ndim else 0
    check_array(packed.basis, f"{name}.basis", (batch, heads, dim, dim), mx.int8)
    check_array(packed.mean, f"{name}.mean", (batch, heads, dim))
    check_values(packed.mean, f"{name}.mean")
    widths: list[int] = []
    for letter, codes, scales in zip("abc", packed[4:7], packed[7:]):
        check_array(codes, f"{name}.codes_{letter}", (batch, heads, None, None), mx.uint8)
        tiles = -(-codes.shape[2] // TILE)
        check_array(scales, f"{name}.scales_{letter}", (batch, heads, tiles, dim), mx.uint8)
        widths.append(4 * codes.shape[3])
    if not widths or min(widths) < 1 or max(widths) > DIGITS * dim:
        raise FormatError(f"{name} has rows of {widths} digits, for {dim} dims")
    check_array(packed.order, f"{name}.order", (batch, heads, max(widths)), mx.uint8 if dim <= 256 else mx.uint16)
    check_values(packed.order, f"{name}.order", 0, dim - 1)
    check_array(packed.place, f"{name}.place", (batch, heads, sum(widths)), mx.bfloat16)
    check_values(packed.place, f"{name}.place", 0)
    if any(rows % share or rows // share != packed.rows[0] for rows, share in zip(packed.rows, SHARES)):
        raise FormatError(f"{name} has buckets of {packed.rows} rows")
