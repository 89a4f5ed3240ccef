"""Interface to mlx-lm: load a model, run it, copy its cache out, restore a cache.

mlx-lm never exposes a model's cache, so every function here owns the `prompt_cache` list and passes it in.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm import load as mlx_lm_load
from mlx_lm.models.cache import ArraysCache, KVCache, make_prompt_cache

from mlxkv import _deprecated
from mlxkv.bundled import models as bundled
from mlxkv.dump import STATE_TYPES, KVDump
from mlxkv.errors import InputError, MismatchError, MlxkvError, ModelNotFoundError, UnsupportedError, suggest
from mlxkv.identity import fingerprint as fingerprint
from mlxkv.identity import same_model
from mlxkv.models import cache_spec
from mlxkv.spec import CacheSpec

PREFILL_CHUNK = 256
CACHE_DTYPES = ("float16", "bfloat16", "float32")
Progress = Callable[[int], None]


def load(name: str) -> tuple[Any, Any]:
    """Load a model and its tokenizer.

    Parameters
    ----------
    name
        A local mlx-lm directory, a hub id such as "org/name", "smollm2-135m", "gemma3-270m" or "miniature/<name>".

    Returns
    -------
    tuple
        The mlx-lm model and tokenizer. On a device without a GPU floating-point weights are float32, the fast type there.

    Raises
    ------
    ModelNotFoundError
        With the loader's reason, when nothing can be loaded.
    """
    path = bundled.model_path(name) or Path(name)
    looks_like_hub_id = name.count("/") == 1 and not name.startswith((".", "/", "~"))
    if not path.exists() and not looks_like_hub_id:
        near = suggest(name, bundled.names()).partition("? ")
        raise ModelNotFoundError(
            f"no model directory {name[:200]!r}",
            f"{''.join(near[:2]) if near[1] else ''}give a local path, a hub id such as org/name, or {' or '.join(bundled.WHEELS)}",
        )
    try:
        model, tokenizer = mlx_lm_load(str(path))[:2]
    except MlxkvError:
        raise
    except Exception as error:  # the hub client and mlx-lm raise dozens of types; their message is the reason
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelNotFoundError(f"cannot load {name!r}: {reason}") from error
    # An mlx module keeps a string as an ordinary attribute, beside its parameters.
    model.stored_dtype = _weights_dtype(model)
    if mx.default_device() == mx.cpu:
        model.set_dtype(mx.float32)
        mx.eval(model.parameters())
    return model, tokenizer


def text_start(tokenizer: Any) -> list[int]:
    """Return the tokens that a tokenizer puts before every text, such as a beginning-of-sequence token.

    Models that were trained with them predict badly without: what a model reads begins with them, wherever a text is cut.

    Parameters
    ----------
    tokenizer
        As `load` returns it.

    Returns
    -------
    list of int
        0 tokens or more.
    """
    nothing, digit = tokenizer.encode(""), tokenizer.encode("0")
    equal = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(nothing, digit))
    return [token for token, _ in equal]


def prefill(model: Any, tokens: Sequence[int], cache: list[Any], progress: Progress | None = None) -> mx.array:
    """Run tokens through the model in chunks, filling a cache.

    Parameters
    ----------
    model
        A loaded mlx-lm model.
    tokens
        Token ids; at least one.
    cache
        The model's prompt cache; it grows by the tokens.
    progress
        Called with the number of tokens of each chunk that is done.

    Returns
    -------
    mx.array
        Logits `[vocabulary]` of the last token.

    Raises
    ------
    InputError
        When there are no tokens.
    """
    if not len(tokens):
        raise InputError("no tokens to run: the prompt is empty")
    logits = mx.zeros(0)
    for start in range(0, len(tokens), PREFILL_CHUNK):
        chunk = mx.array([list(tokens[start : start + PREFILL_CHUNK])])
        logits = model(chunk, cache=cache)[0, -1]
        # Without the states in the same eval, the graph of the whole prompt would be kept.
        mx.eval(logits if start + PREFILL_CHUNK >= len(tokens) else [], [entry.state for entry in cache])
        if progress:
            progress(chunk.shape[1])
    return logits


def continue_greedily(model: Any, cache: list[Any], logits: mx.array, stop: Sequence[int] = ()) -> Iterator[int]:
    """Generate the most likely tokens, one by one.

    Parameters
    ----------
    model
        A loaded mlx-lm model.
    cache
        The model's prompt cache; each token is fed into it before it is yielded.
    logits
        Logits `[vocabulary]` of the last token in the cache.
    stop
        Tokens that end the text; they are neither yielded nor fed.

    Yields
    ------
    int
        Token ids, without end unless one of `stop` comes up.
    """
    while True:
        token = int(mx.argmax(logits))
        if token in stop:
            return
        logits = model(mx.array([[token]]), cache=cache)[0, -1]
        mx.eval(logits, [entry.state for entry in cache])
        yield token


def dump(model: Any, tokens: Sequence[int], *, max_tokens: int = 0, stop: Sequence[int] = (), name: str = "",
         dtype: str = "auto", progress: Progress | None = None) -> KVDump:  # fmt: skip
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
        For a model without an adapter, or one whose cache drops tokens.
    """
    spec = cache_spec(model)
    cache = make_prompt_cache(model)
    _check_full_cache(cache, spec)
    sequence = list(tokens)
    logits = prefill(model, sequence, cache, progress)
    generated = continue_greedily(model, cache, logits, stop)
    for _, token in zip(range(max_tokens), generated):
        sequence.append(token)
        if progress:
            progress(1)
    return extract_cache(cache, spec, [sequence], model=name, fingerprint=fingerprint(model), dtype=dtype)


def extract_cache(cache: list[Any], spec: CacheSpec, tokens: Sequence[Sequence[int]], *, model: str = "",
         fingerprint: str = "", dtype: str = "auto") -> KVDump:  # fmt: skip
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

    Returns
    -------
    KVDump
        Keys and values `[layers, B, H, T, D]` and the states of other layers.

    Raises
    ------
    MismatchError
        When tokens and offsets differ.
    UnsupportedError
        For caches that drop or quantize tokens.
    InputError
        For another dtype, or values beyond the one asked for.
    """
    token_array = np.array(tokens, dtype=np.int32)
    _check_full_cache(cache, spec)
    live = [cache[i] for i in spec.attention_layers]
    for index, entry in zip(spec.attention_layers, live):
        if entry.offset != token_array.shape[1]:
            raise MismatchError(f"layer {index} holds {entry.offset} tokens, but {token_array.shape[1]} were given")
    pairs = [entry.keys_and_values() for entry in live]
    source = _type_name(pairs[0][0])
    if spec.mode == "single_stream":
        pairs = [(mx.concatenate(pair, axis=-1), pair[1][..., :0]) for pair in pairs]
    store = _storage_type([array for pair in pairs for array in pair], dtype)
    k, v = (_stack([pair[i] for pair in pairs], store) for i in (0, 1))
    states: dict[str, mx.array] = {
        f"{index}.{slot}": cast(mx.array, state)
        for index, entry in enumerate(cache)
        if isinstance(entry, ArraysCache)
        for slot, state in enumerate(entry.cache)
        if state is not None
    }
    types = {key: _type_name(state) for key, state in states.items()}
    if unknown := set(types.values()) - set(STATE_TYPES):
        raise UnsupportedError(f"a layer keeps a state of {unknown.pop()}, which a dump cannot hold")
    arrays = {
        key: np.array(state.astype(mx.float32) if types[key] == "bfloat16" else state) for key, state in states.items()
    }
    return KVDump(k, v, spec, token_array, model, fingerprint, source, arrays, state_types=types)


def _type_name(array: mx.array) -> str:
    return str(array.dtype).removeprefix("mlx.core.")


def _check_full_cache(cache: list[Any], spec: CacheSpec) -> None:
    """Raise UnsupportedError unless each layer keeps all its keys and values, or states of another kind."""
    for index, entry in enumerate(cache):
        if type(entry) is not KVCache and (index in spec.attention_layers or not isinstance(entry, ArraysCache)):
            raise UnsupportedError(
                f"layer {index} keeps a {type(entry).__name__}; only a KVCache with every token can be dumped"
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


def restore(model: Any, dump: KVDump) -> list[Any]:
    """Restore a dump as an mlx-lm prompt cache.

    Parameters
    ----------
    model
        The loaded mlx-lm model that made the dump.
    dump
        The cache, from position 0 on.

    Returns
    -------
    list
        A fresh prompt cache for `generate(..., prompt_cache=...)`. All its arrays are computed: any thread can use it.

    Raises
    ------
    MismatchError
        When the dump comes from other weights, arguments or adapters, or another geometry, or starts at a later position.

    Warns
    -----
    WeakFingerprintWarning
        When the dump, of an earlier version, names only the first values of every weight.
    """
    spec = cache_spec(model)
    if dump.fingerprint and not same_model(dump.fingerprint, found := fingerprint(model)):
        raise MismatchError(
            f"the cache was made by {dump.model or 'a model'} with fingerprint {dump.fingerprint}, this model is {found}"
        )
    if dump.spec != spec:
        raise MismatchError("the cache's layers, heads or rotation differ from this model's")
    if dump.start:
        raise MismatchError(f"the dump starts at token {dump.start}: only one that starts at 0 can be continued")
    if dump.dtype not in CACHE_DTYPES:
        raise MismatchError(f"the dump's dtype is {dump.dtype!r}; a live cache holds {', '.join(CACHE_DTYPES)}")
    cache = make_prompt_cache(model)
    expected = {
        f"{i}.{slot}"
        for i, entry in enumerate(cache)
        if isinstance(entry, ArraysCache)
        for slot in range(len(entry.cache))
    }
    if expected != set(dump.states):
        differing = str(sorted(expected ^ set(dump.states)))[:200]
        raise MismatchError(f"the dump and this model disagree about the states {differing}")
    _check_states(model, dump)
    kind = getattr(mx, dump.dtype)
    limit = mx.finfo(kind).max
    first_dim = spec.layers[spec.attention_layers[0]][0].dim  # type: ignore[index]
    for row, index in enumerate(spec.attention_layers):
        # What a codec decoded in a wider type may lie a little beyond the range of this one.
        keys, values = (mx.clip(mx.array(x[row]), -limit, limit).astype(kind) for x in (dump.k, dump.v))
        if spec.mode == "single_stream":
            keys, values = keys[..., :first_dim], keys[..., first_dim:]
        cache[index].update_and_fetch(keys, values)
    for key, state in dump.states.items():
        layer, slot = key.split(".")
        own = dump.state_types.get(key, dump.dtype)
        cache[int(layer)][int(slot)] = mx.array(state).astype(getattr(mx, {"bool": "bool_"}.get(own, own)))
    mx.eval([entry.state for entry in cache])
    return cache


def _check_states(model: Any, dump: KVDump) -> None:
    """Compare a dump's states with those that the model makes of one token, of which only the shapes are computed."""
    if not dump.states:
        return
    example = make_prompt_cache(model)
    model(mx.zeros((1, 1), mx.int32), cache=example)
    for key, state in dump.states.items():
        layer, slot = key.split(".")
        like = example[int(layer)][int(slot)]
        needed = None if like is None else (dump.tokens.shape[0], *like.shape[1:])
        alike = needed and np.issubdtype(state.dtype, np.floating) == mx.issubdtype(like.dtype, mx.floating)
        if state.shape != needed or state.dtype not in STATE_TYPES.values() or not alike:
            raise MismatchError(f"state {key} of the dump is {state.dtype} {state.shape}; this model has {needed}")


def quantization(model: Any) -> str:
    """Describe the precision in which the model's weights are stored.

    Parameters
    ----------
    model
        A loaded mlx-lm model.

    Returns
    -------
    str
        Such as "4-bit, group 64", or the floating-point type, also where `load` has widened it.
    """
    for module in model.modules():
        if hasattr(module, "group_size") and hasattr(module, "bits"):
            return f"{module.bits}-bit, group {module.group_size}"
    return getattr(model, "stored_dtype", None) or _weights_dtype(model)


def _weights_dtype(model: Any) -> str:
    """Return the type of the largest parameter, since routers and norms may have another type."""
    parameters = cast(dict[str, mx.array], tree_flatten(model.parameters(), destination={}))
    return str(max(parameters.values(), key=lambda value: value.size).dtype).removeprefix("mlx.core.")


__getattr__ = _deprecated.renamed(__name__, {"take": "extract_cache", "LIVE_TYPES": "CACHE_DTYPES"})
