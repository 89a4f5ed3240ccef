"""The bytes of a model's caches after a text of any length, from shapes alone.

The model is traced once: six tokens run through it inside a transformation, where nothing can be computed. Then every kind of
cache takes in arrays of the text's shape, mlx-lm's own as well as live ones, and says what it holds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.models.cache import (
    ArraysCache,
    ChunkedKVCache,
    KVCache,
    QuantizedKVCache,
    RotatingKVCache,
    make_prompt_cache,
)

from mlxkv import stock
from mlxkv.config import Config
from mlxkv.errors import MlxkvError, UnsupportedError
from mlxkv.live.base import LayerCache
from mlxkv.models import probe
from mlxkv.models.discovery import describe
from mlxkv.spec import CacheSpec, Layer

CHUNK = 2048  # tokens that mlx-lm reads of a prompt at a time
MOST_DIMS = 4096  # of a head; some methods rotate heads by a matrix of so many rows
GROUP = 64  # values that share a scale with --kv-bits
_WINDOWS = (RotatingKVCache, ChunkedKVCache)


class Size(NamedTuple):
    """Bytes of a whole prompt cache.

    Parameters
    ----------
    held
        Bytes after the text.
    peak
        Bytes at most while its prompt is read: mlx-lm's windows hold a chunk of the prompt beside their tokens.
    """

    held: int
    peak: int


class _TracedError(Exception):
    """The way out of a transformation that is not to be carried out."""


class TracedModel:
    """A model whose caches are known: what is asked for of any length of text is answered from shapes.

    Parameters
    ----------
    name
        The model's type.
    model
        A model of mlx-lm's, whose weights need not be there.

    Attributes
    ----------
    layers
        For each entry of the prompt cache a `Layer`, or None where it keeps other state.
    spec
        The description for live caches; None where no layer has keys and values.
    refusal
        Why mlx-lm's `--kv-bits` fails on this model; empty where it works.

    Raises
    ------
    UnsupportedError
        When the model cannot be traced.
    """

    def __init__(self, name: str, model: Any) -> None:
        self.name, self._model = name, model
        self.refusal = ""
        self._sizes: dict[tuple[int | str, ...], Any] = {}  # of entries, by index, tokens and texts
        found = self._in_transformation(self._look)
        self._caches, self._seen = make_prompt_cache(model), found.entries
        self.layers: tuple[Layer | None, ...] = describe(found, rotations=False)
        self._quantizes = [hasattr(each, "to_quantized") for each in self._caches for _ in stock.entries([each])]
        self._alike: dict[Any, list[int]] = {}
        for index, (entry, seen) in enumerate(zip(stock.entries(self._caches), self._seen)):
            layer = self.layers[index]
            kind = (_form(entry, seen), layer and (layer, layer.use, layer.selects), self._quantizes[index])
            self._alike.setdefault(kind, []).append(index)
        try:
            self.spec: CacheSpec | None = CacheSpec(name, self.layers)
        except UnsupportedError:
            self.spec = None

    def own(self, tokens: int, batch: int = 1) -> Size:
        """Return the bytes of mlx-lm's own prompt cache.

        Parameters
        ----------
        tokens
            Length of the text.
        batch
            Number of texts.

        Returns
        -------
        Size
            Without rows that are only allocated.
        """
        return self._sum(lambda index: self._own(index, tokens, batch))

    def quantized(self, tokens: int, batch: int, bits: int) -> Size:
        """Return the bytes with mlx-lm's `--kv-bits`, once it has begun.

        Parameters
        ----------
        tokens, batch
            As for `own`.
        bits
            4 or 8.

        Returns
        -------
        Size
            Caches that mlx-lm does not quantize are counted as they are.

        Raises
        ------
        UnsupportedError
            When mlx-lm raises with this model.
        """
        if self.refusal:
            raise UnsupportedError(self.refusal)
        with_bits, as_it_is = partial(self._quantized, bits=bits), self._own
        return self._sum(lambda index: (with_bits if self._quantizes[index] else as_it_is)(index, tokens, batch))

    def live(self, kind: type[LayerCache], config: Config, tokens: int, batch: int = 1) -> Size:
        """Return the bytes of the prompt cache that `mlxkv.make_cache` makes.

        Parameters
        ----------
        kind
            The live method.
        config
            Its settings.
        tokens, batch
            As for `own`.

        Returns
        -------
        Size
            Live caches and mlx-lm's own of the other layers.

        Raises
        ------
        UnsupportedError
            When the method does not support this model.
        """
        spec = self.spec
        if spec is None:
            raise UnsupportedError(f"no layer of this {self.name} model keeps a key/value cache")
        if (widest := max(slot.dim for layer in spec.layers if layer for slot in layer)) > MOST_DIMS:
            raise UnsupportedError(
                f"heads of {widest:,} dims are wider than any model's: up to {MOST_DIMS:,} are planned"
            )
        live = dict.fromkeys(spec.attention_layers, (kind, config))
        if (windowed := kind.in_windows(config)) is not None:
            live |= dict.fromkeys(spec.window_layers, windowed)

        def size(index: int) -> Size:
            if index not in live:
                return self._own(index, tokens, batch)
            method, settings = live[index]
            held = method(settings, spec, index).expected_bytes(tokens, batch)
            return Size(held, held)

        return self._sum(size)

    def _sum(self, size: Callable[[int], Size]) -> Size:
        """Return the bytes of all entries, of which those that are alike are asked for once."""
        try:
            sizes = [(len(indices), size(indices[0])) for indices in self._alike.values()]
        except (OverflowError, RuntimeError, ValueError) as error:  # MLX has bounds of its own, as of any dimension
            raise UnsupportedError(f"these caches would be larger than MLX's arrays may be: {error}") from error
        return Size(sum(count * each.held for count, each in sizes), sum(count * each.peak for count, each in sizes))

    def _look(self, zero: mx.array) -> probe.Probe:
        """Watch six tokens; then see whether the model takes another one with quantized caches."""
        found = probe.run(self._model, zero)
        try:
            caches = [each.to_quantized(GROUP, 8) if hasattr(each, "to_quantized") else each for each in found.caches]
            if any(isinstance(each, QuantizedKVCache) for each in caches):
                self._model(mx.array([[7]]) + zero, cache=caches)
        except Exception as error:  # noqa: BLE001  # whatever mlx-lm raises is the reason
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            self.refusal = f"fails in mlx-lm with these caches: {reason[:120]}"
        return found

    def _in_transformation(self, function: Callable[[mx.array], Any]) -> Any:
        """Call a function with a zero of which nothing can be computed, so that no weight is, whatever the model does."""
        results: list[Any] = []

        def traced(zero: mx.array) -> mx.array:
            results.append(function(zero))
            raise _TracedError

        try:
            mx.compile(traced)(mx.zeros((1,), mx.int32))
        except _TracedError:
            return results[0]
        except Exception as error:
            if isinstance(error, MlxkvError):
                raise
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            if "[eval]" in reason:
                reason = "it reads numbers while it runs, so that its weights would be needed"
            raise UnsupportedError(f"a {self.name} model cannot be traced without weights: {reason[:200]}") from error
        raise AssertionError("a transformation that was left is never carried out")

    def _own(self, index: int, tokens: int, batch: int) -> Size:
        """Return the bytes of one of mlx-lm's own entries."""
        key = (index, tokens, batch)
        if key not in self._sizes:
            self._sizes[key] = self._measure(index, tokens, batch)
        return self._sizes[key]

    def _measure(self, index: int, tokens: int, batch: int) -> Size:
        entry, seen = stock.entries(self._caches)[index], self._seen[index]
        if isinstance(entry, ArraysCache):
            held = batch * sum(array.nbytes for array in _arrays(seen.state))
            return Size(held, held)
        if not isinstance(entry, (KVCache, *_WINDOWS)):
            return self._whole(tokens, batch)[index]
        if seen.keys is None:
            return Size(0, 0)
        kind: Any = type(entry)
        fresh, peak = kind.from_state(entry.state), 0
        for count in self._chunks(entry, tokens):
            if issubclass(kind, ChunkedKVCache):
                fresh.maybe_trim_front()
            fresh.update_and_fetch(*self._rows(seen, count))
            peak = max(peak, batch * fresh.nbytes)
        held = batch * sum(array.nbytes for array in _arrays(stock.used_state(kind.__name__, fresh.state, fresh)))
        return Size(held, max(held, peak) if isinstance(entry, _WINDOWS) else held)

    def _quantized(self, index: int, tokens: int, batch: int, bits: int) -> Size:
        seen = self._seen[index]
        if seen.keys is None:
            return Size(0, 0)
        cache: Any = QuantizedKVCache(GROUP, bits)  # type: ignore[no-untyped-call]
        cache.update_and_fetch(*self._rows(seen, tokens))
        held = batch * sum(array.nbytes for array in _arrays(cache.keys_and_values()))
        return Size(held, held)

    @staticmethod
    def _rows(seen: Any, count: int) -> list[mx.array]:
        """Return keys and values of so many tokens, which nothing computes."""
        return [mx.zeros((1, x.shape[1], count, x.shape[3]), x.dtype) for x in (seen.keys, seen.values)]

    @staticmethod
    def _chunks(entry: Any, tokens: int) -> list[int]:
        """Return the chunks in which a prompt comes, and its last token: of a window no more than fill it."""
        if not isinstance(entry, _WINDOWS):
            return [tokens]
        window = entry.max_size if isinstance(entry, RotatingKVCache) else entry.chunk_size
        whole, rest = divmod(tokens - 1, CHUNK)
        whole = min(whole, window // CHUNK + 3)  # from there on every chunk leaves as many rows
        return [*([CHUNK] * whole), *([rest] if rest else []), 1]

    def _whole(self, tokens: int, batch: int) -> list[Size]:
        """Return the bytes of every entry after the model itself was traced with the text, for classes of its own."""
        key = ("whole", tokens)
        if key not in self._sizes:
            caches = make_prompt_cache(self._model)

            def run(zero: mx.array) -> list[int]:
                for count in (tokens - 1, 1) if tokens > 1 else (1,):
                    self._model(mx.zeros((1, count), mx.int32) + zero, cache=caches)
                return [int(entry.nbytes) for entry in stock.entries(caches)]

            self._sizes[key] = self._in_transformation(run)
        return [Size(batch * held, batch * held) for held in self._sizes[key]]


def _arrays(state: Any) -> list[mx.array]:
    leaves = cast(list[tuple[str, Any]], tree_flatten(state))
    return [leaf for _, leaf in leaves if isinstance(leaf, mx.array)]


def _form(entry: Any, seen: Any) -> tuple[Any, ...]:
    """Return what decides the size of an entry."""
    shapes = tuple((array.shape, str(array.dtype)) for array in _arrays(seen.state))
    fixed = tuple(getattr(entry, name, None) for name in ("max_size", "keep", "chunk_size"))
    known = isinstance(entry, (ArraysCache, KVCache, *_WINDOWS))
    return type(entry).__name__, shapes, fixed, None if known else id(seen)


def windows(layers: Sequence[Layer | None]) -> bool:
    """Return whether a model has layers with a sliding window.

    Parameters
    ----------
    layers
        Those of a `TracedModel`.

    Returns
    -------
    bool
        True if one has.
    """
    return any(layer is not None and layer.window is not None for layer in layers)
