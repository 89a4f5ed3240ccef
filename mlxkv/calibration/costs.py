"""Costs of errors in each layer, the tables of the live method `klt`: from finished stretches and the attention in them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import numpy as np

from mlxkv import stock
from mlxkv.dump import KVDump, stream_key
from mlxkv.kernels.decode_attention import Bucket
from mlxkv.live.base import LayerCache
from mlxkv.live.klt.coding import SHARES
from mlxkv.live.klt.tables import NAME, LayerTable, Tables
from mlxkv.live.methods.full import FullConfig
from mlxkv.live.seam import detach, make_cache_of
from mlxkv.models.probe import ATTENTION, attention_modules
from mlxkv.sensitivity import SKIPPED_SINKS, context_length
from mlxkv.spec import CacheSpec, Group

MOST_STRETCHES = 12  # more change little
FEWEST_STRETCHES = 2  # whatever the time
SECONDS = 0.4  # of a stretch, in units of what it took with its gradients
_QUERIES = 256  # at the end of a context, whose attention ranks its tokens, as `klt` does
_KEYS = 2.0  # times what gradients say an error of keys costs: softmax makes more of large ones
_LEAST = 2.0**-24  # of the largest eigenvalue, and of the mean weight: below, nothing is known
_Sums = list[np.ndarray]


class AttentionRecorder(LayerCache):
    """The attention that the tokens of one chunk get from its last queries; keys and values are not kept.

    Attributes
    ----------
    mass
        `[1, Hkv, T]` float32; None before the chunk.
    """

    config_class = FullConfig
    state_fields = ("mass",)
    observation_window = _QUERIES
    mass: mx.array | None = None

    def buckets(self) -> list[Bucket]:
        """Return nothing."""
        return []

    def absorb(self, keys: mx.array, values: mx.array, mass: mx.array | None) -> None:
        """Keep the attention."""
        self.mass = mass


def recorded_attention(model: Any, tokens: Sequence[int]) -> dict[int, np.ndarray]:
    """Run a text through a model, and return the attention that its tokens get at its end.

    Parameters
    ----------
    model
        A loaded mlx-lm model; it stays as it is.
    tokens
        Token ids, a few hundred: all are run at once.

    Returns
    -------
    dict
        By index of each layer that keeps all tokens, `[Hkv, T]` float32: the mean over those of the last 256 queries that can
        see the token.

    Raises
    ------
    UnsupportedError
        For a model that live caches do not support.
    """
    with _left_as_it_was(model):
        cache = make_cache_of(model, AttentionRecorder, FullConfig())
        model(mx.array([list(tokens)]), cache=cache)
        found = {entry.layer: entry.mass for entry in _recorders(cache)}
        mx.eval(list(found.values()))
    seen = np.minimum(np.arange(len(tokens), 0, -1), _QUERIES)
    return {layer: np.array(mass)[0] / seen for layer, mass in found.items()}


class Costs:
    """Sums over stretches of what errors cost.

    Parameters
    ----------
    spec
        Description of the model's cache.

    Attributes
    ----------
    stretches
        Number of stretches that are counted.
    """

    def __init__(self, spec: CacheSpec) -> None:
        self.spec, self.stretches = spec, 0
        self._groups = [(number, group) for number, group in enumerate(spec.groups) if group.window is None]
        # By layer, keys and values: logarithms of eigenvalues [H, D], sensitivity [H], energies and tokens of buckets [H, 3].
        self._sums: dict[tuple[int, int], _Sums] = {}

    def measure(self, model: Any, dump: KVDump) -> None:
        """Count a stretch.

        Parameters
        ----------
        model
            The model that the dump is of.
        dump
            A whole cache with its sensitivity.

        Raises
        ------
        UnsupportedError
            For a model that live caches do not support.
        """
        context = context_length(dump.length)
        attention = recorded_attention(model, dump.tokens[0, :context].tolist())
        for number, group in self._groups:
            for place, index in enumerate(group.indices):
                for slot, parts in enumerate(_parts_of(dump, number, group, place)):
                    new = _measured(*parts, attention[index])
                    sums = self._sums.setdefault((index, slot), [np.zeros_like(part) for part in new])
                    for total, part in zip(sums, new):
                        total += part
        self.stretches += 1

    def facts(self) -> Mapping[str, Any]:
        """Return what goes among the facts of artifacts.

        Returns
        -------
        Mapping
            The tables as JSON under the name that `klt` looks for; empty where nothing was measured.
        """
        if not self.stretches or not self._sums:
            return {}
        layers = {}
        for _, group in self._groups:
            factor = 1.0 if group.latent else _KEYS
            for index in group.indices:
                (keys, key_weights), (values, value_weights) = self._means((index, 0)), self._means((index, 1))
                layers[index] = LayerTable(keys, values, key_weights + np.log2(factor), value_weights)
        return {NAME: Tables(layers).to_json()}

    def _means(self, of: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        """Return the binary logarithms of eigenvalues times sensitivity `[H, D]`, and of the weights of buckets `[H, 3]`."""
        logs, sensitivity, energies, tokens = self._sums[of]
        least = np.finfo(np.float32).tiny
        spectra = logs / self.stretches + np.log2(np.maximum(sensitivity / self.stretches, least))[:, None]
        means = energies / np.maximum(tokens, 1)
        overall = energies.sum(axis=1, keepdims=True) / np.maximum(tokens.sum(axis=1, keepdims=True), 1)
        return spectra, np.log2(np.maximum(means / np.maximum(overall, least), _LEAST))


def _recorders(cache: Sequence[Any]) -> list[AttentionRecorder]:
    return [entry for entry in stock.entries(cache) if isinstance(entry, AttentionRecorder)]


def _parts_of(
    dump: KVDump, number: int, group: Group, place: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield rows `[H, T, D]`, Fisher information `[H, D, D]` and energies `[H, T]` of keys, then of values, of one layer."""
    first, second = group.members[place]
    for slot, name in enumerate(("k", "k" if group.latent else "v")):
        key = stream_key(number, name)
        columns = slice(None)
        if group.latent:  # latents and k_pe are side by side
            columns = slice(first.dim, first.dim + second.dim) if slot else slice(first.dim)
        fisher = dump.sensitivity[key][place][:, columns, columns]
        yield dump.stream(name, number)[place, 0][..., columns], fisher, dump.sensitivity[f"{key}.energy"][place]


def _measured(rows: np.ndarray, fisher: np.ndarray, energies: np.ndarray, attention: np.ndarray) -> _Sums:
    """Return what one stretch adds to the sums of keys, or of values, of one layer."""
    x = rows[:, SKIPPED_SINKS:].astype(np.float64)
    x -= x.mean(axis=1, keepdims=True)
    values = np.linalg.eigvalsh(x.swapaxes(1, 2) @ x / x.shape[1])[:, ::-1]
    least = np.maximum(values[:, :1] * _LEAST, np.finfo(np.float32).tiny)
    sensitivity = np.trace(fisher, axis1=1, axis2=2).astype(np.float64) / max(1, fisher.shape[1])
    counted = np.flatnonzero(energies.any(axis=0))
    counted = counted[counted < attention.shape[1]]
    order = np.argsort(-attention[:, counted], axis=1, kind="stable")
    ranked = np.take_along_axis(energies[:, counted].astype(np.float64), order, axis=1)
    stops = [len(counted) * stop // sum(SHARES) for stop in np.cumsum(SHARES)]
    parts = [ranked[:, start:stop] for start, stop in zip([0, *stops], stops)]
    sums = np.stack([part.sum(axis=1) for part in parts], axis=1)
    tokens = np.broadcast_to(np.array([part.shape[1] for part in parts], np.float64), sums.shape)
    return [np.log2(np.maximum(values, least)), sensitivity, sums, tokens]


@contextmanager
def _left_as_it_was(model: Any) -> Iterator[None]:
    """Detach live caches from a model afterwards, if they are not attached now."""
    modules = attention_modules(model)
    was = [hasattr(getattr(module, ATTENTION), "__wrapped__") for module in modules]
    try:
        yield
    finally:
        if not any(was):
            detach(model)
