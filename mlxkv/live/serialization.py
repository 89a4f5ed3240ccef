"""Save and load live caches: one checksummed container file, validated on reading, without pickle.

The header describes the model's cache, the methods with their settings and, per layer, the state as a tree. Each array
of the tree is a section of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

from mlxkv import stock
from mlxkv.config import Config
from mlxkv.errors import ChecksumError, FormatError, InputError, MismatchError, MlxkvError
from mlxkv.identity import fingerprint, same_model
from mlxkv.io import container
from mlxkv.io.atomic import atomic_write
from mlxkv.io.container import Reader, encode_section
from mlxkv.live.arrays import iter_arrays
from mlxkv.live.base import LayerCache, check_consistent, live_methods
from mlxkv.live.seam import CacheEntry, assemble_cache
from mlxkv.live.trees import array_bytes, array_type, describe_state, read_array, rebuild_state
from mlxkv.models import cache_spec
from mlxkv.spec import CacheSpec, is_int
from mlxkv.version import __version__

KIND = "live cache"
# What a malformed header or state makes Python or MLX raise, in our code or in a method's.
_MALFORMED = (ArithmeticError, AssertionError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError, ValueError)  # fmt: skip
Method = tuple[type[LayerCache], Config]


def save_cache(
    path: str | Path, model: Any, caches: Sequence[CacheEntry], *, notes: Mapping[str, Any] | None = None
) -> None:
    """Write a model's prompt cache: its live caches, and the states of other layers.

    Tokens that were taken back, and rows that mlx-lm allocates in advance, are not written.

    Parameters
    ----------
    path
        The file to write; a failed write leaves no partial file.
    model
        The model that the caches were made for.
    caches
        The prompt cache that `make_cache` returned. Layers may have different methods and settings.
    notes
        JSON values to store in the header as they are, such as the tokens and messages of a conversation.

    Raises
    ------
    InputError
        If none of the caches is live, one is of a kind or in a state that could not be read back, or the notes cannot be stored.
    MismatchError
        If the caches are of another model, of other layers, or have seen different numbers of tokens.
    """
    caches = stock.entries(caches)
    if not any(isinstance(entry, LayerCache) for entry in caches):
        raise InputError("none of these caches is a live one: mlxkv.make_cache makes them")
    check_consistent(caches)
    _check_model(model, caches)
    examples = _examples(model, caches, [entry.offset for entry in caches if isinstance(entry, LayerCache)])
    methods: dict[Method, int] = {}
    arrays: list[mx.array] = []
    layers: list[list[Any]] = []
    for layer, entry in enumerate(caches):
        with _errors_as(InputError, f"layer {layer} cannot be saved"):
            if isinstance(entry, LayerCache):
                entry.check_state()
                index = methods.setdefault((type(entry), entry.config), len(methods))
                fields = {name: _to_plain_type(value) for name, value in entry.state_to_save().items()}
                layers.append([index, entry.offset, describe_state(fields, arrays)])
            else:
                kind = type(entry).__name__
                used = stock.used_state(kind, getattr(entry, "state", None), examples[layer])
                layers.append([kind, None, describe_state(used, arrays)])
    _check_batches(caches)
    header = {
        "kind": KIND,
        "writer": __version__,
        "methods": [[live_methods.name_of(kind), config.to_dict()] for kind, config in methods],
        "spec": cache_spec(model).to_json(),
        "fingerprint": fingerprint(model),
        "layers": layers,
        "arrays": [[array_type(array), array.shape] for array in arrays],
        **({} if notes is None else {"notes": dict(notes)}),
    }
    sections = (encode_section(str(i), array_bytes(array), "raw") for i, array in enumerate(arrays))
    with atomic_write(path) as file:
        container.write(file, header, sections)


def load_cache(path: str | Path, model: Any) -> list[CacheEntry]:
    """Read a file that `save_cache` wrote, and call `attach(model)`.

    Parameters
    ----------
    path
        The file to read.
    model
        The model that the caches were made with.

    Returns
    -------
    list of CacheEntry
        A prompt cache that continues exactly as the saved one would have. All its arrays are computed: any thread can
        use it.

    Raises
    ------
    MismatchError
        For a file that was made with another model or other weights.
    FormatError
        For a damaged file (ChecksumError), a state that the file's method cannot have, or a method that is not
        installed.
    """
    with Reader(path) as reader:
        header = reader.header
        if header.get("kind") != KIND:
            raise FormatError(f"{reader.name} is no saved live cache; it says {str(header.get('kind'))[:80]!r}")
        stated = str(header.get("fingerprint", ""))
        if not same_model(stated, fingerprint(model)) or not _describes(header.get("spec"), cache_spec(model)):
            raise MismatchError(f"{reader.name} was made with another model or other weights than this one")
        with _errors_as(FormatError, f"{reader.name} does not describe a live cache"):
            return _read_caches(reader, model)


def read_notes(path: str | Path) -> dict[str, Any]:
    """Return the notes that `save_cache` was given, without reading the caches.

    Parameters
    ----------
    path
        The file to read, from any source: nothing of the notes is checked.

    Returns
    -------
    dict
        JSON values by name; empty where there are none.

    Raises
    ------
    InputError
        When the file cannot be opened.
    FormatError
        When it is no intact container.
    """
    with Reader(path) as reader:
        found = reader.header.get("notes")
    return dict(found) if isinstance(found, Mapping) else {}


def _describes(stated: Any, spec: CacheSpec) -> bool:
    """Return whether a file's description is of this cache; once, layers with a sliding window were not described."""
    if stated == spec.to_json():
        return True
    layers = tuple(None if layer is None or layer.window is not None else layer for layer in spec.layers)
    return any(layers) and stated == CacheSpec(spec.model_type, layers, spec.mode).to_json()


def _read_caches(reader: Reader, model: Any) -> list[CacheEntry]:
    """Return the caches that a file describes, every part checked and computed."""
    methods, rows = _read_methods(reader), _read_rows(reader, model)
    assembled = assemble_cache(model, {i: methods[row[0]] for i, row in enumerate(rows) if is_int(row[0])})
    caches = stock.entries(assembled)
    examples = _examples(model, caches, [offset for _, offset, _ in rows])
    arrays = {i: read_array(reader, str(i), *row) for i, row in enumerate(reader.header["arrays"])}
    if len(reader.sections) != len(arrays):
        raise FormatError(f"there are {len(reader.sections)} sections for {len(arrays)} arrays")
    for layer, (entry, (kind, offset, tree)) in enumerate(zip(caches, rows)):
        with _errors_as(FormatError, f"layer {layer}"):
            state = rebuild_state(tree, arrays)
            if isinstance(entry, LayerCache):
                _restore(entry, offset, state)
            else:
                stock.restore(entry, stock.used_state(kind, state, examples[layer]))
    if arrays:
        raise FormatError(f"{len(arrays)} arrays belong to no layer")
    check_consistent(caches)
    _check_batches(caches)
    mx.eval([list(_held_arrays(entry)) for entry in caches])
    return assembled


def _read_methods(reader: Reader) -> list[Method]:
    """Return the methods that the header names, and their settings; names are only looked up in the registry."""
    header = reader.header
    found: list[Method] = []
    # Files of before layers could differ have one method for all.
    for name, settings in header["methods"] if "methods" in header else [[header["method"], header["settings"]]]:
        cache_class = live_methods.find(name)
        if cache_class is None:
            raise FormatError(f"{reader.name} is of method {str(name)[:80]!r}, which is not installed here")
        found.append((cache_class, cache_class.config_class.from_saved(settings)))
    return found


def _read_rows(reader: Reader, model: Any) -> list[list[Any]]:
    """Return each layer's row of the header: its method's index or the class of mlx-lm's cache, offset and state."""
    header, kinds = reader.header, [type(entry).__name__ for entry in stock.entries(make_prompt_cache(model))]
    rows = header["layers"]
    if "methods" not in header:
        rows = [
            [kind, None, tree] if offset is None else [0, offset, tree] for (offset, tree), kind in zip(rows, kinds)
        ]
    if len(header["layers"]) != len(kinds):
        raise FormatError(f"there are {len(header['layers'])} layers, but the model has {len(kinds)}")
    for layer, row in enumerate(rows):
        if len(row) != 3 or not (is_int(row[0]) or (type(row[0]) is str and row[1] is None)):
            raise FormatError(f"layer {layer} is described by {str(row)[:80]}")
    return rows


def _restore(entry: LayerCache, offset: Any, state: Any) -> None:
    """Set a new cache's state to the file's, checked against method, settings and model."""
    if isinstance(state, list) and len(state) <= len(entry.state_fields):
        state = dict(zip(entry.state_fields, state))  # files had no names once: new fields come last
    if not isinstance(state, dict) or set(state) - set(entry.state_fields) or not state:
        raise FormatError(f"the state should have the parts {', '.join(entry.state_fields)}")
    if not is_int(offset):
        raise FormatError(f"the offset is {str(offset)[:40]!r}, no number of tokens")
    for name, value in state.items():
        setattr(entry, name, _to_state_type(entry, name, value))
    entry.offset = offset
    entry.check_state()


def _examples(model: Any, caches: Sequence[Any], offsets: Sequence[Any]) -> list[Any]:
    """Return mlx-lm's own prompt cache after as many tokens, to compare states with; nothing where no layer has one."""
    live = all(isinstance(entry, LayerCache) for entry in caches)
    seen = max((offset for offset in offsets if is_int(offset, 1)), default=1)
    return [] if live else stock.entries(stock.example_caches(model, seen))


def _check_model(model: Any, caches: Sequence[Any]) -> None:
    """Check that each entry is of this model and of the layer where it stands."""
    spec = cache_spec(model)
    if len(caches) != len(spec.layers):
        raise MismatchError(f"there are {len(caches)} caches, but the model has {len(spec.layers)} layers")
    live = {layer: entry for layer, entry in enumerate(caches) if isinstance(entry, LayerCache)}
    for layer, entry in live.items():
        if entry.layer != layer:
            raise MismatchError(f"the cache of layer {entry.layer} stands at layer {layer}: keep make_cache's order")
    made_for = {id(group): group.model() for entry in live.values() if (group := entry.group) is not None}
    # None stands for a model that is gone.
    others = {id(other): other for other in made_for.values() if other is not model}.values()
    same = all(entry.spec == spec for entry in live.values())
    if not same or any(other is None or fingerprint(other) != fingerprint(model) for other in others):
        raise MismatchError(
            "these caches were made for another model than this one, or for one that is gone: save them with the model that "
            "filled them"
        )


def _check_batches(caches: Sequence[Any]) -> None:
    """Check that all layers hold equally many sequences."""
    batches = set()
    for entry in caches:
        parts = [pair[0] for pair in entry.buckets()] if isinstance(entry, LayerCache) else _held_arrays(entry)
        batches |= {part.shape[0] for part in parts}
    if len(batches) > 1:
        raise MismatchError(f"the layers hold {' and '.join(map(str, sorted(batches)))} sequences")


def _held_arrays(entry: Any) -> Iterator[mx.array]:
    """Return all arrays of an entry."""
    fields = [getattr(entry, name) for name in entry.state_fields] if isinstance(entry, LayerCache) else entry.state
    return iter_arrays(fields)


def _to_plain_type(value: Any) -> Any:
    """Return a field of the state; a NamedTuple becomes a tuple without trailing fields that are None."""
    if not hasattr(value, "_fields"):
        return value
    used = [i for i, part in enumerate(value) if part is not None]
    return tuple(value[: used[-1] + 1])


def _to_state_type(entry: LayerCache, name: str, value: Any) -> Any:
    """Return a field of the state, as the NamedTuple that was saved."""
    if name not in entry.state_types or value is None:
        return value
    if not isinstance(value, tuple) or not all(isinstance(part, mx.array) for part in value):
        raise FormatError(f"{name} should be a tuple of arrays, not {str(value)[:40]!r}")
    try:
        return entry.state_types[name](*value)
    except TypeError:
        raise FormatError(f"{name} cannot have {len(value)} parts") from None


@contextmanager
def _errors_as(kind: type[MlxkvError], what: str) -> Iterator[None]:
    """Name what was read or written in errors, and make errors of Python's own typed ones."""
    try:
        yield
    except ChecksumError:
        raise
    except MlxkvError as error:
        raise kind(f"{what}: {error}") from error
    except _MALFORMED as error:
        raise kind(f"{what}: {str(error)[:200] or type(error).__name__}") from error
