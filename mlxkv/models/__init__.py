"""Descriptions of the cache of a live mlx-lm model: found by watching one small run, or by an adapter.

`discovery.py` describes any model. An adapter is a file of its own where more can be told than a run shows, such as a rotation's
gain: a model whose class lives in `mlx_lm.models.qwen3` is described by the adapter registered as "qwen3". Everything is
read from the live model, never from a table of known models.

Another package adds an adapter through the entry point group `mlxkv.models`; the entry's module registers a function
with `adapters`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mlxkv import _deprecated
from mlxkv.errors import InputError, UnsupportedError
from mlxkv.models.discovery import discover
from mlxkv.models.rope import read_rope as read_rope
from mlxkv.registry import Registry
from mlxkv.spec import CacheSpec, Layer, Rope, Slot


def _check_adapter(adapter: Callable[[Any], CacheSpec]) -> None:
    if not callable(adapter):
        raise InputError(f"{adapter!r} is no function of a model")


adapters: Registry[Callable[[Any], CacheSpec]] = Registry(
    "model adapter", "mlxkv.models", "mlxkv.models", _check_adapter
)


def available() -> list[str]:
    """Return the names of all adapters.

    Returns
    -------
    list[str]
        Names of mlx-lm modules, sorted.

    Examples
    --------
    >>> "qwen3" in available()
    True
    """
    return adapters.names()


def model_type(model: Any) -> str:
    """Return the name of the mlx-lm module that implements a model.

    Parameters
    ----------
    model
        A loaded mlx-lm model.

    Returns
    -------
    str
        The module's last part; Mistral, for one, is implemented by "llama".
    """
    return type(model).__module__.rpartition(".")[2]


def cache_spec(model: Any) -> CacheSpec:
    """Describe the cache of a live model.

    Parameters
    ----------
    model
        A loaded mlx-lm model.

    Returns
    -------
    CacheSpec
        The description, read from the model's own layers.

    Raises
    ------
    UnsupportedError
        When the model keeps no keys and values of mlx-lm's kinds, or cannot be run.
    """
    name = model_type(model)
    adapter = adapters.find(name)
    return discover(model, name) if adapter is None else adapter(model)


def kv_slots(heads: int, dim: int, rope: Rope | None, window: int | None = None) -> Layer:
    """Return the usual layer: rotated keys and plain values.

    Parameters
    ----------
    heads
        Number of key/value heads.
    dim
        Width of one head.
    rope
        Rotation of the keys; None where they are not rotated.
    window
        Number of newest tokens that it keeps; None where it keeps all.

    Returns
    -------
    Layer
        Keys and values, both `[B, heads, T, dim]`.
    """
    return Layer(Slot("keys", heads, dim, rope), Slot("values", heads, dim), window=window)


def head_dim(attention: Any) -> int:
    """Return the width of one key head, from the key projection itself: plain, quantized, or within an adapter (LoRA, DoRA).

    Parameters
    ----------
    attention
        An mlx-lm attention module with `k_proj` and `n_kv_heads`.

    Returns
    -------
    int
        The width.

    Raises
    ------
    UnsupportedError
        For a projection without a weight.
    """
    for module in attention.k_proj.modules():  # the projection first, then what it wraps
        if "weight" in module:
            return module.weight.shape[0] // attention.n_kv_heads
    raise UnsupportedError(f"{type(attention.k_proj).__name__} of the keys has no weight to read their width from")


__getattr__ = _deprecated.renamed(__name__, {"keys_and_values": "kv_slots"})
