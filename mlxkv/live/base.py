"""One layer's live cache: what every method has in common, and the registry that methods are found in."""

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
from mlxkv.registry import METHOD_GROUP, Registry
from mlxkv.spec import CacheSpec

__all__ = [
    "KeysValues",
    "LayerCache",
    "append_chunk",
    "attention_mass",
    "cache_class_of",
    "causal_mask",
    "copy_without_parent",
    "live_methods",
    "to_storage_dtype",
    "unquantized",
]


class LayerCache(ABC):
    """One layer's cache, by one rule for every method.

    A query sees what the chunks before its own left in the cache (quantized, evicted, ...), and its own chunk exactly
    and causally; then the method absorbs the chunk. Decoding is chunks of one token. Nothing here waits for a value,
    since mlx-lm builds its graph one token ahead; counts are Python's.

    A method implements `buckets` and `absorb`; `score_bias` where entries stand for several tokens, and `_trim` where
    tokens can be taken back. It sets the class attributes below and registers itself with `live_methods`.

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
        Names of the attributes that are the method's state: arrays, QuantizedArray, numbers, None, or lists, tuples
        and dicts of such. `nbytes`, `state` and saving follow from them.
    state_types
        For state fields that are NamedTuples of arrays their classes, so that a loaded cache has them again.
    observation_window
        Number of a chunk's last queries whose attention mass `absorb` gets; 0 for methods that do not use it.
    slots
        Heads, dims and rotation of the keys and of the values.
    latent
        Whether this is MLA, whose "keys" are latents and whose "values" are k_pe.
    offset
        Tokens seen so far.

    Raises
    ------
    UnsupportedError
        When the layer keeps no keys and values, or when the method cannot be had for this model.
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
        """Return what is stored.

        Returns
        -------
        list of Bucket
            Keys `[B, Hkv, Tb, D]` and values `[B, Hkv, Tb, Dv]`, in any order that stays the same; each bucket has one
            precision. `unquantized` wraps arrays that are stored as they are.
        """

    @abstractmethod
    def absorb(self, keys: mx.array, values: mx.array, mass: mx.array | None) -> None:
        """Store a chunk that has been attended.

        Parameters
        ----------
        keys, values
            The chunk `[B, Hkv, L, D]` and `[B, Hkv, L, Dv]`, exact. `offset` counts it already.
        mass
            `[B, Hkv, kept + L]` float32: the attention probability of each stored and each new token, in the order of
            `buckets`, summed over the query heads of its kv head and over the last `observation_window` queries. None
            where the window is 0.
        """

    def score_bias(self) -> mx.array | None:
        """Return what is added to the scores of what is stored, where entries stand for several tokens.

        Returns
        -------
        mx.array or None
            `[B, 1 or Hkv, kept]` float32 in the order of `buckets`: the logarithm of how many tokens an entry stands
            for, -inf for none. None where each stands for one.
        """
        return None

    def _trim(self, count: int) -> None:
        """Forget the last count >= 1 tokens; called only while no token has been evicted."""
        raise UnsupportedError(f"{self.method_name} cannot take tokens back")

    # What mlx-lm calls

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Remember a chunk for `attend`, and return what the model computes with by itself.

        Parameters
        ----------
        keys, values
            The chunk `[B, Hkv, L, D]` and `[B, Hkv, L, Dv]`.

        Returns
        -------
        tuple of mx.array
            For MLA k_pe `[B, 1, kept + L, Dv]` and, where there are several queries, latents `[B, 1, kept + L, D]`;
            for others just the chunk.

        Raises
        ------
        UnsupportedError
            When the chunk before has not been attended.
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
        """Return the attention over what is stored and the chunk, then absorb the chunk.

        Parameters
        ----------
        queries
            `[B, Hq, L, D]`.
        keys, values
            The arrays that `update_and_fetch` returned, or for MLA what the model made of them.
        scale
            Factor of the scores.
        mask
            None, "causal", bool, or for MLA scores to add, `[B, Hq, L, kept + L]`.

        Returns
        -------
        mx.array
            `[B, Hq, L, Dv]`.

        Raises
        ------
        UnsupportedError
            When there is no chunk to attend.
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
        # Generation evaluates outputs alone: state that no output needs yet would hold on to every step before.
        return mx.depends(output, self.state)

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> mx.array | str | None:
        """Return the mask of the next chunk: every stored token is visible, the chunk causally.

        Parameters
        ----------
        N
            Tokens in the chunk.
        return_array
            Whether "causal" will not do.
        window_size
            The window of a sliding-window layer, which is refused.

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
        """Entries stored, for the `offset` tokens seen."""
        return sum(keys.shape[-2] for keys, _ in self.buckets())

    def size(self) -> int:
        """Return `kept`, under mlx-lm's name.

        Returns
        -------
        int
            Entries stored.
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
        """Return whether the last tokens can be taken back.

        Returns
        -------
        bool
            True where the method can do so, as long as it has evicted no token.
        """
        return type(self)._trim is not LayerCache._trim and self.kept == self.offset

    def trim(self, n: int) -> int:
        """Take back the last tokens.

        Parameters
        ----------
        n
            Number of tokens; all where there are fewer.

        Returns
        -------
        int
            Number of tokens taken back.

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
        """Return all that is stored in slot 0 or 1, unpacked for as long as it is used, and then the chunk."""
        return mx.concatenate([*(unpack(pair[slot], chunk.dtype) for pair in self.buckets()), chunk], axis=-2)


def _check_method(kind: type[LayerCache]) -> None:
    """Refuse what cannot be a live method, for example one of another package."""
    if not (isinstance(kind, type) and issubclass(kind, LayerCache)):
        raise InputError(f"{kind!r} cannot be a live method: it is no subclass of mlxkv.live.LayerCache")
    config = getattr(kind, "config_class", None)
    if not (isinstance(config, type) and issubclass(config, Config)):
        raise InputError(f"live method {kind.__name__} needs a config_class, a subclass of mlxkv.config.Config")


live_methods: Registry[type[LayerCache]] = Registry("live method", "mlxkv.live.methods", METHOD_GROUP, _check_method)


def cache_class_of(config: Config) -> type[LayerCache]:
    """Return the registered method that has such settings.

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
