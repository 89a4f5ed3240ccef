"""mlx-lm's own caches: the entries of a prompt cache one by one, and their states.

Each class is listed here with what its state may be. From a state only the tokens that the cache still uses are taken:
mlx-lm's caches allocate many rows at once, and rows of tokens that were taken back stay in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models.cache import (
    ArraysCache,
    CacheList,
    ChunkedKVCache,
    KVCache,
    RotatingKVCache,
    make_prompt_cache,
)

from mlxkv.errors import FormatError
from mlxkv.spec import is_int

MAX_OFFSET = 2**30  # positions and sums of two stay within int32
FLOATS = (mx.float32, mx.float16, mx.bfloat16)
_EXAMPLE_TOKENS = 32


def entries(caches: Sequence[Any]) -> list[Any]:
    """Return the entries of a prompt cache, those within a list of caches one by one.

    `CacheSpec.layers` counts them in this order.

    Parameters
    ----------
    caches
        A prompt cache.

    Returns
    -------
    list
        The entries.
    """
    return [part for entry in caches for part in (entry.caches if isinstance(entry, CacheList) else [entry])]


def with_entries(caches: Sequence[Any], new: Mapping[int, Any]) -> list[Any]:
    """Return a prompt cache in which some entries are replaced.

    Parameters
    ----------
    caches
        A prompt cache, which does not change.
    new
        The new entries, by their index in `entries`.

    Returns
    -------
    list
        A prompt cache of the same form.
    """
    found: Iterator[Any] = iter([new.get(i, entry) for i, entry in enumerate(entries(caches))])
    return [
        CacheList(*[next(found) for _ in entry.caches]) if isinstance(entry, CacheList) else next(found)  # type: ignore[no-untyped-call]
        for entry in caches
    ]


def window_tokens(entry: RotatingKVCache) -> tuple[mx.array, mx.array, int]:
    """Return what a window holds, in the order of the text.

    Parameters
    ----------
    entry
        A cache that has seen a token, and keeps no first tokens.

    Returns
    -------
    tuple
        Keys and values `[B, H, min(T, window), D]`, and the row of its ring at which the next token goes.
    """
    keys, values, _, _, window, index = used_state(type(entry).__name__, entry.state, entry)
    if keys.shape[2] == window and index < window:
        keys, values = (mx.concatenate([x[..., index:, :], x[..., :index, :]], axis=2) for x in (keys, values))
    return keys, values, index


def fill_window(entry: RotatingKVCache, keys: mx.array, values: mx.array, offset: int, ring: int) -> None:
    """Give a new cache with a window its tokens: the inverse of `window_tokens`.

    Parameters
    ----------
    entry
        The cache.
    keys, values
        The newest tokens `[B, H, min(T, window), D]`, in the order of the text.
    offset
        T, the number of tokens seen.
    ring
        The row of its ring at which the next token goes.
    """
    if ring < keys.shape[2]:
        cut = keys.shape[2] - ring
        keys, values = (mx.concatenate([x[..., cut:, :], x[..., :cut, :]], axis=2) for x in (keys, values))
    entry.state = keys, values, offset, entry.keep, entry.max_size, ring


def state_parts(entry: Any) -> dict[str, Any]:
    """Return the arrays and numbers that make up an entry's state, without what it does not use.

    Parameters
    ----------
    entry
        An entry of a prompt cache.

    Returns
    -------
    dict
        By their place in the state; for an `ArraysCache` by their place among its arrays. The number 0 stands for values
        that are all 0.

    Raises
    ------
    FormatError
        For a class that is not listed here.
    """
    state = used_state(type(entry).__name__, entry.state, entry)
    found = state[0] if isinstance(entry, ArraysCache) else state
    parts = {str(i): part for i, part in enumerate(found) if part is not None}
    if isinstance(entry, KVCache) and "1" in parts and not mx.any(parts["1"]).item():
        parts["1"] = 0  # an indexer has no values: models give its cache keys or zeros in their place
    return parts


def set_state_parts(entry: Any, parts: Mapping[str, Any], example: Any) -> None:
    """Give a new entry the state of another: the inverse of `state_parts`.

    Parameters
    ----------
    entry
        A new entry of a prompt cache.
    parts
        Arrays and numbers by their place.
    example
        The same entry of `example_caches`.

    Raises
    ------
    FormatError
        When they are not of the model's own form.
    """
    arrays = isinstance(entry, ArraysCache)
    count = len(entry.cache if arrays else entry.state)
    if set(parts) - {str(i) for i in range(count)}:
        raise FormatError(f"there are parts {str(sorted(parts))[:80]} of a state, which should have {count}")
    filled = [parts.get(str(i)) for i in range(count)]
    if isinstance(entry, KVCache) and is_int(filled[1]) and isinstance(filled[0], mx.array):
        filled[1] = mx.zeros((*filled[0].shape[:3], example.values.shape[3]), filled[0].dtype)
    state = (filled, None, None) if arrays else tuple(filled)
    restore(entry, used_state(type(entry).__name__, state, example))


def example_caches(model: Any, tokens: int = 1) -> list[Any]:
    """Return mlx-lm's own prompt cache as it is after some tokens, to compare states with.

    Parameters
    ----------
    model
        A model that mlx-lm loaded.
    tokens
        Tokens that were seen; from 32 on no other state than of keys and values grows.

    Returns
    -------
    list
        One entry per layer. Shapes and types are known, but nothing is ever computed.
    """
    caches: list[Any] = make_prompt_cache(model)
    model(mx.zeros((1, min(tokens, _EXAMPLE_TOKENS)), mx.int32), cache=caches)
    return caches


def used_state(kind: str, state: Any, example: Any) -> Any:
    """Check the state of one of mlx-lm's caches, and return only what it still uses.

    Parameters
    ----------
    kind
        Name of the cache's class.
    state
        Its `state`, from any source.
    example
        The same layer's entry of `example_caches`.

    Returns
    -------
    object
        A state of the same form. A cache with it goes on exactly as one with the old state.

    Raises
    ------
    FormatError
        For a class that this layer does not have or that cannot be saved, and for an impossible state.
    """
    if kind != type(example).__name__:
        raise FormatError(f"there is a {kind[:40]}, where this model has a {type(example).__name__}")
    use = _USED.get(type(example))
    if use is None:
        raise FormatError(f"a {kind[:40]} cannot be saved, only {', '.join(each.__name__ for each in _USED)}")
    if not isinstance(state, list | tuple) or len(state) != len(example.state):
        raise FormatError(f"the state of a {kind} should have {len(example.state)} parts")
    return use(state, example)


def widened(state: Any, example: Any) -> Any:
    """Return a state in the type that the model computes in, where that is float32: mlx-lm rounds what comes to what is there.

    On a CPU models compute in float32. What a Mac saved is widened there, and not the other way round.

    Parameters
    ----------
    state
        Arrays and plain values, in lists and tuples.
    example
        The same layer's entry of `example_caches`.

    Returns
    -------
    object
        The same, floating-point arrays of it in float32 if the example has any such.
    """
    own = cast(dict[str, Any], tree_flatten(list(example.state), destination={}))
    if not any(isinstance(part, mx.array) and part.dtype == mx.float32 for part in own.values()):
        return state
    return tree_map(lambda x: x.astype(mx.float32) if isinstance(x, mx.array) and x.dtype in FLOATS else x, state)


def restore(entry: Any, state: Any) -> None:
    """Give a new entry a state.

    Parameters
    ----------
    entry
        An entry of mlx-lm's prompt cache.
    state
        What `used_state` returned for it.
    """
    if isinstance(entry, CacheList):
        for child, (part, _) in zip(entry.caches, state):
            restore(child, part)
    else:
        entry.state = state


def _kv_state(state: Any, example: Any) -> Any:
    keys, values, offset = state
    _check_counts(offset=offset)
    if not _check_pair(keys, values, example, offset):
        return None, None, 0
    return *_rows(keys, values, offset), offset


def _chunked_state(state: Any, example: Any) -> Any:
    keys, values, offset, chunk_size, start = state
    _check_counts(offset=offset, start=start)
    if chunk_size != example.chunk_size or type(chunk_size) is not type(example.chunk_size) or start > offset:
        raise FormatError(f"chunks of {str(chunk_size)[:20]} from token {start} of {offset} do not fit the model")
    pair = _rows(keys, values, offset - start) if _check_pair(keys, values, example, offset - start) else (None, None)
    return *pair, offset, chunk_size, start


def _rotating_state(state: Any, example: Any) -> Any:
    """Return the rows of the window. Up to `index` they are in use; once the window is full all are."""
    keys, values, offset, keep, window, index = state
    _check_counts(offset=offset, index=index)
    if (keep, window) != (example.keep, example.max_size) or not (is_int(keep) and is_int(window)):
        raise FormatError(f"a window of {str(window)[:20]} that keeps {str(keep)[:20]} tokens does not fit the model")
    if not _check_pair(keys, values, example, index):
        if offset:
            raise FormatError(f"nothing is stored of {offset} tokens")
        return None, None, 0, keep, window, 0
    length = keys.shape[2]
    if index == offset:  # nothing was overwritten yet
        keys, values = _rows(keys, values, index)
    elif offset < index or length < window or index < keep or (length > window and index != length):
        raise FormatError(f"row {index} of {length} cannot be the next after {offset} tokens in a window of {window}")
    if index > window:  # after a chunk of several tokens: the next one drops the oldest
        keys, values = (
            mx.concatenate([x[..., :keep, :], x[..., index - window + keep :, :]], axis=2) for x in (keys, values)
        )
        index = window
    return keys, values, offset, keep, window, index


def _arrays_state(state: Any, example: Any) -> Any:
    arrays, padding, lengths = state
    if not isinstance(arrays, list | tuple) or len(arrays) != len(example.cache):
        raise FormatError(f"there should be {len(example.cache)} arrays")
    batch = {array.shape[0] for array in arrays if isinstance(array, mx.array) and array.ndim}
    for i, (array, like) in enumerate(zip(arrays, example.cache)):
        if array is not None and like is not None:
            check_array(array, f"array {i}", (None, *like.shape[1:]), *(() if like.dtype in FLOATS else (like.dtype,)))
        elif array is not None:
            raise FormatError(f"array {i} is there, which this model does not use")
    for name, numbers in (("left padding", padding), ("lengths", lengths)):
        if numbers is not None:
            check_array(numbers, name, (None,), mx.int32)
            batch.add(numbers.shape[0])
    if len(batch) > 1 or 0 in batch:
        raise FormatError(f"the arrays are of {' and '.join(map(str, sorted(batch)))} sequences")
    return list(arrays), padding, lengths


def _list_state(state: Any, example: Any) -> Any:
    parts = []
    for part, child in zip(state, example.caches):
        if not isinstance(part, list | tuple) or len(part) != 2 or not isinstance(part[1], str):
            raise FormatError("a part of a CacheList should be a state and the name of its class")
        parts.append((used_state(part[1], part[0], child), part[1]))
    return parts


_USED: dict[type, Callable[[Any, Any], Any]] = {
    KVCache: _kv_state,
    RotatingKVCache: _rotating_state,
    ChunkedKVCache: _chunked_state,
    ArraysCache: _arrays_state,
    CacheList: _list_state,
}


SAVED = tuple(_USED)


def _check_counts(**counts: Any) -> None:
    for name, count in counts.items():
        if not is_int(count, 0, MAX_OFFSET):
            raise FormatError(f"{name} is {str(count)[:40]!r}, no number of tokens up to {MAX_OFFSET}")


def _check_pair(keys: Any, values: Any, example: Any, rows: int) -> bool:
    """Check keys and values against the example's; return whether rows of them are in use."""
    if keys is None and values is None and not rows:
        return False
    if example.keys is None:
        raise FormatError(f"there are {rows} tokens of a layer that keeps none")
    check_array(keys, "keys", (None, example.keys.shape[1], None, example.keys.shape[3]))
    check_array(values, "values", (*keys.shape[:1], example.values.shape[1], keys.shape[2], example.values.shape[3]))
    if not keys.shape[0] or keys.shape[2] < rows:
        raise FormatError(f"keys {list(keys.shape)} do not hold {rows} tokens")
    return rows > 0


def _rows(keys: mx.array, values: mx.array, stop: int) -> tuple[mx.array, mx.array]:
    return keys[..., :stop, :], values[..., :stop, :]


def check_array(value: Any, name: str, shape: Sequence[int | None], *types: mx.Dtype) -> None:
    """Check that a value is an array of a shape and type.

    Parameters
    ----------
    value
        Anything.
    name
        Its name for messages.
    shape
        The expected shape; None for an axis of any size.
    *types
        Allowed types; float32, float16 and bfloat16 if none are given.

    Raises
    ------
    FormatError
        When it is anything else.
    """
    types = types or FLOATS
    if not isinstance(value, mx.array):
        raise FormatError(f"{name} should be an array, not {str(value)[:40]!r}")
    fits = value.ndim == len(shape) and all(want in (None, size) for want, size in zip(shape, value.shape))
    if not fits or value.dtype not in types:
        expected = f"[{', '.join('any' if n is None else str(n) for n in shape)}] {' or '.join(map(str, types))}"
        raise FormatError(f"{name} is {list(value.shape)} {value.dtype}, expected {expected}".replace("mlx.core.", ""))
