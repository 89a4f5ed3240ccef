"""One layer's live cache: what every method has in common, and the registry that methods are found in."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import mlx.core as mx

from mlxkv.config import Config
from mlxkv.errors import InputError, UnsupportedError
from mlxkv.kernels.bits import UNPACKED, QuantizedArray, pack, unpack
from mlxkv.kernels.decode_attention import Bucket, decode_attention
from mlxkv.registry import METHOD_GROUP, Registry
from mlxkv.spec import CacheSpec

_QUERY_BLOCK = 64  # queries whose attention weights exist at a time, where a method asks for mass


class LayerCache(ABC):
    """One layer's cache, by one rule for every method: a query sees what the chunks before its own left in the cache
    (packed, evicted, ...) and its own chunk exactly, causally; then the method absorbs the chunk. Decoding is chunks
    of one token. Nothing here waits for a value, as mlx-lm builds its graph one token ahead; counts are Python's.

    A method's `Cache` names in state_fields the attributes that are its state: arrays, Packed, numbers, None, or lists, tuples
    and dicts of such. From them follow `nbytes`, `state` and saving. It implements `buckets` and `absorb`, `bias` where
    entries stand for several tokens, and `cut` where tokens can be taken back. With observation_window = n, `absorb` is told the attention mass of a chunk's last n
    queries. `slots` and `layer` say what is cached and where; with `latent` (MLA) "keys" are latents, "values" k_pe.

    config: of the method's `config_class`. spec: what the model caches. layer: the layer's index in the model.
    """

    config_class: ClassVar[type[Config]]
    state_fields: tuple[str, ...] = ()
    observation_window = 0

    def __init__(self, config: Config, spec: CacheSpec, layer: int) -> None:
        slots = spec.layers[layer]
        if slots is None:
            raise UnsupportedError(f"layer {layer} of this {spec.model_type} model keeps no keys and values")
        self.config, self.spec, self.layer, self.slots = config, spec, layer, slots
        self.latent = spec.mode == "single_stream"
        self.offset = 0
        self._chunk: tuple[mx.array, mx.array] | None = None

    @property
    def method_name(self) -> str:
        """The name that the method is registered under."""
        return live_methods.name_of(type(self))

    # What a method implements

    @abstractmethod
    def buckets(self) -> list[Bucket]:
        """What is stored, in storage order: keys and values `[B, Hkv, Tb, D]`, those kept as they are from `raw`."""

    @abstractmethod
    def absorb(self, keys: mx.array, values: mx.array, mass: mx.array | None) -> None:
        """Take a chunk `[B, Hkv, L, D]`, exact. mass `[B, Hkv, kept + L]` float32: the attention probability of each
        stored and new token, summed over the query heads of its kv head and the last `observation_window` queries."""

    def bias(self) -> mx.array | None:
        """What is added to the scores of what is stored, `[B, 1 or Hkv, kept]` float32, in the order of `buckets`: the
        logarithm of how many tokens an entry stands for, -inf for none."""
        return None

    def _trim(self, count: int) -> None:
        """Forget the last count >= 1 tokens; called only while no token has been evicted."""
        raise UnsupportedError(f"{self.method_name} cannot take tokens back")

    # What mlx-lm calls

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Remember a chunk `[B, Hkv, L, D]` for `attend`, and give the model back what it computes with itself: for
        MLA k_pe `[B, 1, kept + L, D]`, and several queries' latents too; for others nothing but the chunk.

        Raises UnsupportedError when the chunk before has never been attended.
        """
        if self._chunk is not None:
            raise UnsupportedError(
                "a live cache got a chunk before the last one was attended: call mlxkv.attach(model) before running "
                "the model; after an interrupted call start again with a new cache"
            )
        self._chunk = keys, values
        self.offset += keys.shape[2]
        if self.latent:
            return keys if keys.shape[2] == 1 else self._concat_stored(0, keys), self._concat_stored(1, values)
        return keys, values

    def attend(
        self, queries: mx.array, keys: mx.array, values: mx.array, scale: float, mask: mx.array | str | None = None
    ) -> mx.array:
        """Attention of queries `[B, Hq, L, D]` over what is stored and the chunk, `[B, Hq, L, Dv]`; then absorbs it.

        keys and values: what `update_and_fetch` returned, or for MLA what the model made of it. mask: None, "causal",
        bool or, for MLA, scores to add, `[B, Hq, L, kept + L]`.
        """
        if self._chunk is None:
            raise UnsupportedError("a live cache attends once for each update_and_fetch")
        chunk, self._chunk = self._chunk, None
        stored = self.buckets()
        mask = _mask_with_bias(mask, self.bias(), queries)
        if queries.shape[2] == 1 and (
            self.observation_window or not all(k.is_unquantized and v.is_unquantized for k, v in stored)
        ):
            tokens = [*stored, (unquantized(chunk[0]), unquantized(chunk[1]))]
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
        self.absorb(*chunk, attention_mass(queries, keys, scale, mask, last, chunk[0].shape[1]) if last else None)
        # Generation evaluates outputs alone: state that no output needs yet would hold on to every step before.
        return mx.depends(output, self.state)

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> mx.array | str | None:
        """None for one token, else "causal" or bool `[N, kept + N]`: a stored token is always visible.

        Raises UnsupportedError for a window: sliding-window layers keep mlx-lm's own cache.
        """
        if window_size is not None:
            raise UnsupportedError("a live cache is not for sliding-window layers: keep mlx-lm's own there")
        if N == 1:
            return None
        return causal_mask(N, self.kept + N) if return_array else "causal"

    @property
    def kept(self) -> int:
        """Tokens stored, of the `offset` tokens seen."""
        return sum(keys.shape[-2] for keys, _ in self.buckets())

    def size(self) -> int:
        return self.kept

    def empty(self) -> bool:
        return self.offset == 0

    @property
    def state(self) -> list[mx.array]:
        """All arrays held, for `mx.eval`. `mlxkv.save_cache` saves caches, mlx-lm's save_prompt_cache cannot."""
        return list(_iter_arrays([getattr(self, name) for name in self.state_fields]))

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays held."""
        return sum(array.nbytes for array in self.state)

    def is_trimmable(self) -> bool:
        """Whether the last tokens can be taken back: where the method can, as long as it has evicted none."""
        return type(self)._trim is not LayerCache._trim and self.kept == self.offset

    def trim(self, n: int) -> int:
        """Take back the last n tokens, or all there are; returns how many. Raises UnsupportedError after eviction."""
        if not self.is_trimmable():
            raise UnsupportedError("this cache has given up tokens and cannot be trimmed: ask is_trimmable() first")
        count = min(n, self.offset)
        if count:
            self._trim(count)
            self.offset -= count
        return count

    def _concat_stored(self, slot: int, chunk: mx.array) -> mx.array:
        """Everything stored in slot 0 or 1, unpacked for as long as it takes, and the chunk."""
        return mx.concatenate([*(unpack(pair[slot], chunk.dtype) for pair in self.buckets()), chunk], axis=-2)


live_methods: Registry[type[LayerCache]] = Registry("live method", "mlxkv.live.methods", METHOD_GROUP)


def cache_class_of(config: Config) -> type[LayerCache]:
    """The cache class that takes these settings. Raises InputError when no registered method does."""
    for _, found in live_methods.items():
        if found.config_class is type(config):
            return found
    raise InputError(f"{config!r} are no settings of a live method: those are {', '.join(live_methods.names())}")


def unquantized(x: mx.array) -> QuantizedArray:
    """x `[..., T, D]` kept as it is, in the form of a bucket."""
    return pack(x, UNPACKED, 1, x.shape[-1])


def to_storage_dtype(x: mx.array) -> mx.array:
    """float32 as float16, other types as they are: what is stored has at most the 2 bytes an element of the yardstick."""
    return x.astype(mx.float16) if x.dtype == mx.float32 else x


def copy_without_parent(x: mx.array) -> mx.array:
    """A copy of x `[..., T, D]`, since a slice or view keeps alive all of the array that it is of."""
    return mx.concatenate([x[..., :0, :], x], axis=-2)


def causal_mask(queries: int, tokens: int) -> mx.array:
    """Bool `[queries, tokens]`: the last query sees all tokens, the one before it all but the last, and so on."""
    return mx.arange(tokens - queries, tokens)[:, None] >= mx.arange(tokens)[None]


def attention_mass(
    queries: mx.array, keys: mx.array, scale: float, mask: mx.array | str | None, last: int, kv_heads: int
) -> mx.array:
    """How much attention each token gets from the last queries: `[B, kv_heads, T]` float32, of queries `[B, Hq, L, D]`
    and keys `[B, H, T, D]`, summed over those queries and over the query heads of a kv head."""
    B, Hq, L, _ = queries.shape
    H, T = keys.shape[1:3]
    mass = mx.zeros((B, kv_heads, T))
    for start in range(L - last, L, _QUERY_BLOCK):
        rows = slice(start, min(start + _QUERY_BLOCK, L))
        block = (queries[:, :, rows].astype(mx.float32) * scale).reshape(B, H, Hq // H, -1, queries.shape[-1])
        scores = (block @ keys.astype(mx.float32)[:, :, None].swapaxes(-1, -2)).reshape(B, Hq, -1, T)
        part = causal_mask(L, T)[rows] if isinstance(mask, str) else mask if mask is None else mask[..., rows, :]
        if part is not None:
            scores = mx.where(part, scores, -mx.inf) if part.dtype == mx.bool_ else scores + part
        mass += mx.softmax(scores, axis=-1).reshape(B, kv_heads, -1, T).sum(axis=2)
    return mass


def _mask_with_bias(mask: mx.array | str | None, bias: mx.array | None, queries: mx.array) -> mx.array | str | None:
    """The mask of `attend` with a bias `[B, H, kept]` of what is stored: scores to add, `[B, Hq, L, kept + L]`."""
    if bias is None:
        return mask
    Hq, L = queries.shape[1:3]
    bias = mx.pad(mx.repeat(bias, Hq // bias.shape[1], axis=1), [(0, 0), (0, 0), (0, L)])[:, :, None]
    if mask is None:
        return bias.astype(queries.dtype)
    seen = causal_mask(L, bias.shape[-1]) if isinstance(mask, str) else mask
    return (mx.where(seen, bias, -mx.inf) if seen.dtype == mx.bool_ else seen + bias).astype(queries.dtype)


def _iter_arrays(tree: Any) -> Iterator[mx.array]:
    """All arrays in nested lists, tuples, dicts and Packed."""
    if isinstance(tree, mx.array):
        yield tree
    elif isinstance(tree, QuantizedArray):
        yield from (tree.words, tree.bias, tree.scale)
    elif isinstance(tree, Sequence) and not isinstance(tree, str):
        for item in tree:
            yield from _iter_arrays(item)
    elif isinstance(tree, dict):
        yield from _iter_arrays(list(tree.values()))
