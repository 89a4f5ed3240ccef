"""A cache outside the model: plain arrays with a description of themselves, and the `.npz` they are kept in."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mlxkv.config import is_int
from mlxkv.errors import FormatError, MismatchError, VersionError
from mlxkv.io.atomic import atomic_write
from mlxkv.io.inputs import parse_json
from mlxkv.io.npz import read_npz
from mlxkv.spec import STREAMS, CacheSpec

DUMP_VERSION = 1
_STATE, _SENSITIVITY = "state.", "sensitivity."
_MEASURED = {*STREAMS, *(f"{name}.energy" for name in STREAMS)}


@dataclass
class KVDump:
    """A cache outside the model, with the tokens that made it.

    k, v: `[layers, B, H, T, D]`, float16 or float32, rotated as the model keeps them. tokens: `[B, T]`.
    states: arrays of layers that keep other state (convolutions), keyed "layer.index".
    model, fingerprint: the name it was loaded by and `mlxkv.lm.fingerprint` of its weights.
    dtype: what the live cache held ("bfloat16" has no NumPy type and is stored wider).
    start: position of the first token; 0 but for a part of a decompressed cache.
    sensitivity: what mlxkv.sensitivity found on this text or its beginning; empty if nobody asked.
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

    def __post_init__(self) -> None:
        batch, length = self.tokens.shape if self.tokens.ndim == 2 else (0, 0)
        if not batch or not length:
            raise MismatchError(f"a cache holds at least one token; tokens have shape {self.tokens.shape}, not [B, T]")
        for name, array in (("k", self.k), ("v", self.v)):
            stream = self.spec.stream(name)
            expected = (stream.layers, batch, stream.heads, length, stream.dim)
            if array.shape != expected:
                raise MismatchError(f"{name} has shape {array.shape}; its description and tokens say {expected}")
            measured = self.sensitivity.get("k.energy", np.zeros(0)).shape[-1]
            for key, last in ((name, (stream.dim, stream.dim)), (f"{name}.energy", (min(measured, length),))):
                needed = (stream.layers, stream.heads, *last)
                found = self.sensitivity[key].shape if key in self.sensitivity else None
                if self.sensitivity and found != needed:
                    raise MismatchError(f"the sensitivity of {key} has shape {found}; its description says {needed}")

    def stream(self, name: str) -> np.ndarray:
        """The k or v array."""
        return self.k if name == "k" else self.v

    @property
    def length(self) -> int:
        """Tokens in the cache."""
        return int(self.tokens.shape[1])

    @property
    def fp16_bytes(self) -> int:
        """Size of keys and values at 16 bits an element: the yardstick of every ratio."""
        return 2 * (self.k.size + self.v.size)


def write_dump(path: str | Path, dump: KVDump) -> None:
    """Write a KVDump as an `.npz` of k, v, layers, tokens, meta, one `state.…` array for each other state, and
    `sensitivity.…` if it has one."""
    meta = {
        "version": DUMP_VERSION,
        "model": dump.model,
        "fingerprint": dump.fingerprint,
        "dtype": dump.dtype,
        "spec": dump.spec.to_json(),
        "start": dump.start,
    }
    arrays: dict[str, Any] = {_STATE + key: value for key, value in dump.states.items()}
    arrays |= {_SENSITIVITY + key: value for key, value in dump.sensitivity.items()}
    arrays.update(k=dump.k, v=dump.v, tokens=dump.tokens, meta=np.array(json.dumps(meta)))
    arrays["layers"] = np.array(dump.spec.attention_layers, dtype=np.int32)
    with atomic_write(path) as file:
        np.savez(file, **arrays)


def read_dump(path: str | Path) -> KVDump:
    """Read what `write_dump` wrote. Raises InputError, FormatError, VersionError or MismatchError."""
    arrays = read_npz(path)
    missing = {"k", "v", "tokens", "meta", "layers"} - set(arrays)
    if missing:
        raise FormatError(f"{path} is no cache dump: {', '.join(sorted(missing))} missing; make one with mlxkv dump")
    meta = parse_json(arrays["meta"].tobytes(), f"{path}: meta")  # json knows UTF-32, NumPy's text
    if meta.get("version") != DUMP_VERSION:
        raise VersionError(f"{path} is a dump of version {meta.get('version')!r}; this mlxkv reads {DUMP_VERSION}")
    spec = CacheSpec.from_json(meta.get("spec", {}))
    if not np.array_equal(arrays["layers"], spec.attention_layers):
        raise FormatError(f"{path}: layers and meta disagree on which layers keep a cache")
    k, v, tokens = arrays["k"], arrays["v"], arrays["tokens"]
    if k.dtype not in (np.float16, np.float32) or v.dtype != k.dtype or tokens.dtype != np.int32:
        raise FormatError(
            f"{path}: expected float16 or float32 k and v and int32 tokens, found {k.dtype}, {v.dtype}, {tokens.dtype}"
        )
    model, fingerprint, dtype = (str(meta.get(key, "")) for key in ("model", "fingerprint", "dtype"))
    sensitivity = _with_prefix(arrays, _SENSITIVITY)
    if sensitivity and (set(sensitivity) != _MEASURED or any(not _is_finite(a) for a in sensitivity.values())):
        raise FormatError(f"{path}: its sensitivity is not finite float32 of k, v and their energies")
    if not is_int(start := meta.get("start", 0)):
        raise FormatError(f"{path}: its first token is at position {start!r}")
    return KVDump(k, v, spec, tokens, model, fingerprint, dtype, _with_prefix(arrays, _STATE), sensitivity, start)


def _with_prefix(arrays: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {key.removeprefix(prefix): array for key, array in arrays.items() if key.startswith(prefix)}


def _is_finite(array: np.ndarray) -> bool:
    return array.dtype == np.float32 and bool(np.isfinite(array).all())
