"""A prompt cache held by reference, from which another thread takes parts.

All arrays are evaluated where the cache was made. Another thread then reads them through NumPy: an MLX array that is not
computed yet can be computed on its own thread alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import ArraysCache, KVCache, RotatingKVCache

from mlxkv import stock
from mlxkv.codec.parts import CachePart
from mlxkv.dump import STATE_TYPES, stream_key
from mlxkv.errors import MismatchError, UnsupportedError
from mlxkv.kernels.bits import QuantizedArray, slice_rows, unpack
from mlxkv.live.arrays import held
from mlxkv.live.base import LayerCache
from mlxkv.spec import STREAMS
from mlxkv.store.form import CacheForm

_Source = np.ndarray | QuantizedArray  # bfloat16 as uint16


class _Segment(NamedTuple):
    """Rows of a layer that follow each other, the first at position `first`."""

    first: int
    keys: _Source
    values: _Source


class Snapshot:
    """A prompt cache as it is now.

    Parameters
    ----------
    cache
        The prompt cache, mlx-lm's own or live caches that keep every token, on the thread that made it.
    form
        Form of the model's cache.
    tokens
        Token ids that made it; the cache may have seen fewer, and more where it can be cut anywhere.

    Attributes
    ----------
    tokens
        Token ids `[T]` int32 that are in it.
    firsts
        Position of the first row that it has of each group of layers with a window, by the group's number.
    rings
        As `mlxkv.dump.KVDump.rings`.
    nbytes
        Bytes that it keeps in memory.

    Raises
    ------
    UnsupportedError
        For a cache of another form.
    MismatchError
        When layers have seen different numbers of tokens, or others than were given.
    """

    def __init__(self, cache: Sequence[Any], form: CacheForm, tokens: np.ndarray) -> None:
        entries = stock.entries(cache)
        self._form = form
        self.firsts: dict[int, int] = {}
        self.rings: dict[int, int] = {}
        self.tokens = tokens[: self._length(entries, len(tokens))]
        found = [self._hold(index, entry) for index, entry in enumerate(entries)]
        states = dict(self._states(entries))
        self.state_types = {key: _type_name(x) if isinstance(x, mx.array) else "int64" for key, x in states.items()}
        self._half = {x.dtype for segments in found for _, *pair in segments for x in pair} == {mx.float16}
        views = [[_Segment(first, _viewed(keys), _viewed(values)) for first, keys, values in each] for each in found]
        states = {key: _viewed(x) if isinstance(x, mx.array) else x for key, x in states.items()}
        arrays = [x for segments in views for segment in segments for x in _arrays(segment)]
        arrays += [x for x in states.values() if isinstance(x, mx.array)]
        mx.eval(arrays)
        self.nbytes = sum(x.nbytes for x in arrays)
        self._layers = [[_Segment(first, _seen(keys), _seen(values)) for first, keys, values in each] for each in views]
        self._held_states = {key: _seen(x) for key, x in states.items()}

    @property
    def length(self) -> int:
        """Number of tokens T."""
        return len(self.tokens)

    @property
    def rows_from(self) -> int:
        """Position from which the rows of all windows are there, as `CacheForm.rows_from` counts."""
        return self._form.rows_from(self.firsts)

    def states(self) -> dict[str, np.ndarray]:
        """Return the states of other layers, of the last token.

        Returns
        -------
        dict[str, np.ndarray]
            As `mlxkv.dump.KVDump.states`.
        """
        return {
            key: np.array(x, np.int64) if isinstance(x, int) else _widened(x, self.state_types[key] == "bfloat16")
            for key, x in self._held_states.items()
        }

    def part(self, start: int, stop: int) -> CachePart:
        """Return the rows of some tokens, on any thread.

        Parameters
        ----------
        start, stop
            Their positions.

        Returns
        -------
        CachePart
            Those of windows as far as they are there.
        """
        streams: dict[str, list[np.ndarray]] = {}
        firsts: dict[int, int] = {}
        for number, group in enumerate(self._form.spec.groups):
            first = firsts[number] = min(stop, max(start, self.firsts.get(number, 0)))
            pairs = [self._rows(index, first, stop) for index in group.indices]
            if group.latent:
                pairs = [(np.concatenate(pair, axis=-1), pair[1][..., :0]) for pair in pairs]
            streams |= {stream_key(number, name): [pair[i] for pair in pairs] for i, name in enumerate(STREAMS)}
        return CachePart(start, stop, self.tokens[start:stop], streams, firsts, self._form.dtype)

    def _length(self, entries: Sequence[Any], given: int) -> int:
        """Check a cache's form, and return of how many tokens it can be stored."""
        if len(entries) != len(self._form.spec.layers):
            raise UnsupportedError(
                f"the prompt cache has {len(entries)} entries, this model's has {len(self._form.spec.layers)}"
            )
        seen = {entries[i].offset for i, layer in enumerate(self._form.spec.layers) if layer is not None}
        if len(seen) != 1:
            raise MismatchError(
                f"layers of the prompt cache have seen {sorted(map(str, seen))} tokens: a call was interrupted"
            )
        (offset,) = seen
        if not isinstance(offset, int) or offset < 1:
            raise MismatchError(f"the prompt cache has seen {offset!r} tokens")
        if offset > given and not self._form.cut_anywhere:
            raise MismatchError(f"the prompt cache has seen {offset} tokens, and {given} were given")
        return min(offset, given)

    def _hold(self, index: int, entry: Any) -> list[Any]:
        """Return the rows of an entry, not yet evaluated, and note where they begin."""
        layer = self._form.spec.layers[index]
        if layer is None:
            return []
        number = next(n for n, group in enumerate(self._form.spec.groups) if index in group.indices)
        if isinstance(entry, LayerCache):
            segments = list(_live_segments(entry))
        elif type(entry) is KVCache and layer.window is None:
            segments = [_Segment(0, *entry.keys_and_values())]  # type: ignore[no-untyped-call]
        elif type(entry) is RotatingKVCache and (entry.max_size, entry.keep) == (layer.window, 0):
            segments = list(self._ring_segments(number, entry))
        else:
            raise UnsupportedError(f"layer {index} keeps a {type(entry).__name__}, which is not stored")
        for segment in segments:
            for slot, x in zip(layer, (segment.keys, segment.values)):
                if (x.shape[0], x.shape[1], x.shape[3]) != (1, slot.heads, slot.dim):
                    raise UnsupportedError(f"layer {index} keeps {x.shape}, not [1, {slot.heads}, T, {slot.dim}]")
                if not isinstance(x, QuantizedArray) and x.dtype != self._form.types[index]:
                    raise UnsupportedError(
                        f"layer {index} keeps {x.dtype}, where the model makes {self._form.types[index]}"
                    )
        if layer.window is not None:
            self.firsts[number] = max(segments[0].first, self.firsts.get(number, 0))
            self.rings.setdefault(number, min(layer.window, sum(segment.keys.shape[2] for segment in segments)))
        return segments

    def _ring_segments(self, number: int, entry: RotatingKVCache) -> Iterator[Any]:
        """Yield what a window holds in the order of the text.

        Rows of before the window may be there too, but those of a cache that was taken out of a batch can be of padding.
        """
        keys, values, offset, _, window, at = stock.used_state(type(entry).__name__, entry.state, entry)
        rows = keys.shape[2]
        if rows != min(offset, window):
            raise MismatchError(f"a window of {window} holds {rows} of {offset} tokens")
        self.rings[number] = at
        for first, part in ((offset - rows, slice(at % rows, rows)), (offset - at, slice(0, at % rows))):
            if part.stop:
                yield _Segment(first, keys[..., part, :], values[..., part, :])

    def _states(self, entries: Sequence[Any]) -> Iterator[tuple[str, Any]]:
        """Yield the states of entries without keys and values."""
        for index, (entry, layer) in enumerate(zip(entries, self._form.spec.layers)):
            if layer is not None or entry is None:
                continue
            if type(entry) not in stock.SAVED:
                raise UnsupportedError(f"layer {index} keeps a {type(entry).__name__}, which is not stored")
            if isinstance(entry, ArraysCache) and not (entry.left_padding is None and entry.lengths is None):
                raise UnsupportedError(f"layer {index} is of texts of several lengths")
            for slot, part in stock.state_parts(entry).items():
                if isinstance(part, mx.array) and _type_name(part) not in STATE_TYPES:
                    raise UnsupportedError(f"layer {index} keeps a state of {part.dtype}, which is not stored")
                yield f"{index}.{slot}", part

    def _rows(self, index: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Return keys and values `[1, H, stop - start, D]` of a layer, float16 or float32."""
        pieces: list[list[np.ndarray]] = [[], []]
        for segment in self._layers[index]:
            low, high = start - segment.first, stop - segment.first
            rows = segment.keys.shape[2]
            if high <= 0 or low >= rows:
                continue
            for slot, source in enumerate((segment.keys, segment.values)):
                pieces[slot].append(self._floats(source, max(0, low), min(rows, high)))
        layer = self._form.spec.layers[index]
        assert layer is not None
        if not pieces[0]:
            kind = np.float16 if self._half else np.float32
            return tuple(np.zeros((1, slot.heads, 0, slot.dim), kind) for slot in layer)  # type: ignore[return-value]
        return tuple(part[0] if len(part) == 1 else np.concatenate(part, axis=2) for part in pieces)  # type: ignore[return-value]

    def _floats(self, source: _Source, start: int, stop: int) -> np.ndarray:
        """Return rows of a segment in the type that all parts have."""
        if isinstance(source, QuantizedArray):
            tile = source.tile_tokens
            begin = start // tile * tile
            unpacked = unpack(slice_rows(source, begin, stop), mx.float16 if self._half else mx.float32)
            return np.asarray(unpacked)[..., start - begin :, :]
        rows = source[..., start:stop, :]
        return rows if self._half else _widened(rows, source.dtype == np.uint16).astype(np.float32, copy=False)


def _live_segments(entry: LayerCache) -> Iterator[Any]:
    """Yield the buckets of a live cache that keeps every token."""
    if entry.observation_window or not entry.any_use or entry._pending_chunk is not None:
        raise UnsupportedError(f"{entry.method_name} does not keep every token as it is")
    buckets = [bucket for bucket in entry.buckets() if bucket[0].shape[-2]]
    first = entry.offset - sum(bucket[0].shape[-2] for bucket in buckets)
    for keys, values in buckets:
        yield _Segment(first, keys, values)
        first += keys.shape[-2]


def _arrays(segment: Any) -> Iterator[mx.array]:
    """Yield the arrays of a segment."""
    for x in segment[1:]:
        yield from (x.words, x.bias, x.scale) if isinstance(x, QuantizedArray) else (x,)


def _viewed(x: Any) -> Any:
    """Return an array as NumPy knows it, not yet evaluated, which later writes into the cache do not change."""
    if isinstance(x, QuantizedArray):
        return x
    return x.view(mx.uint16) if x.dtype == mx.bfloat16 else held(x)


def _seen(x: Any) -> Any:
    """Return an evaluated array as NumPy sees it, without a copy; anything else as it is."""
    return np.array(x, copy=False) if isinstance(x, mx.array) else x


def _widened(x: np.ndarray, is_bfloat16: bool) -> np.ndarray:
    """Return bfloat16, which NumPy sees as uint16, as float32."""
    return (x.astype(np.uint32) << 16).view(np.float32) if is_bfloat16 else np.asarray(x)


def _type_name(array: mx.array) -> str:
    return str(array.dtype).removeprefix("mlx.core.")
