"""Shares of a budget for the keys and values of each layer, by the costs of errors there: by layer, head and direction."""

from __future__ import annotations

import base64
import binascii
import warnings
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from mlxkv.errors import FormatError, LibraryWarning, MlxkvError
from mlxkv.identity import fingerprint, same_model
from mlxkv.io import entries
from mlxkv.io.inputs import MAX_JSON, parse_json, read_bytes
from mlxkv.kernels.digit_attention import DIGITS
from mlxkv.spec import CacheSpec, Slot

NAME = "klt"  # of the tables among the facts of calibration artifacts
VERSION = 1
_UNIT = 4  # digits, a byte of each row
_STEPS = 4  # of a table's logarithms: quarters of a binary digit
# Means over layers and heads of SmolLM2-135M: binary logarithms of eigenvalues times sensitivity at these shares of the channels,
# and of what buckets weigh. Their differences alone matter.
_SHARES = (0, 1 / 63, 2 / 63, 4 / 63, 8 / 63, 16 / 63, 24 / 63, 32 / 63, 40 / 63, 48 / 63, 56 / 63, 1)
_SPECTRA = (
    (-1.0, -1.44, -1.78, -2.23, -2.82, -3.64, -4.39, -5.04, -5.66, -6.3, -7.07, -8.93),
    (-2.29, -2.87, -3.2, -3.65, -4.23, -4.98, -5.55, -6.05, -6.53, -7.02, -7.6, -8.62),
)
_WEIGHTS = ((3.97, 0.13, -2.08), (3.11, -2.12, -4.59))

Digits = tuple[int, int, int]  # of a row of each bucket
Slots = tuple[Slot, Slot]


class LayerTable(NamedTuple):
    """Costs of errors in one layer, as binary logarithms.

    Parameters
    ----------
    keys, values
        Eigenvalues of a text's covariance times sensitivity, largest first, `[H, D]` and `[H, Dv]`.
    key_weights, value_weights
        Sensitivity of each bucket's tokens beside the mean of all, `[H, 3]`.
    """

    keys: np.ndarray
    values: np.ndarray
    key_weights: np.ndarray
    value_weights: np.ndarray


@dataclass(frozen=True, eq=False)
class Tables:
    """Costs of errors in each layer.

    Parameters
    ----------
    layers
        By the index of the layer in the model.
    """

    layers: Mapping[int, LayerTable]

    def split(self, slots: Mapping[int, Slots], room: float, rows: Sequence[int]) -> dict[int, tuple[Digits, Digits]]:
        """Split bytes over layers, keys and values, and buckets, for the least loss.

        Parameters
        ----------
        slots
            Keys and values of the layers.
        room
            Bytes of codes, places and orders, of all layers together.
        rows
            Rows that each bucket will have.

        Returns
        -------
        dict
            Digits of a row of each bucket, of keys and of values, by layer: 4 at least, and at most 4 a channel.
        """
        gains: list[np.ndarray] = []
        costs: list[np.ndarray] = []
        owners: list[tuple[int, int, int]] = []
        for layer, pair in slots.items():
            table = self.layers[layer]
            for number, (slot, values, weights) in enumerate(zip(pair, table[:2], table[2:])):
                steps = -np.log2(16.0) * np.arange(DIGITS)
                flat = (values[:, :, None] + steps).reshape(len(values), -1)
                ordered = -np.sort(-flat, axis=1)
                for bucket in range(3):
                    each = np.exp2(ordered + weights[:, bucket, None]).mean(axis=0)
                    gains.append(each.reshape(-1, _UNIT).mean(axis=1))
                    gains[-1][0] = np.inf  # which every bucket has
                    bytes_of = slot.heads * (rows[bucket] + _UNIT * (2 + (1 if slot.dim <= 256 else 2)))
                    costs.append(np.full(len(gains[-1]), float(bytes_of)))
                    owners.append((layer, number, bucket))
        sizes = [len(each) for each in gains]
        order = np.argsort(-np.concatenate(gains), kind="stable")
        taken = order[: int(np.searchsorted(np.cumsum(np.concatenate(costs)[order]), room, side="right"))]
        counts = np.bincount(np.repeat(np.arange(len(sizes)), sizes)[taken], minlength=len(sizes))
        found = {owner: _UNIT * max(1, int(count)) for owner, count in zip(owners, counts)}
        return {
            layer: tuple(tuple(found[layer, number, bucket] for bucket in range(3)) for number in range(2))  # type: ignore[misc]
            for layer in slots
        }

    def to_json(self) -> dict[str, Any]:
        """Return what `from_json` reads.

        Returns
        -------
        dict
            Quarters of the logarithms, relative to their largest, a byte each.
        """
        top = max(float(table.keys.max()) for table in self.layers.values())
        layers = {
            str(layer): [_encoded(part - (top if i < 2 else 0)) for i, part in enumerate(table)]
            for layer, table in self.layers.items()
        }
        return {"version": VERSION, "layers": layers}

    @classmethod
    def from_json(cls, data: Any, slots: Mapping[int, Slots]) -> Tables:
        """Read tables of a model.

        Parameters
        ----------
        data
            What `to_json` returned, from any source.
        slots
            Keys and values of the layers that it must be of.

        Returns
        -------
        Tables
            The tables.

        Raises
        ------
        FormatError
            When it is something else, of another version, or of other layers.
        """
        if not isinstance(data, dict) or data.get("version") != VERSION or not isinstance(data.get("layers"), dict):
            raise FormatError(f"these are no tables of klt, version {VERSION}: calibrate again")
        found = data["layers"]
        if set(found) != {str(layer) for layer in slots}:
            raise FormatError(f"klt's tables are of {len(found)} layers, the model has {len(slots)}: calibrate again")
        layers = {}
        for layer, pair in slots.items():
            shapes = [(slot.heads, width) for width in (None, 3) for slot in pair]
            parts = found[str(layer)]
            if not isinstance(parts, list) or len(parts) != len(shapes):
                raise FormatError(f"klt's tables have something else than 4 parts for layer {layer}")
            layers[layer] = LayerTable(
                *(
                    _decoded(part, heads, width or pair[i].dim)
                    for i, (part, (heads, width)) in enumerate(zip(parts, shapes))
                )
            )
        return cls(layers)


def live_slots(spec: CacheSpec) -> dict[int, Slots]:
    """Return the layers that `klt` packs.

    Parameters
    ----------
    spec
        Description of the model's cache.

    Returns
    -------
    dict
        Keys and values of the layers without a window, by index.
    """
    described = ((index, spec.layers[index]) for index in spec.attention_layers)
    return {index: (layer.keys, layer.values) for index, layer in described if layer is not None}


def default(slots: Mapping[int, Slots]) -> Tables:
    """Return tables for a model that was not calibrated: all layers and heads alike.

    Parameters
    ----------
    slots
        Keys and values of the layers.

    Returns
    -------
    Tables
        With the mean spectra of one small model.
    """
    return Tables({layer: _like_others(pair) for layer, pair in slots.items()})


@lru_cache(8)
def default_of(spec: CacheSpec) -> Tables:
    """Return `default` of a model.

    Parameters
    ----------
    spec
        Description of its cache.

    Returns
    -------
    Tables
        The same object for the same description.
    """
    return default(live_slots(spec))


def tables_of(model: Any, spec: CacheSpec) -> Tables:
    """Return the tables of a model's newest calibration, or those for a model that was not calibrated.

    Parameters
    ----------
    model
        A model that mlx-lm loaded; None for one that is gone.
    spec
        Description of its cache.

    Returns
    -------
    Tables
        What is found once for a model stays.
    """
    if model is None:
        return default_of(spec)
    key = id(model)  # models are dicts, which have no hash
    known = _found.get(key)
    if known is None or known[0]() is not model:
        found = _calibrated(model, spec) or default_of(spec)
        known = _found[key] = weakref.ref(model, lambda _: _found.pop(key, None)), found
    return known[1]


_found: dict[int, tuple[weakref.ref[Any], Tables]] = {}


def _calibrated(model: Any, spec: CacheSpec) -> Tables | None:
    """Return the newest tables of a model in the library of artifacts, of which nothing else is read."""
    own = ""
    for item in entries.items():
        if item.problem:
            continue
        try:
            facts = parse_json(read_bytes(item.folder / "meta.json", MAX_JSON), str(item.folder / "meta.json"))
            if NAME not in facts:
                continue
            own = own or fingerprint(model)  # which reads all weights
            if same_model(item.model_fingerprint, own):
                return Tables.from_json(facts[NAME], live_slots(spec))
        except MlxkvError as error:
            message = f"artifacts {item.fingerprint[: entries.SHORT]} are skipped: {error.message}"
            warnings.warn(message, LibraryWarning, stacklevel=2)
    return None


@lru_cache
def _like_others(pair: Slots) -> LayerTable:
    """Return what a layer costs whose heads are as those of other models are on average."""
    keys, values = (
        np.tile(np.interp(np.linspace(0, 1, slot.dim), _SHARES, known), (slot.heads, 1))
        for slot, known in zip(pair, _SPECTRA)
    )
    return LayerTable(keys, values, *(np.tile(known, (slot.heads, 1)) for slot, known in zip(pair, _WEIGHTS)))


def _encoded(values: np.ndarray) -> str:
    return base64.b64encode(np.clip(np.round(values * _STEPS), -128, 127).astype(np.int8).tobytes()).decode()


def _decoded(text: Any, heads: int, width: int) -> np.ndarray:
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, TypeError, ValueError):
        raise FormatError(f"klt's tables have {str(text)[:40]!r} in place of bytes in base64") from None
    if len(data) != heads * width:
        raise FormatError(f"klt's tables have {len(data)} numbers where {heads * width} are expected: calibrate again")
    return np.frombuffer(data, np.int8).reshape(heads, width) / _STEPS
