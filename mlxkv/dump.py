"""Dumps: caches outside a model, as plain arrays with a description, and the `.npz` files that store them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mlxkv.errors import FormatError, MismatchError, VersionError
from mlxkv.io.atomic import atomic_write
from mlxkv.io.inputs import parse_json
from mlxkv.io.npz import read_npz
from mlxkv.spec import STREAMS, CacheSpec, is_int

DUMP_VERSION = 1
# NumPy's types of what other layers keep, by MLX's names; NumPy has no bfloat16, and float32 holds it exactly.
STATE_TYPES = {
    **{name: np.dtype(name) for name in ("float16", "float32", "bool")},
    **{f"{sign}int{bits}": np.dtype(f"{sign}int{bits}") for sign in ("", "u") for bits in (8, 16, 32, 64)},
    "bfloat16": np.dtype("float32"),
}
_STATE, _SENSITIVITY, _GROUP = "state.", "sensitivity.", "group."


@dataclass
class KVDump:
    """A cache outside the model, with the tokens that made it.

    Parameters
    ----------
    k, v
        Keys and values of the main group of layers, `[layers, B, H, T, D]`, float16 or float32, rotated as the model keeps
        them. With MLA, k holds latent and k_pe side by side and v has width 0. Layers with a window of w tokens have the
        newest min(T, w), in the order of the text.
    spec
        Description of the cache.
    tokens
        Token ids `[B, T]`, int32.
    model
        Name that the model was loaded by.
    fingerprint
        `mlxkv.identity.fingerprint` of its weights; empty when unknown.
    dtype
        Type of the live cache: "bfloat16" has no NumPy type and is stored in a wider one.
    states
        Arrays of layers that keep other state (convolutions, recurrences), keyed "layer.index"; bfloat16 as float32.
    sensitivity
        Result of `mlxkv.sensitivity.sensitivity` for this text or its beginning; empty where it was not computed.
    start
        Position of the first token; above 0 only in a part of a decompressed cache.
    state_types
        MLX's type of each of the `states`, such as "bfloat16"; empty in files of before it, whose states have the live
        cache's type.
    others
        Keys and values of other groups of layers, in the order of `spec.groups`: "1.k", "1.v", "2.k" and so on. Those of windows
        are missing in a part that ends before the last token.
    rings
        Where mlx-lm's cache of a group with a window puts the next token, 1 to min(T, w), by the group's number: its arrays
        are rings, and sums over them depend on the order.

    Raises
    ------
    MismatchError
        When shapes, description and tokens do not belong together.

    Examples
    --------
    >>> import numpy as np
    >>> from mlxkv.spec import CacheSpec, Slot
    >>> spec = CacheSpec("gpt2", ((Slot("keys", 2, 8), Slot("values", 2, 8)),))
    >>> keys = np.zeros((1, 1, 2, 5, 8), np.float16)
    >>> dump = KVDump(keys, keys, spec, tokens=np.zeros((1, 5), np.int32))
    >>> dump.length, dump.fp16_bytes
    (5, 320)
    """

    k: np.ndarray
    v: np.ndarray
    spec: CacheSpec
    tokens: np.ndarray
    model: str = ""
    fingerprint: str = ""
    dtype: str = "float16"
    states: dict[str, np.ndarray] = field(default_factory=dict)
    sensitivity: dict[str, np.ndarray] = field(default_factory=dict)
    start: int = 0
    state_types: dict[str, str] = field(default_factory=dict)
    others: dict[str, np.ndarray] = field(default_factory=dict)
    rings: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        batch, length = self.tokens.shape if self.tokens.ndim == 2 else (0, 0)
        if not batch or not length:
            raise MismatchError(f"a cache holds at least one token; tokens have shape {self.tokens.shape}, not [B, T]")
        keys = [f"{index}.{name}" for index in range(1, len(self.spec.groups)) for name in STREAMS]
        if extra := sorted(set(self.others) - set(keys)):
            raise MismatchError(f"there are arrays {str(extra)[:80]}, which belong to no group of layers")
        held_groups = set(self.held_groups)
        for index in held_groups:
            for name in STREAMS:
                self._check_stream(index, name)
        for index, ring in self.rings.items():
            if index not in held_groups or self.spec.groups[index].window is None:
                raise MismatchError(f"group {str(index)[:20]} of the layers here is no ring")
            if not is_int(ring, 1, self.stream("k", index).shape[3]):
                raise MismatchError(f"the ring of group {index} is at {ring!r}, which is no row of it")
        held = {key: STATE_TYPES.get(name) for key, name in self.state_types.items()}
        if held and held != {key: array.dtype for key, array in self.states.items()}:
            raise MismatchError(f"the states are not of the types {str(self.state_types)[:200]}")

    def _check_stream(self, index: int, name: str) -> None:
        """Compare an array, and its sensitivity if there is one, with the description and the tokens."""
        group, (batch, length) = self.spec.groups[index], self.tokens.shape
        stream, key = group.stream(name), stream_key(index, name)
        if index and key not in self.others:
            raise MismatchError(f"there is no {key}, which {stream.layers} layers of the description have")
        rows = length if group.window is None else min(self.start + length, group.window)
        array, expected = self.stream(name, index), (stream.layers, batch, stream.heads, rows, stream.dim)
        if array.shape != expected:
            raise MismatchError(f"{key} has shape {array.shape}; its description and tokens say {expected}")
        measured = self.sensitivity.get("k.energy", np.zeros(0)).shape[-1:] or (0,)
        for part, last in ((key, (stream.dim, stream.dim)), (f"{key}.energy", (min(*measured, length),))):
            needed = (stream.layers, stream.heads, *last)
            found = self.sensitivity[part].shape if part in self.sensitivity else None
            if self.sensitivity and found != needed:
                raise MismatchError(f"the sensitivity of {part} has shape {found}; its description says {needed}")

    def stream(self, name: str, group: int = 0) -> np.ndarray:
        """Return one stream's array.

        Parameters
        ----------
        name
            "k" or "v".
        group
            Number of the group of layers, one of `held_groups`; 0 is the main one.

        Returns
        -------
        np.ndarray
            Keys or values `[layers, B, H, rows, D]`.
        """
        if group:
            return self.others[stream_key(group, name)]
        return self.k if name == "k" else self.v

    @property
    def held_groups(self) -> tuple[int, ...]:
        """Numbers of the groups of layers that the dump has: all, but for windows in a part of a cache."""
        groups = enumerate(self.spec.groups)
        return tuple(
            i for i, g in groups if not i or g.window is None or any(f"{i}.{n}" in self.others for n in STREAMS)
        )

    @property
    def length(self) -> int:
        """Number of tokens T in the cache."""
        return int(self.tokens.shape[1])

    @property
    def fp16_bytes(self) -> int:
        """Bytes of keys and values at 16 bits per element: the reference of every compression ratio."""
        return 2 * sum(array.size for array in (self.k, self.v, *self.others.values()))


def stream_key(group: int, name: str) -> str:
    """Return the name of a stream in files.

    Parameters
    ----------
    group
        Number of the group of layers; 0 is the main one.
    name
        "k" or "v".

    Returns
    -------
    str
        The name alone for the main group, with the number for others.

    Examples
    --------
    >>> stream_key(0, "k"), stream_key(2, "v")
    ('k', '2.v')
    """
    return f"{group}.{name}" if group else name


def write_dump(path: str | Path, dump: KVDump) -> None:
    """Write a dump as an uncompressed `.npz`.

    Parameters
    ----------
    path
        File to write; it is replaced atomically.
    dump
        The cache.

    Raises
    ------
    InputError
        When the file cannot be written.

    Notes
    -----
    Members: `k`, `v`, `layers` (indices of the main group's layers), `tokens`, `meta` (JSON text), `group.…` for each array of
    `others`, `state.…` for each other state, and `sensitivity.…` where the dump has a sensitivity.
    """
    meta = {
        "version": DUMP_VERSION,
        "model": dump.model,
        "fingerprint": dump.fingerprint,
        "dtype": dump.dtype,
        "spec": dump.spec.to_json(),
        "start": dump.start,
        "state_types": dump.state_types,
    }
    if dump.rings:
        meta["rings"] = {str(index): ring for index, ring in dump.rings.items()}
    arrays: dict[str, Any] = {_STATE + key: value for key, value in dump.states.items()}
    arrays |= {_GROUP + key: value for key, value in dump.others.items()}
    arrays |= {_SENSITIVITY + key: value for key, value in dump.sensitivity.items()}
    arrays.update(k=dump.k, v=dump.v, tokens=dump.tokens, meta=np.array(json.dumps(meta)))
    arrays["layers"] = np.array(dump.spec.groups[0].indices, dtype=np.int32)
    with atomic_write(path) as file:
        np.savez(file, **arrays)


def read_dump(path: str | Path) -> KVDump:
    """Read a dump (`.npz`).

    Parameters
    ----------
    path
        An `.npz` file, from any source: nothing is unpickled and no more is allocated than the file holds.

    Returns
    -------
    KVDump
        The cache.

    Raises
    ------
    InputError
        When the file cannot be opened.
    FormatError
        When it is damaged or not a dump.
    VersionError
        When it was written in another format version.
    MismatchError
        When its arrays do not belong together.
    """
    arrays = read_npz(path)
    missing = {"k", "v", "tokens", "meta", "layers"} - set(arrays)
    if missing:
        raise FormatError(f"{path} is no cache dump: {', '.join(sorted(missing))} missing; make one with mlxkv dump")
    meta = parse_json(arrays["meta"].tobytes(), f"{path}: meta")  # json knows UTF-32, NumPy's text
    if meta.get("version") != DUMP_VERSION:
        raise VersionError(f"{path} is a dump of version {meta.get('version')!r}; this mlxkv reads {DUMP_VERSION}")
    spec = CacheSpec.from_json(meta.get("spec", {}))
    if not np.array_equal(arrays["layers"], spec.groups[0].indices):
        raise FormatError(f"{path}: layers and meta disagree on which layers keep a cache")
    k, v, tokens, others = arrays["k"], arrays["v"], arrays["tokens"], _with_prefix(arrays, _GROUP)
    kinds = {array.dtype for array in (k, v, *others.values())}
    if k.dtype not in (np.float16, np.float32) or len(kinds) > 1 or tokens.dtype != np.int32:
        raise FormatError(
            f"{path}: expected float16 or float32 k and v and int32 tokens, found {k.dtype}, {v.dtype}, {tokens.dtype}"
        )
    model, fingerprint, dtype = (str(meta.get(key, "")) for key in ("model", "fingerprint", "dtype"))
    sensitivity = _with_prefix(arrays, _SENSITIVITY)
    names = [stream_key(index, name) for index in range(len(spec.groups)) for name in STREAMS]
    measured = {*names, *(f"{name}.energy" for name in names)}
    if sensitivity and (set(sensitivity) != measured or any(not _is_finite(a) for a in sensitivity.values())):
        raise FormatError(f"{path}: its sensitivity is not finite float32 of k, v and their energies")
    if not is_int(start := meta.get("start", 0)):
        raise FormatError(f"{path}: its first token is at position {start!r}")
    states, types = _with_prefix(arrays, _STATE), read_state_types(meta, str(path))
    if wrong := [array.dtype for array in states.values() if array.dtype not in STATE_TYPES.values()]:
        raise FormatError(f"{path}: no layer keeps a state of {wrong[0]}")
    rings = read_rings(meta, str(path))
    return KVDump(k, v, spec, tokens, model, fingerprint, dtype, states, sensitivity, start, types, others, rings)


def read_rings(meta: Mapping[str, Any], name: str) -> dict[int, int]:
    """Return where the rings of windows are that a file's description names.

    Parameters
    ----------
    meta
        The description, from any source.
    name
        Name of the file for messages.

    Returns
    -------
    dict[int, int]
        By the group's number, as `KVDump.rings`; empty where the file names none.

    Raises
    ------
    FormatError
        For anything else.
    """
    rings = meta.get("rings", {})
    if not isinstance(rings, dict) or not all(
        re.fullmatch(r"[0-9]{1,4}", key) and is_int(at) for key, at in rings.items()
    ):
        raise FormatError(f"{name}: {str(rings)[:80]} are no positions of rings")
    return {int(key): at for key, at in rings.items()}


def read_state_types(meta: Mapping[str, Any], name: str) -> dict[str, str]:
    """Return the types of other layers' states that a file's description names.

    Parameters
    ----------
    meta
        The description, from any source.
    name
        Name of the file for messages.

    Returns
    -------
    dict[str, str]
        Names of `STATE_TYPES` by state; empty where the file, of an earlier version, names none.

    Raises
    ------
    FormatError
        For anything else.
    """
    types = meta.get("state_types", {})
    if not isinstance(types, dict) or not all(isinstance(kind, str) and kind in STATE_TYPES for kind in types.values()):
        raise FormatError(f"{name}: {str(types)[:80]} are no types of states")
    return types


def _with_prefix(arrays: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """Return the arrays whose keys have a prefix, without it."""
    return {key.removeprefix(prefix): array for key, array in arrays.items() if key.startswith(prefix)}


def _is_finite(array: np.ndarray) -> bool:
    return array.dtype == np.float32 and bool(np.isfinite(array).all())
