"""A live prompt cache copied out of mlx-lm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache

from mlxkv import stock
from mlxkv.dump import STATE_TYPES, KVDump, stream_key
from mlxkv.errors import InputError, MismatchError, UnsupportedError
from mlxkv.identity import fingerprint as model_fingerprint
from mlxkv.lm.running import Progress, continue_greedily, prefill
from mlxkv.models import cache_spec
from mlxkv.spec import STREAMS, CacheSpec, is_int


def dump(model: Any, tokens: Sequence[int], *, max_tokens: int = 0, stop: Sequence[int] = (), name: str = "",
         fingerprint: str | None = None, dtype: str = "auto", progress: Progress | None = None) -> KVDump:  # fmt: skip
    """Run a text through a model and copy its cache.

    Parameters
    ----------
    model
        A loaded mlx-lm model.
    tokens
        Token ids of the text; at least one.
    max_tokens
        Tokens to generate after the text, at most; they are part of the dump.
    stop
        Tokens that end the generation.
    name
        Name that the model was loaded by, for the dump.
    fingerprint
        `mlxkv.identity.fingerprint` of the model, where it is known: to compute it reads all weights.
    dtype
        Type of the arrays, as for `extract_cache`.
    progress
        Called with the numbers of tokens that are done.

    Returns
    -------
    KVDump
        The cache of all tokens.

    Raises
    ------
    InputError
        When there are no tokens.
    UnsupportedError
        For a model that `cache_spec` refuses, and for an entry of its cache that cannot be copied.
    """
    spec = cache_spec(model)
    cache = make_prompt_cache(model)
    _check_entries(stock.entries(cache), spec)
    sequence = list(tokens)
    logits = prefill(model, sequence, cache, progress)
    generated = continue_greedily(model, cache, logits, stop)
    for _, token in zip(range(max_tokens), generated):
        sequence.append(token)
        if progress:
            progress(1)
    known = model_fingerprint(model) if fingerprint is None else fingerprint
    return extract_cache(cache, spec, [sequence], model=name, fingerprint=known, dtype=dtype)


def extract_cache(cache: list[Any], spec: CacheSpec, tokens: Sequence[Sequence[int]], *, model: str = "",
         fingerprint: str = "", dtype: str = "auto", start: int = 0) -> KVDump:  # fmt: skip
    """Copy a live mlx-lm cache: exactly `offset` tokens, without the space that mlx-lm preallocates in steps of 256.

    Parameters
    ----------
    cache
        The model's prompt cache.
    spec
        Description of the model's cache, from `mlxkv.models.cache_spec`.
    tokens
        Token ids `[B, T]` that made the cache.
    model
        Name that the model was loaded by.
    fingerprint
        `mlxkv.identity.fingerprint` of its weights.
    dtype
        Type of the arrays: "float16", "float32", or "auto" for float16 when that loses nothing and float32 otherwise.
    start
        Position of the first token to copy, 0 to T - 1; above 0 for a part that `CacheCodec.append_dump` takes.

    Returns
    -------
    KVDump
        Keys and values `[layers, B, H, T - start, D]` of each group of layers, of those with a window the newest tokens, and the
        states of other layers.

    Raises
    ------
    MismatchError
        When tokens and offsets differ, and when there are no tokens.
    UnsupportedError
        For caches that are not mlx-lm's own of this model.
    InputError
        For another dtype, or values beyond the one asked for.
    """
    token_array = np.array(tokens, dtype=np.int32)
    if token_array.ndim != 2 or not token_array.size:
        raise MismatchError(
            f"a cache of tokens [B, T] is copied, at least one; those given have shape {token_array.shape}"
        )
    entries = stock.entries(cache)
    _check_entries(entries, spec)
    for index, layer in enumerate(spec.layers):
        if layer is not None and entries[index].offset != token_array.shape[1]:
            raise MismatchError(
                f"layer {index} holds {entries[index].offset} tokens, but {token_array.shape[1]} were given"
            )
    if not is_int(start, 0, token_array.shape[1] - 1):
        raise InputError(f"there is no token {start!r} to start at: the cache has {token_array.shape[1]}")
    streams, rings = _read_groups(entries, spec, start)
    store = _storage_type([array for arrays in streams.values() for array in arrays], dtype)
    source = _type_name(streams["k"][0])
    stacked = {key: _stack(arrays, store) for key, arrays in streams.items()}
    k, v = stacked.pop("k"), stacked.pop("v")
    states, types = _read_states(entries, spec)
    return KVDump(
        k, v, spec, token_array[:, start:], model, fingerprint, source, states, start=start, state_types=types, others=stacked,
        rings=rings,
    )  # fmt: skip


def _read_groups(entries: list[Any], spec: CacheSpec, start: int) -> tuple[dict[str, list[mx.array]], dict[int, int]]:
    """Return the layers' arrays of each stream of each group, and where the rings of windows are."""
    streams: dict[str, list[mx.array]] = {}
    rings: dict[int, int] = {}
    for number, group in enumerate(spec.groups):
        pairs: list[Any] = []
        for index in group.indices:
            if group.window is None:
                keys, values = entries[index].keys_and_values()
                pairs.append((keys[:, :, start:], values[:, :, start:]))
            else:
                *pair, rings[number] = stock.window_tokens(entries[index])
                pairs.append(tuple(pair))
        if group.latent:
            pairs = [(mx.concatenate(pair, axis=-1), pair[1][..., :0]) for pair in pairs]
        streams |= {stream_key(number, name): [pair[i] for pair in pairs] for i, name in enumerate(STREAMS)}
    return streams, rings


def _read_states(entries: list[Any], spec: CacheSpec) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Return the states of entries that the description leaves out, and their types."""
    states: dict[str, np.ndarray] = {}
    types: dict[str, str] = {}
    for index, entry in enumerate(entries):
        if spec.layers[index] is None and entry is not None:
            for slot, part in stock.state_parts(entry).items():
                key, array = f"{index}.{slot}", part if isinstance(part, mx.array) else mx.array(part, mx.int64)
                types[key] = _type_name(array)
                if types[key] not in STATE_TYPES:
                    raise UnsupportedError(f"a layer keeps a state of {types[key]}, which a dump cannot hold")
                states[key] = np.array(array.astype(mx.float32) if types[key] == "bfloat16" else array)
    return states, types


def _type_name(array: mx.array) -> str:
    return str(array.dtype).removeprefix("mlx.core.")


def _check_entries(entries: list[Any], spec: CacheSpec) -> None:
    """Raise UnsupportedError unless each entry keeps what the description says, or states that can be copied."""
    if len(entries) != len(spec.layers):
        raise UnsupportedError(f"the prompt cache has {len(entries)} entries, this model's has {len(spec.layers)}")
    for index, (entry, layer) in enumerate(zip(entries, spec.layers)):
        if layer is None:
            fits = entry is None or type(entry) in stock.SAVED
        elif layer.window is None:
            fits = type(entry) is KVCache
        else:
            fits = type(entry) is RotatingKVCache and (entry.max_size, entry.keep) == (layer.window, 0)
        if not fits:
            raise UnsupportedError(
                f"layer {index} keeps a {type(entry).__name__}; only mlx-lm's own caches, as make_prompt_cache(model) makes "
                "them, can be dumped"
            )


def _stack(layers: list[mx.array], kind: mx.Dtype) -> np.ndarray:
    """Copy layer by layer into one array, so that only one copy of the cache exists beside the live one."""
    out = np.empty((len(layers), *layers[0].shape), np.float16 if kind == mx.float16 else np.float32)
    for row, layer in zip(out, layers):
        row[...] = np.array(layer.astype(kind))
    return out


def _storage_type(arrays: list[mx.array], requested: str) -> mx.Dtype:
    """Return the type to store arrays in, checking that it can hold them."""
    if requested not in ("auto", "float16", "float32"):
        raise InputError(f"dtype is auto, float16 or float32, not {requested!r}")
    if requested == "auto":
        exact = all(mx.array_equal(a.astype(mx.float16).astype(a.dtype), a).item() for a in arrays if a.size)
        return mx.float16 if exact else mx.float32
    if requested == "float16" and any((mx.abs(a).max() > 65504).item() for a in arrays if a.size):
        raise InputError("some values are beyond float16's 65504; dump with --dtype float32")
    return getattr(mx, requested)
