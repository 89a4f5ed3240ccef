"""Prompt caches made of others: live ones of mlx-lm's, and mlx-lm's own of live, quantized or rotating ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import ArraysCache, KVCache, QuantizedKVCache, RotatingKVCache, make_prompt_cache

from mlxkv import stock
from mlxkv.config import Config
from mlxkv.errors import UnsupportedError
from mlxkv.kernels.bits import unpack
from mlxkv.live.arrays import KeysValues
from mlxkv.live.base import LayerCache
from mlxkv.live.seam import CacheEntry, make_cache
from mlxkv.live.windowing import WindowedCache
from mlxkv.models import cache_spec
from mlxkv.spec import Layer


def live_cache(model: Any, method: str | Config, cache: Sequence[Any]) -> list[CacheEntry]:
    """Make live caches that take over what mlx-lm's own hold, as if it had been one chunk.

    Parameters
    ----------
    model
        A model that mlx-lm loaded.
    method
        What `make_cache` takes.
    cache
        mlx-lm's own prompt cache of this model, after 1 token or more.

    Returns
    -------
    list of CacheEntry
        The live caches, all of them computed. Entries of layers without one are passed through.

    Raises
    ------
    PresetError
        For an unknown method.
    UnsupportedError
        For a model that the method does not support, or of which it leaves all layers to mlx-lm, and a method that goes by the
        attention which tokens get.
    """
    made = make_cache(model, method)
    if not any(isinstance(entry, LayerCache) for entry in stock.entries(made)):
        raise UnsupportedError(
            f"no layer of this model has a live cache with {method}: its layers have windows, or other states"
        )
    passed: dict[int, Any] = {}
    for i, (exact, entry) in enumerate(zip(stock.entries(cache), stock.entries(made))):
        if not isinstance(entry, LayerCache):
            passed[i] = exact
            continue
        if entry.observation_window:
            raise UnsupportedError(
                f"{method} goes by the attention that tokens get, and a cache comes without its queries",
                "full, int8, int4 and kivi take tokens as they are",
            )
        windowed = isinstance(exact, RotatingKVCache)
        keys, values, *_ = stock.window_tokens(exact) if windowed else exact.keys_and_values()
        _take_over(entry, keys, values, exact.offset)
        if entry.group is not None:
            entry.group.others = passed
        mx.eval(entry.state[:-1])
    return stock.with_entries(made, passed)


def plain_cache(model: Any, cache: Sequence[Any]) -> list[Any]:
    """Make mlx-lm's own prompt cache, as it makes it for a model, of live, quantized and rotating caches.

    Parameters
    ----------
    model
        A model that mlx-lm loaded.
    cache
        A prompt cache of this model, after 1 token or more.

    Returns
    -------
    list
        mlx-lm's own caches with the values that the others hold, in the type that the model computes in where that is wider;
        all of them computed. Where a cache is one of its own already, the arrays may be the same: only one of the two can go on.

    Raises
    ------
    UnsupportedError
        Where tokens are missing, or are not in the order of the text, and for caches of other classes or of batches.
    """
    made, spec = make_prompt_cache(model), cache_spec(model)
    examples = stock.entries(stock.example_caches(model))
    entries, new = stock.entries(cache), stock.entries(made)
    if len(entries) != len(new):
        raise UnsupportedError(f"the prompt cache has {len(entries)} entries, this model's has {len(new)}")
    for i, (entry, own, layer) in enumerate(zip(entries, new, spec.layers)):
        if isinstance(entry, ArraysCache) and not (entry.left_padding is None and entry.lengths is None):
            raise UnsupportedError(f"layer {i} is of texts of several lengths; only single ones can be converted")
        if entry is own is None:
            continue
        if type(entry) is type(own):
            own.state = stock.widened(entry.state, examples[i])
            continue
        keys, values = stock.widened(_all_tokens(entry, own, layer, i), examples[i])
        if layer is None or layer.window is None:
            own.state = keys, values, entry.offset
        else:
            keys, values = (part[..., -layer.window :, :] for part in (keys, values))
            stock.fill_window(own, keys, values, entry.offset, keys.shape[2])
        mx.eval(own.state[:2])
    mx.eval([own.state for own in new if own is not None])
    return made


def _take_over(entry: LayerCache, keys: mx.array, values: mx.array, offset: int) -> None:
    """Let a new live cache store the tokens of another one."""
    entry.offset = offset
    if isinstance(entry, WindowedCache) and entry.window is not None:
        missing = offset - entry.leaving(offset) - keys.shape[2]
        keys, values = (_with_tokens(part, missing) for part in (keys, values))
    entry._store(KeysValues(keys, values), None)


def _with_tokens(part: mx.array, missing: int) -> mx.array:
    """Return tokens of a window with more before them, or without the oldest: no query sees those of its oldest block."""
    if missing <= 0:
        return part[..., -missing:, :]
    return mx.concatenate([mx.repeat(part[..., :1, :], missing, axis=2), part], axis=2)


def _all_tokens(entry: Any, own: Any, layer: Layer | None, index: int) -> tuple[mx.array, mx.array]:
    """Return the keys and values of all tokens that mlx-lm's own entry would hold, in the order of the text."""
    kept_by_model = type(own) is KVCache or (type(own) is RotatingKVCache and own.keep == 0)
    if kept_by_model and isinstance(entry, LayerCache):
        ordered = entry.any_use or (entry.kept == entry.offset and entry.can_take_back(1))
        if not ordered:
            raise UnsupportedError(
                f"layer {index}: {entry.method_name} gives tokens up, merges or sorts them, so they are not all there as"
                " they were; full, int8, int4 and kivi keep them"
            )
        buckets = entry.buckets()
        keys, values = (
            mx.concatenate([unpack(bucket[slot], bucket[slot].dtype) for bucket in buckets], axis=2) for slot in (0, 1)
        )
        return keys, values
    if type(own) is KVCache and type(entry) is QuantizedKVCache:
        form: dict[str, Any] = {"group_size": entry.group_size, "bits": entry.bits}
        keys, values = (
            mx.dequantize(*(part[..., : entry.offset, :] for part in pair), **form) for pair in entry.state[:2]
        )
        return keys, values
    if type(own) is KVCache and layer is not None and type(entry) is RotatingKVCache:
        keys, values, offset, _, _, at = stock.used_state("RotatingKVCache", entry.state, entry)
        if keys.shape[2] != offset or at != offset:
            raise UnsupportedError(
                f"layer {index} has given up {offset - keys.shape[2]} of {offset} tokens (--max-kv-size): only a prompt cache"
                " of mlx-lm can hold what is left"
            )
        return keys, values
    raise UnsupportedError(f"layer {index} is a {type(entry).__name__}, where this model has a {type(own).__name__}")
