"""`klt` with one part changed: what its ablation measures."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

import mlx.core as mx
import numpy as np

from mlxkv.kernels._rotation import rotation
from mlxkv.kernels.digit_attention import UNIT, DigitSlot, channels
from mlxkv.live.klt import coding, learning, tables
from mlxkv.live.klt.coding import SHARES
from mlxkv.live.klt.tables import Tables
from mlxkv.live.methods.klt import KLTCache, KLTConfig
from mlxkv.spec import CacheSpec


class Uncalibrated(KLTCache):
    """With the tables that klt has without calibration: all layers alike."""

    def _tables(self) -> Tables:
        return tables.default_of(self.spec)


class OneBucket(KLTCache):
    """All tokens with equally many digits, whatever attention they get."""

    def _tables(self) -> Tables:
        return _alike(super()._tables())


class AsTheyStand(KLTCache):
    """Directions of keys as they stand in the text, not averaged over positions to come."""

    def __init__(self, config: KLTConfig, spec: CacheSpec, layer: int) -> None:
        super().__init__(config, spec, layer)
        keys, values = self.slots
        self.slots = replace(keys, rope=None), values


class Fixed(KLTCache):
    """Channels are those of a fixed orthogonal matrix; which of them have how many digits still follows from the text."""

    def _learn(self, x: mx.array, slot: Any, start: int, digits: Any, dtype: mx.Dtype) -> DigitSlot:  # type: ignore[override]
        found = learning.learn(x, slot, start, digits, dtype)
        matrix = self.matrix(slot.dim)
        variances = ((x - mx.expand_dims(found.mean.astype(mx.float32), 2)) @ matrix).square().mean(axis=2)
        largest = mx.argsort(-variances, axis=-1)
        basis = mx.round(matrix.T[largest].swapaxes(-1, -2) * UNIT).astype(mx.int8)
        return reordered(found._replace(basis=basis), mx.take_along_axis(variances, largest, axis=-1), digits)

    @staticmethod
    def matrix(dim: int) -> mx.array:
        """Return the matrix `[D, D]`."""
        return mx.eye(dim)


class Rotated(Fixed):
    """Channels of the fixed rotation by signs and a Hadamard matrix."""

    matrix = staticmethod(rotation)


class MeanSpectrum(KLTCache):
    """Digits by the mean eigenvalues of other texts, not by this text's."""

    def _learn(self, x: mx.array, slot: Any, start: int, digits: Any, dtype: mx.Dtype) -> DigitSlot:  # type: ignore[override]
        found = learning.learn(x, slot, start, digits, dtype)
        table = self._tables().layers[self.layer]
        logs = table.keys if slot is self.slots[0] else table.values
        spectrum = mx.array(np.exp2(logs - logs.max()).astype(np.float32))
        return reordered(found, mx.broadcast_to(spectrum, (x.shape[0], *spectrum.shape)), digits)


class OneScale(KLTCache):
    """A scale for each channel and bucket of all tokens packed at once, none for each 128 rows."""

    @staticmethod
    def _append(slot: DigitSlot, x: mx.array, indices: list[mx.array]) -> DigitSlot:
        tiled = coding.append(slot, x, indices)
        if any(slot.rows):
            return tiled
        whole = [mx.broadcast_to(part.max(axis=2, keepdims=True), part.shape) for part in tiled.scales]
        given = dict(zip(("scales_a", "scales_b", "scales_c"), whole))
        return coding.append(slot._replace(**given), x, indices)  # rows are coded with scales that are there


def reordered(slot: DigitSlot, variances: mx.array, digits: tuple[int, int, int]) -> DigitSlot:
    """Give digits to channels by other variances, `[B, H, D]`, largest first."""
    first = learning.places_of(channels(slot)[:, :, : digits[0]])[..., :1]
    unit = slot.place[..., :1].astype(mx.float32) / first
    changed = slot._replace(order=learning._order(variances, max(digits)))
    which = channels(changed)
    places = mx.concatenate([learning.places_of(which[:, :, :count]) for count in digits], axis=-1)
    return changed._replace(place=(places * unit).astype(slot.place.dtype))


@lru_cache(8)
def _alike(known: Tables) -> Tables:
    """Return tables whose buckets weigh as much as their tokens do on average."""
    shares = np.array(SHARES) / sum(SHARES)

    def mean(weights: np.ndarray) -> np.ndarray:
        return np.repeat(np.log2(np.exp2(weights) @ shares)[:, None], len(SHARES), axis=1)

    return Tables(
        {layer: each._replace(key_weights=mean(each.key_weights), value_weights=mean(each.value_weights))
         for layer, each in known.layers.items()}
    )  # fmt: skip


WITHOUT: dict[str, type[KLTCache]] = {
    "calibration": Uncalibrated,
    "buckets": OneBucket,
    "positions to come": AsTheyStand,
    "directions (Hadamard)": Rotated,
    "directions (as they are)": Fixed,
    "own spectrum": MeanSpectrum,
    "scales of tiles": OneScale,
}
