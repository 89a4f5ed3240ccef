"""Base class of every live method, one object per layer, and the registry of live methods."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import mlx.core as mx

from mlxkv.config import Config
from mlxkv.errors import InputError, UnsupportedError
from mlxkv.kernels.bits import unpack
from mlxkv.kernels.decode_attention import Bucket, decode_attention
from mlxkv.live.arrays import (
    KeysValues,
    append_chunk,
    attention_mass,
    causal_mask,
    copy_without_parent,
    iter_arrays,
    mask_with_bias,
    to_storage_dtype,
    unquantized,
)
from mlxkv.live.group import check_consistent
from mlxkv.registry import METHOD_GROUP, Registry
from mlxkv.spec import CacheSpec

__all__ = [
    "KeysValues",
    "LayerCache",
    "append_chunk",
    "attention_mass",
    "cache_class_of",
    "causal_mask",
    "check_consistent",
    "copy_without_parent",
    "live_methods",
    "to_storage_dtype",
    "unquantized",
]


class LayerCache(ABC):
    """Base class of one layer's cache.

    The model processes a text in chunks: some chunks of the prompt, then one token at a time. All methods follow the
    same rule. The queries of a chunk attend to earlier tokens as the cache stores them (quantized, merged, some
    evicted), and to their own chunk exactly, with a causal mask. Only then does the method store the chunk, in
    `absorb`.

    Stored tokens are exposed as buckets. A bucket is a pair of keys and values of the same tokens, all stored alike:
    one precision and one tiling for the keys, and one for the values.

    No call synchronises with the device, since mlx-lm builds the graph of the next token while the last one is still
    being computed. So token counts are Python integers and never depend on the values of arrays.

    A method implements `buckets` and `absorb`; also `score_bias` if its entries stand for several tokens, and `_trim`
    if the last tokens can be removed. It sets the class attributes below and registers itself with `live_methods`.

    Parameters
    ----------
    config
        Settings, of the method's `config_class`.
    spec
        Description of the model's cache.
    layer
        The layer's index in the model.

    Attributes
    ----------
    config_class
        The class of the method's settings.
    state_fields
        Names of the attributes that hold the method's state: arrays, QuantizedArray, numbers, None, or lists, tuples
        and dicts of these. `nbytes`, `state` and saving are derived from them.
    state_types
        Classes of the state fields that are NamedTuples of arrays, by name; loading a cache restores them.
    observation_window
        Number of queries, counted from the end of each chunk, whose attention mass is passed to `absorb`; 0 for
        methods that do not use it.
    slots
        Heads, dims and rotary embedding of the keys, and of the values.
    latent
        Whether the model uses multi-head latent attention (MLA): "keys" are then latents, and "values" are k_pe, the
        rotated part of the keys.
    offset
        Tokens seen so far.

    Raises
    ------
    UnsupportedError
        When the layer keeps no keys and values, or when the method does not support this model.
    """

    config_class: ClassVar[type[Config]]
    state_fields: ClassVar[tuple[str, ...]] = ()
    state_types: ClassVar[Mapping[str, Callable[..., tuple[Any, ...]]]] = {}
    observation_window = 0

    def __init__(self, config: Config, spec: CacheSpec, layer: int) -> None:
        slots = spec.layers[layer]
        if slots is None:
            raise UnsupportedError(f"layer {layer} of this {spec.model_type} model keeps no keys and values")
        self.config, self.spec, self.layer, self.slots = config, spec, layer, slots
        self.latent = spec.mode == "single_stream"
        self.offset = 0
        self._pending_chunk: KeysValues | None = None

    @property
    def method_name(self) -> str:
        """The name under which the method is registered."""
        return live_methods.name_of(type(self))

    # What a method implements

    @abstractmethod
    def buckets(self) -> list[Bucket]:
        """Return all stored tokens.

        Returns
        -------
        list of Bucket
            Keys `[B, Hkv, Tb, D]` and values `[B, Hkv, Tb, Dv]`. The order of the tokens is free, but must not change
            between two calls of `absorb`. `unquantized` wraps arrays that are not quantized.
        """

    @abstractmethod
    def absorb(self, keys: mx.array, values: mx.array, mass: mx.array | None) -> None:
        """Store a chunk after its attention was computed.

        Parameters
        ----------
        keys, values
            The chunk `[B, Hkv, L, D]` and `[B, Hkv, L, Dv]`, exact. `offset` already includes it.
        mass
            `[B, Hkv, kept + L]` float32: the attention probability of each stored and each new token, in the order of
            `buckets`, summed over the query heads that share a kv head and over the last `observation_window` queries.
            None where the window is 0.
        """

    def score_bias(self) -> mx.array | None:
        """Return the bias of the attention scores of stored entries, where an entry stands for several tokens.

        Returns
        -------
        mx.array or None
            `[B, 1 or Hkv, kept]` float32 in the order of `buckets`: the logarithm of the number of tokens that an entry
            stands for, -inf for 0. None where every entry is one token.
        """
        return None

    def _trim(self, count: int) -> None:
        """Remove the last count >= 1 tokens; called only while no token has been evicted."""
        raise UnsupportedError(f"{self.method_name} cannot take tokens back")

    # What mlx-lm calls

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Hold a chunk until `attend`, and return the arrays that the model passes on to attention.

        Parameters
        ----------
        keys, values
            The chunk `[B, Hkv, L, D]` and `[B, Hkv, L, Dv]`.

        Returns
        -------
        tuple of mx.array
            For MLA k_pe `[B, 1, kept + L, Dv]` and, where there are several queries, latents `[B, 1, kept + L, D]`;
            for other models only the chunk.

        Raises
        ------
        UnsupportedError
            When the attention of the previous chunk has not been computed.
        """
        if self._pending_chunk is not None:
            raise UnsupportedError(
                "a live cache got a chunk before the last one was attended: call mlxkv.attach(model) before running "
                "the model; after an interrupted call start again with a new cache"
            )
        self._pending_chunk = KeysValues(keys, values)
        self.offset += keys.shape[2]
        if self.latent:
            return keys if keys.shape[2] == 1 else self._concat_stored(0, keys), self._concat_stored(1, values)
        return keys, values

    def attend(
        self, queries: mx.array, keys: mx.array, values: mx.array, scale: float, mask: mx.array | str | None = None
    ) -> mx.array:
        """Return the attention over the stored tokens and the chunk, then absorb the chunk.

        Parameters
        ----------
        queries
            `[B, Hq, L, D]`.
        keys, values
            The arrays that `update_and_fetch` returned, or for MLA those that the model derived from them.
        scale
            Factor of the scores.
        mask
            None, "causal", bool, or for MLA an additive mask, `[B, Hq, L, kept + L]`.

        Returns
        -------
        mx.array
            `[B, Hq, L, Dv]`.

        Raises
        ------
        UnsupportedError
            When `update_and_fetch` was not called before.
        """
        if self._pending_chunk is None:
            raise UnsupportedError("a live cache attends once for each update_and_fetch")
        chunk, self._pending_chunk = self._pending_chunk, None
        stored = self.buckets()
        mask = mask_with_bias(mask, self.score_bias(), queries)
        if queries.shape[2] == 1 and (
            self.observation_window or not all(k.is_unquantized and v.is_unquantized for k, v in stored)
        ):
            tokens = [*stored, chunk.as_bucket()]
            if self.latent:
                tokens = [(k, k) for k, _ in tokens]
            bias = mask[:, :, 0] if isinstance(mask, mx.array) else None
            output, mass = decode_attention(queries, tokens, scale, bias)
            self.absorb(*chunk, mass if self.observation_window else None)
            return mx.depends(output, self.state)
        if not self.latent:
            keys, values = self._concat_stored(0, keys), self._concat_stored(1, values)
        elif queries.shape[2] == 1:
            keys = values = self._concat_stored(0, keys)
        output = mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask)
        last = min(self.observation_window, queries.shape[2])
        kv_heads = chunk.keys.shape[1]
        self.absorb(*chunk, attention_mass(queries, keys, scale, mask, last, kv_heads) if last else None)
        # Generation evaluates only outputs: state that no output depends on yet would keep all earlier steps in memory.
        return mx.depends(output, self.state)

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> mx.array | str | None:
        """Return the mask of the next chunk: all stored tokens are visible, and the chunk is causal.

        Parameters
        ----------
        N
            Tokens in the chunk.
        return_array
            Whether to return an array in place of "causal".
        window_size
            The window of a sliding-window layer; not supported.

        Returns
        -------
        mx.array, str or None
            None for one token, else "causal" or bool `[N, kept + N]`.

        Raises
        ------
        UnsupportedError
            For a window: sliding-window layers keep mlx-lm's own cache.
        """
        if window_size is not None:
            raise UnsupportedError("a live cache is not for sliding-window layers: keep mlx-lm's own there")
        if N == 1:
            return None
        return causal_mask(N, self.kept + N) if return_array else "causal"

    @property
    def kept(self) -> int:
        """Number of entries stored; the number of tokens seen is `offset`."""
        return sum(keys.shape[-2] for keys, _ in self.buckets())

    def size(self) -> int:
        """Return `kept`, under the name that mlx-lm uses.

        Returns
        -------
        int
            Number of entries stored.
        """
        return self.kept

    def empty(self) -> bool:
        """Return whether no token has been seen.

        Returns
        -------
        bool
            True before the first chunk.
        """
        return self.offset == 0

    @property
    def state(self) -> list[mx.array]:
        """All arrays held, for `mx.eval`. `mlxkv.save_cache` saves caches, mlx-lm's save_prompt_cache cannot."""
        return list(iter_arrays([getattr(self, name) for name in self.state_fields]))

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays held."""
        return sum(array.nbytes for array in self.state)

    def is_trimmable(self) -> bool:
        """Return whether the last tokens can be removed.

        Returns
        -------
        bool
            True if the method supports it and has evicted no token yet.
        """
        return type(self)._trim is not LayerCache._trim and self.kept == self.offset

    def trim(self, n: int) -> int:
        """Remove the last tokens.

        Parameters
        ----------
        n
            Number of tokens; all where there are fewer.

        Returns
        -------
        int
            Number of tokens removed.

        Raises
        ------
        UnsupportedError
            When tokens have been evicted already.
        """
        if not self.is_trimmable():
            raise UnsupportedError("this cache has given up tokens and cannot be trimmed: ask is_trimmable() first")
        count = min(n, self.offset)
        if count:
            self._trim(count)
            self.offset -= count
        return count

    def _concat_stored(self, slot: int, chunk: mx.array) -> mx.array:
        """Return all stored keys (slot 0) or values (slot 1), unpacked temporarily, followed by the chunk."""
        return mx.concatenate([*(unpack(pair[slot], chunk.dtype) for pair in self.buckets()), chunk], axis=-2)


def _check_method(kind: type[LayerCache]) -> None:
    """Refuse a class that cannot be a live method, for example one that another package registers."""
    if not (isinstance(kind, type) and issubclass(kind, LayerCache)):
        raise InputError(f"{kind!r} cannot be a live method: it is no subclass of mlxkv.live.LayerCache")
    config = getattr(kind, "config_class", None)
    if not (isinstance(config, type) and issubclass(config, Config)):
        raise InputError(f"live method {kind.__name__} needs a config_class, a subclass of mlxkv.config.Config")


live_methods: Registry[type[LayerCache]] = Registry("live method", "mlxkv.live.methods", METHOD_GROUP, _check_method)


def cache_class_of(config: Config) -> type[LayerCache]:
    """Return the registered method that has settings of this class.

    Parameters
    ----------
    config
        Settings of a live method.

    Returns
    -------
    type of LayerCache
        The method's cache class.

    Raises
    ------
    InputError
        When no method has settings of this class, or when several do.
    """
    found = {name: kind for name, kind in live_methods.items() if kind.config_class is type(config)}
    if len(found) > 1:
        raise InputError(f"{config!r} could be of {' or '.join(found)}: name the method instead")
    for kind in found.values():
        return kind
    raise InputError(f"{config!r} are no settings of a live method: those are {', '.join(live_methods.names())}")
