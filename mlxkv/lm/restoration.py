"""A dump made a prompt cache of mlx-lm again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import ArraysCache, make_prompt_cache

from mlxkv import stock
from mlxkv.dump import STATE_TYPES, KVDump
from mlxkv.errors import FormatError, MismatchError
from mlxkv.identity import fingerprint, same_model
from mlxkv.models import cache_spec
from mlxkv.spec import STREAMS, CacheSpec

CACHE_DTYPES = ("float16", "bfloat16", "float32")


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
    if len(dump.held_groups) < len(spec.groups):
        raise MismatchError(
            "the dump has no windows, as it is a part of a cache: only one that ends with the text can be continued"
        )
    cache = make_prompt_cache(model)
    entries = stock.entries(cache)
    _restore_groups(entries, dump)
    types = {key: dump.state_types.get(key, dump.dtype) for key in dump.states}
    restore_states(entries, model, spec, dump.states, types, (dump.tokens.shape[0], dump.length))
    mx.eval([entry.state for entry in cache if entry is not None])
    return cache


def _restore_groups(entries: list[Any], dump: KVDump) -> None:
    """Fill the entries that keep keys and values."""
    kind = getattr(mx, dump.dtype)
    limit = mx.finfo(kind).max
    for number, group in enumerate(dump.spec.groups):
        first_dim = group.members[0].keys.dim
        for row, index in enumerate(group.indices):
            # What a codec decoded in a wider type may lie a little beyond the range of this one.
            arrays = (mx.array(dump.stream(name, number)[row]) for name in STREAMS)
            keys, values = (mx.clip(x, -limit, limit).astype(kind) for x in arrays)
            if group.latent:
                keys, values = keys[..., :first_dim], keys[..., first_dim:]
            if group.window is None:
                entries[index].update_and_fetch(keys, values)
            else:
                stock.fill_window(entries[index], keys, values, dump.length, dump.rings.get(number, keys.shape[2]))
            mx.eval(entries[index].state)  # layer by layer, so that only one copy exists beside the dump


def restore_states(
    entries: list[Any],
    model: Any,
    spec: CacheSpec,
    states: Mapping[str, np.ndarray],
    types: Mapping[str, str],
    tokens: tuple[int, int],
) -> None:
    """Fill the entries that keep other states than keys and values. These are compared with what the model makes of one token.

    Parameters
    ----------
    entries
        Entries of a fresh prompt cache, from `mlxkv.stock.entries`.
    model
        The model.
    spec
        Description of its cache.
    states
        Arrays keyed "layer.index", as `mlxkv.dump.KVDump.states`.
    types
        MLX's type of each of them.
    tokens
        Number of texts, and of tokens of each.

    Raises
    ------
    MismatchError
        When they are not this model's.
    """
    others = [i for i, layer in enumerate(spec.layers) if layer is None and entries[i] is not None]
    examples = stock.entries(stock.example_caches(model, tokens[1])) if others or states else []
    expected = {f"{index}.{slot}" for index in others for slot in stock.state_parts(examples[index])}
    if expected != set(states):
        differing = str(sorted(expected ^ set(states)))[:200]
        raise MismatchError(f"the dump and this model disagree about the states {differing}")
    for index in others:
        parts = {}
        for key in expected:
            layer, slot = key.split(".")
            if int(layer) == index:
                parts[slot] = _live_state(key, states[key], types[key])
        _check_batch(index, entries[index], parts, examples[index], tokens[0])
        try:
            stock.set_state_parts(entries[index], parts, examples[index])
        except FormatError as error:
            raise MismatchError(f"the states of layer {index} do not fit this model: {error}") from error


def _live_state(key: str, state: np.ndarray, own: str) -> Any:
    """Return one state as the model keeps it: an array of its own type, or a number."""
    if state.dtype not in STATE_TYPES.values():
        raise MismatchError(f"state {key} of the dump is {state.dtype}, which no layer keeps")
    if not state.ndim:
        return state.item()
    return mx.array(state).astype(getattr(mx, {"bool": "bool_"}.get(own, own)))


def _check_batch(index: int, entry: Any, parts: dict[str, Any], example: Any, batch: int) -> None:
    """Compare the types and shapes of a layer's states with the model's own and the number of sequences."""
    for slot, like in stock.state_parts(example).items():
        found, needed = _form(parts[slot]), _form(like)
        if isinstance(like, mx.array) and isinstance(parts[slot], mx.array):
            needed[1][0] = batch
            # Tokens are counted along axis 2 of caches of keys, and nowhere in other states.
            if not isinstance(entry, ArraysCache):
                needed[1][2:3] = found[1][2:3]
        if found != needed:
            raise MismatchError(
                f"state {index}.{slot} of the dump is {found[0]} {found[1]}; this model has {needed[0]} {needed[1]}"
            )


def _form(part: Any) -> tuple[str, list[int]]:
    """Return the type of a state, floats of any width alike, and its shape."""
    if not isinstance(part, mx.array):
        return "a number", []
    kind = "float" if mx.issubdtype(part.dtype, mx.floating) else str(part.dtype).removeprefix("mlx.core.")
    return kind, list(part.shape)
