"""Prompt caches of mlx-lm's own `save_prompt_cache`: described, read without trust, and written.

Such a file names classes and holds their states, but neither a fingerprint nor a checksum. So classes are looked up in a
short list, and every state is held against the caches that the model itself makes for one token. Files that are written
here also name the model's fingerprint and the tokens, where mlx-lm leaves room for text of any kind.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.models.cache import (
    ArraysCache,
    CacheList,
    ChunkedKVCache,
    KVCache,
    QuantizedKVCache,
    RotatingKVCache,
    save_prompt_cache,
)

from mlxkv import stock
from mlxkv.errors import FormatError, InputError, MismatchError, UnsupportedError
from mlxkv.identity import fingerprint, same_model
from mlxkv.io.atomic import atomic_write
from mlxkv.io.safetensors import SafetensorsReader
from mlxkv.live.checks import FLOATS, MAX_OFFSET, check_array
from mlxkv.live.prompt_layouts import Place, PromptFile, parts_of_031, prompt_file
from mlxkv.models import cache_spec
from mlxkv.spec import Layer, is_int

_CLASSES: dict[str, Any] = {
    kind.__name__: kind for kind in (KVCache, RotatingKVCache, ChunkedKVCache, QuantizedKVCache, ArraysCache)
}
LAYOUTS = ("0.32", "0.31")
_FINGERPRINT, _TOKENS = "mlxkv_fingerprint", "mlxkv_tokens"  # names of our own among the texts in a file
_IN_PLACE = ("RotatingKVCache", "QuantizedKVCache")  # which mlx-lm makes of a KVCache: --max-kv-size, --kv-bits


def describe_prompt_cache(path: str | Path) -> dict[str, Any]:
    """Describe a file of mlx-lm's `save_prompt_cache`; arrays stay unread.

    Parameters
    ----------
    path
        The file.

    Returns
    -------
    dict
        `kind`, `layout` (of mlx-lm 0.31 or 0.32), `layers`, `caches` (layers by class), `tokens`, `dtypes`, `cache_bytes`,
        `metadata` (what else is written in it), `model_fingerprint` and `token_ids` (None unless mlxkv wrote it) and `file_bytes`.

    Raises
    ------
    InputError
        When it cannot be opened, or is a `.safetensors` file of something else.
    FormatError
        When it is damaged.
    """
    with SafetensorsReader(path) as reader:
        file = prompt_file(reader)
        states = [stored for stored in reader.arrays.values() if stored.shape and stored.end > stored.start]
        return {
            "kind": "prompt cache of mlx-lm",
            "layout": file.layout,
            "layers": len(file.classes),
            "caches": dict(Counter(file.classes)),
            "tokens": file.tokens,
            "dtypes": sorted({stored.dtype for stored in states}),
            "cache_bytes": sum(stored.end - stored.start for stored in states),
            "metadata": {key: text for key, text in file.texts.items() if key not in (_FINGERPRINT, _TOKENS)},
            "model_fingerprint": file.texts.get(_FINGERPRINT),
            "token_ids": _token_ids(file),
            "file_bytes": reader.size,
        }


def read_prompt_cache(path: str | Path, model: Any, *, widen: bool = True) -> list[Any]:
    """Read a file of mlx-lm's `save_prompt_cache` for a model, whose own caches it is held against.

    Parameters
    ----------
    path
        The file, from any source. Unless mlxkv wrote it, it says nothing about the weights that made it: with others of the
        same shapes it is accepted, and the model goes on from what it cannot understand.
    model
        A model that mlx-lm loaded.
    widen
        Whether to widen half precision where the model computes in float32, to go on from it.

    Returns
    -------
    list
        A prompt cache for `generate(..., prompt_cache=...)`, all of it computed.

    Raises
    ------
    InputError
        When it cannot be opened, or is a `.safetensors` file of something else.
    FormatError
        When it is damaged.
    MismatchError
        When its layers, or their states, cannot be those of this model, or it says that another one made it.
    UnsupportedError
        When it holds caches of another class, or of a batch of texts.
    """
    with SafetensorsReader(path) as reader:
        file = prompt_file(reader)
        if not same_model(file.texts.get(_FINGERPRINT, ""), fingerprint(model) if _FINGERPRINT in file.texts else ""):
            raise MismatchError(f"{file.name} says that another model or other weights made it than this one")
        expected = stock.example_caches(model, file.tokens)
        if len(file.classes) != len(expected):
            raise MismatchError(f"{file.name} has {len(file.classes)} layers, this model {len(expected)}")
        places, examples = file.places(), stock.entries(expected)
        if [(place.layer, place.child) for place in places] != _numbers_of(expected):
            raise MismatchError(f"{file.name} has other layers with lists of caches than this model")
        kept = cache_spec(model).layers
        read = {
            i: _read_entry(file, place, example, layer, widen)
            for i, (place, example, layer) in enumerate(zip(places, examples, kept))
        }
    mx.eval([entry.state for entry in read.values()])
    return stock.with_entries(expected, read)


def write_prompt_cache(
    path: str | Path, model: Any, cache: Sequence[Any], *, name: str = "", tokens: Sequence[int] | None = None,
    texts: Mapping[str, str] | None = None, layout: str = LAYOUTS[0],
) -> None:  # fmt: skip
    """Write a file as mlx-lm's `save_prompt_cache` does, without rows that are only allocated.

    `mlx_lm.generate --prompt-cache-file` of that version goes on from it, and `read_prompt_cache` reads it.

    Parameters
    ----------
    path
        The file to write; a failed write leaves no partial file.
    model
        The model that the cache is of.
    cache
        A prompt cache of mlx-lm's own classes, after 1 token or more.
    name
        Name that the model was loaded by; `mlx_lm.generate` loads it by that name.
    tokens
        Token ids that made the cache, for converting it back; None where they are not known.
    texts
        What else to write in it, by name.
    layout
        Version of mlx-lm that is to read it, one of `LAYOUTS`: "0.32", or "0.31" for 0.31.3.

    Raises
    ------
    InputError
        For another layout, and when the file cannot be written.
    UnsupportedError
        For caches of other classes, and for what the layout cannot hold.
    """
    if layout not in LAYOUTS:
        raise InputError(f"prompt caches are written in the layout of {' or '.join(LAYOUTS)}, not {layout[:20]!r}")
    said = {"model": name, "tokenizer_config": "{}", **(texts or {}), _FINGERPRINT: fingerprint(model)}
    said.pop(_TOKENS, None)
    if tokens is not None:
        said[_TOKENS] = " ".join(map(str, tokens))
    old = layout == LAYOUTS[1]
    layers = zip(stock.entries(cache), cache_spec(model).layers)
    used = stock.with_entries(cache, {i: _used(*each, old, i) for i, each in enumerate(layers)})
    with atomic_write(path) as file:
        out: Any = file  # mlx-lm hands it on to MLX, which takes files
        if old:
            mx.save_safetensors(out, *parts_of_031(used, said))
        else:
            save_prompt_cache(out, used, said)


def _used(entry: Any, described: Layer | None, old: bool, index: int) -> Any:
    """Return an entry that holds only what the other still uses; of an indexer's 0.31 keeps no values."""
    kind = type(entry).__name__
    if _CLASSES.get(kind) is not type(entry):
        raise UnsupportedError(f"layer {index} is a {kind}, which no prompt cache of mlx-lm is written with here")
    if kind == "QuantizedKVCache":
        keys, values, offset, *form = entry.state
        pairs = (tuple(part[..., :offset, :] for part in pair) for pair in (keys, values))
        state: Any = (*pairs, offset, *form)
    else:
        state = stock.used_state(kind, entry.state, entry)
        if old and described is None and kind == "KVCache" and state[1] is not None:
            state = state[0], state[1][..., :0], state[2]
    made = _CLASSES[kind].__new__(_CLASSES[kind])
    made.state = state
    return made


def _token_ids(file: PromptFile) -> list[int] | None:
    """Return the tokens that mlxkv wrote into a file, None where there are none."""
    if (text := file.texts.get(_TOKENS)) is None:
        return None
    found = text.split(" ")
    if len(found) != file.tokens or not all(re.fullmatch(r"[0-9]{1,9}", token) for token in found):
        raise FormatError(f"{file.name} names tokens, which are not the {file.tokens} that it holds")
    return [int(token) for token in found]


def _numbers_of(cache: list[Any]) -> list[tuple[int, int | None]]:
    """Return the numbers of a prompt cache's entries: of the layer, and of the place in its list of caches."""
    lists = [range(len(entry.caches)) if isinstance(entry, CacheList) else (None,) for entry in cache]
    return [(layer, child) for layer, children in enumerate(lists) for child in children]


def _read_entry(file: PromptFile, place: Place, expected: Any, described: Layer | None, widen: bool) -> Any:
    """Return one entry: of the class that the file names, where this layer can have it."""
    own, (layer, _, kind) = type(expected).__name__, place
    if kind not in _CLASSES:
        raise UnsupportedError(f"{file.name}: layer {layer} is a {kind[:40]!r}; mlxkv reads {', '.join(_CLASSES)}")
    if kind != own and (own != "KVCache" or kind not in _IN_PLACE):
        raise MismatchError(f"{file.name}: layer {layer} is a {kind}, this model has a {own} there")
    state = file.state(place)
    if isinstance(expected, KVCache | RotatingKVCache | ChunkedKVCache) and file.is_unused(place) != (
        expected.keys is None
    ):
        raise MismatchError(f"{file.name}: layer {layer} keeps tokens in one of the file and this model only")
    if described is None and kind == "KVCache":
        state = _with_values(state, expected)
    try:
        if kind == "QuantizedKVCache":
            state = _quantized_state(state, expected)
        else:
            state = stock.used_state(kind, state, _like(kind, state, expected))
    except FormatError as error:  # a file without checksum and fingerprint: of another model, rather than damaged
        raise MismatchError(f"{file.name} does not fit this model: layer {layer}: {error}") from None
    for array in _arrays(state):
        if array.shape[0] != 1:
            raise UnsupportedError(f"{file.name} is of {array.shape[0]} texts; only one can be continued")
        if array.dtype in FLOATS and not mx.all(mx.isfinite(array)).item():
            raise FormatError(f"{file.name}: layer {layer} holds values that are not finite")
    entry = _CLASSES[kind].__new__(_CLASSES[kind])  # as mlx-lm's own from_state does
    entry.state = stock.widened(state, expected) if widen and kind != "QuantizedKVCache" else state
    return entry


def _with_values(state: tuple[Any, ...], expected: Any) -> tuple[Any, ...]:
    """Return an indexer's state with the zeros that models put in place of values, where 0.31 had values of width 0."""
    keys, values, offset = state
    if isinstance(keys, mx.array) and isinstance(values, mx.array) and keys.ndim == 4 and not values.size:
        values = mx.zeros((*keys.shape[:3], expected.values.shape[3]), keys.dtype)
    return keys, values, offset


def _like(kind: str, state: tuple[Any, ...], expected: Any) -> Any:
    """Return the example to compare with; a window in place of a cache of all tokens has a size of its own."""
    if kind != "RotatingKVCache" or isinstance(expected, RotatingKVCache):
        return expected
    keep, window = state[3], state[4]
    if not (is_int(keep) and is_int(window, 1, MAX_OFFSET)) or keep >= window:
        raise FormatError(f"there is no window of {window} tokens that keeps {keep}")
    example: Any = _CLASSES[kind](window, keep)
    example.keys, example.values = expected.keys, expected.values
    return example


def _quantized_state(state: Any, expected: Any) -> tuple[Any, ...]:
    """Check what mlx-lm's generate makes of a cache with --kv-bits; return what is in use."""
    pairs, (offset, group, bits) = state[:2], state[2:]
    heads, dim = expected.keys.shape[1], expected.keys.shape[3]
    if group not in (32, 64, 128) or bits not in (2, 3, 4, 5, 6, 8) or dim % group or expected.values.shape[3] != dim:
        raise FormatError(f"{bits} bits in groups of {group} are not for keys of {dim} dimensions")
    for words, *scales in pairs:
        check_array(words, "words", (None, heads, None, dim * bits // 32), mx.uint32)
        for scale in scales:
            check_array(scale, "scales", (words.shape[0], heads, words.shape[2], dim // group))
        if not is_int(offset, 1, words.shape[2]):
            raise FormatError(f"{words.shape[2]} rows do not hold {offset} tokens")
    keys, values = (tuple(part[..., :offset, :] for part in pair) for pair in pairs)
    return keys, values, offset, group, bits


def _arrays(state: Any) -> list[mx.array]:
    """Return the arrays of a state with axes."""
    flat = cast(dict[str, Any], tree_flatten(list(state), destination={}))
    return [part for part in flat.values() if isinstance(part, mx.array)]
