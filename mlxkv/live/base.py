"""Base class of every live method, one object per layer, and the registry of live methods."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import mlx.core as mx

from mlxkv.config import Config
from mlxkv.errors import InputError, MismatchError, UnsupportedError
from mlxkv.kernels.decode_attention import Bucket
from mlxkv.live.arrays import (
    KeysValues,
    append_chunk,
    copy_without_parent,
    map_arrays,
    unquantized,
)
from mlxkv.live.attention import AttentionCall, attention_mass, causal_mask, concat_stored, stored_attention
from mlxkv.live.checks import check_layer
from mlxkv.live.forecast import Forecasting
from mlxkv.live.group import CacheGroup, check_consistent
from mlxkv.live.merging import Mergeable
from mlxkv.live.storage import SMALL_CHUNK, storage_dtype, to_storage_dtype
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


class LayerCache(Mergeable, Forecasting, ABC):
    """Base class of one layer's cache.

    The model processes a text in chunks: some chunks of the prompt, then one token at a time. All methods follow the
    same rule. The queries of a chunk attend to earlier tokens as the cache stores them (quantized, merged, some
    evicted), and to their own chunk exactly, with a causal mask. Only then does the method store the chunk, in
    `absorb`. A method may store a single token first, and attend to it as it is stored: the key and value of a float32 model's
    newest token are then rounded to 2 bytes. Methods that can take tokens back at any time attend to chunks of 2 to 16 tokens token by token instead: such
    a chunk may be a draft, of which the text must not show (with multi-head latent attention it is only stored so).

    Stored tokens are exposed as buckets. A bucket is a pair of keys and values of the same tokens, all stored alike:
    one precision and one tiling for the keys, and one for the values.

    Decoding never synchronises with the device, since mlx-lm builds the graph of the next token while the last one is
    still being computed. So token counts are Python integers and never depend on the values of arrays.

    Some models use what they cache otherwise than through mlx-lm's attention function (`mlxkv.spec.Layer.use`). In such a
    layer `update_and_fetch` returns all stored tokens, unpacked, then the chunk, and stores the chunk at once.

    A method implements `buckets` and `absorb`; also `score_bias` if its entries stand for several tokens, and `_trim`
    if the last tokens can be removed as if they had never come. It sets the class attributes below and registers itself
    with `live_methods`.

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
    takes_tokens_back
        Whether `_trim` works at any time, which a method that ever gives tokens up cannot say. mlx-lm's speculative
        decoding asks once, before the first token.
    observation_window
        Number of queries, counted from the end of each chunk, whose attention mass is passed to `absorb`; 0 for
        methods that do not use it.
    any_use
        Whether the method works in every layer, however the model uses it: it keeps every token in the order of the text, and
        needs neither the attention that tokens get nor a bias of scores.
    takes_windows
        Whether it works in layers with a sliding window, and drops what has left the window.
    slots
        Heads, dims and rotary embedding of the keys, and of the values.
    latent
        Whether the model uses multi-head latent attention (MLA): "keys" are then latents, and "values" are k_pe, the
        rotated part of the keys.
    window
        Number of newest tokens that the layer attends to; None for all.
    offset
        Tokens seen so far.

    Raises
    ------
    UnsupportedError
        When the layer keeps no keys and values, or when the method does not support this layer.
    """

    config_class: ClassVar[type[Config]]
    state_types: ClassVar[Mapping[str, Callable[..., tuple[Any, ...]]]] = {}
    any_use: ClassVar[bool] = False
    takes_windows: ClassVar[bool] = False
    observation_window = 0

    def __init__(self, config: Config, spec: CacheSpec, layer: int) -> None:
        described = spec.layers[layer]
        if described is None:
            raise UnsupportedError(f"layer {layer} of this {spec.model_type} model keeps no keys and values")
        check_layer(type(self), described, f"layer {layer} of this {spec.model_type} model", live_methods.items())
        self.config, self.spec, self.layer = config, spec, layer
        self.slots, self.latent = (described.keys, described.values), described.latent
        self.window, self._fetching = described.window, described.use == "fetch"
        self._arguments = config, spec, layer
        self._offset = 0
        self._group: CacheGroup | None = None
        self._pending_chunk: KeysValues | None = None
        self._ties: list[mx.array] = []
        self._is_first = True  # of the live layers, so that it checks for all of them
        self._texts: int | None = None  # that are stored, where it is known
        # The state before each token of the last small chunk, so that `trim` can go back to it.
        self._checkpoints: list[dict[str, Any]] = []

    @property
    def method_name(self) -> str:
        """The name under which the method is registered."""
        return live_methods.name_of(type(self))

    @property  # type: ignore[override]
    def offset(self) -> int:
        """Tokens seen so far."""
        return self._offset

    @offset.setter
    def offset(self, offset: int) -> None:
        self._offset, self._texts = offset, None  # the state was changed
        self._report_offset()

    def join(self, group: CacheGroup) -> None:
        """Become one of the entries of a prompt cache.

        Parameters
        ----------
        group
            What the entries share.
        """
        self._group = group
        group.drops = group.drops or self.window is not None
        self._report_offset()
        self._is_first = group.first == self.layer

    def _report_offset(self) -> None:
        """Tell the other layers how far this one is."""
        if self._group is not None:
            self._group.offsets[self.layer] = self._offset

    # What a method implements

    @classmethod
    def in_windows(cls, config: Config) -> tuple[type[LayerCache], Config] | None:
        """Return what layers with a sliding window have beside this method in others.

        Parameters
        ----------
        config
            Settings, of the method's `config_class`.

        Returns
        -------
        tuple or None
            A method and its settings, this one where it takes windows; None for mlx-lm's own cache.
        """
        return (cls, config) if cls.takes_windows else None

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
            The chunk `[B, Hkv, L, D]` and `[B, Hkv, L, Dv]`, in the type to store it in. `offset` already includes it.
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
            All stored tokens and the chunk, where the model uses them otherwise than in its attention function. Else for MLA
            k_pe `[B, 1, kept + L, Dv]` and, where there are several queries, latents `[B, 1, kept + L, D]`; for other
            models only the chunk.

        Raises
        ------
        UnsupportedError
            When the attention of the previous chunk has not been computed.
        MismatchError
            When layers of the prompt cache have seen different numbers of tokens, since a call was interrupted, or when
            the call has another number of texts than the cache.
        """
        chunk = self._begin(keys, values)
        if self._fetching:
            return self._fetch(chunk)
        if self.latent:
            stored = self.buckets()
            return keys if keys.shape[2] == 1 else concat_stored(stored, 0, keys), concat_stored(stored, 1, values)
        return keys, values

    def _begin(self, keys: mx.array, values: mx.array) -> KeysValues:
        """Check that a chunk can follow, and hold it."""
        if self._pending_chunk is not None:
            raise UnsupportedError(
                "a live cache got a chunk before the last one was attended: call mlxkv.attach(model) before running "
                "the model; after an interrupted call start again with a new cache"
            )
        if self._is_first:
            self._check_call(keys)
        self._pending_chunk = chunk = KeysValues(keys, values)
        self._offset += keys.shape[2]
        return chunk

    def _end(self) -> None:
        """Forget the chunk that is stored now. An interrupted call leaves it pending, and the next call is refused."""
        self._pending_chunk = None
        if self._group is not None:
            self._group.offsets[self.layer] = self._offset

    def _fetch(self, chunk: KeysValues) -> tuple[mx.array, mx.array]:
        """Store a chunk at once; return what was stored before, unpacked, then the chunk."""
        stored = self.buckets()
        keys, values = (concat_stored(stored, slot, part) for slot, part in enumerate(chunk))
        if self._ties:  # what the model wants computed with the next chunk at the latest
            keys, self._ties = mx.depends(keys, self._ties), []
        self._checkpoints = []
        if 1 < chunk.tokens <= SMALL_CHUNK and self.takes_tokens_back:
            self._store_one_by_one(chunk, lambda _, token: self._store(token, None))
        else:
            self._store(chunk, None)
        self._end()
        keys, values = mx.depends([keys, values], self._arrays())
        return keys, values

    def attend(
        self,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        scale: float,
        mask: mx.array | str | None = None,
        sinks: mx.array | None = None,
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
            None, "causal", or an array that broadcasts to `[B, Hq, L, kept + L]`: bool, or added to the scores. Its
            columns are the stored entries in the order of `buckets`, then the chunk.
        sinks
            `[Hq]`: a logit of each query head that takes part in its softmax and adds nothing to the output (attention
            sinks, gpt-oss); None for none.

        Returns
        -------
        mx.array
            `[B, Hq, L, Dv]`.

        Raises
        ------
        UnsupportedError
            When `update_and_fetch` was not called before.
        """
        if self._fetching:  # the chunk is stored already, and the model has all tokens
            return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask, sinks=sinks)
        if self._pending_chunk is None:
            raise UnsupportedError("a live cache attends once for each update_and_fetch")
        call, chunk = AttentionCall(queries, keys, values, scale, mask, sinks), self._pending_chunk
        self._checkpoints = []
        small = 1 < chunk.tokens <= SMALL_CHUNK
        if small and self.takes_tokens_back and not (self.latent and self.observation_window):
            output = self._attend_small_chunk(call, chunk)
        else:
            output = self._attend_chunk(call, chunk)
        self._end()
        # Generation evaluates only outputs: state that no output depends on yet would keep all earlier steps in memory.
        return mx.depends(output, self._arrays())

    def _check_call(self, keys: mx.array) -> None:
        """Refuse, before any layer changes, a call while they are not equally far, or with another number of texts."""
        if self._group is not None:
            self._group.check(self.layer, self._offset, keys.shape[2])
        if self._texts is None and (stored := self.buckets()):
            self._texts = stored[0][0].shape[0]
        texts = keys.shape[0]
        if self._texts not in (None, texts):
            raise MismatchError(
                f"this prompt cache holds {self._texts} texts, the call has {texts}: give each batch a new cache"
            )

    def _attend_chunk(self, call: AttentionCall, chunk: KeysValues) -> mx.array:
        """Return the attention over the stored tokens and a chunk, and store the chunk."""
        output, mass = self._attention(call, chunk)
        self._store(chunk, mass)
        return output

    def _attend_small_chunk(self, call: AttentionCall, chunk: KeysValues) -> mx.array:
        """Take a chunk in token by token, as decoding its tokens would do."""
        kept = self.kept
        if self.window is not None and isinstance(call.mask, mx.array):
            call = self._within_window(call)  # whose columns are those of the tokens stored now
        outputs = [self._attention(call, chunk)[0]] if self.latent else []

        def take(index: int, token: KeysValues) -> None:
            if self.latent:
                self._store(token, None)
            else:
                outputs.append(self._attend_chunk(call.of_token(index, token, kept + index + 1), token))

        self._store_one_by_one(chunk, take)
        return mx.concatenate(outputs, axis=2)

    def _attention(self, call: AttentionCall, chunk: KeysValues) -> tuple[mx.array, mx.array | None]:
        """Return the attention over the stored tokens and the chunk, and the mass for `absorb`."""
        if self.window is not None:
            call = self._within_window(call)
        return stored_attention(
            call, self.buckets(), chunk, bias=self.score_bias(), latent=self.latent, window=self.observation_window
        )

    def _within_window(self, call: AttentionCall) -> AttentionCall:
        """Return a call whose mask fits the stored tokens and hides those that have left the window."""
        raise NotImplementedError

    def _store(self, chunk: KeysValues, mass: mx.array | None) -> None:
        """Let the method absorb a chunk in the type to store it in; what is stored so far may have to change its type."""
        if chunk.keys.dtype == mx.float32:
            stored = self.buckets()
            current = stored[0][0].dtype if stored else None
            dtype = storage_dtype(*chunk, current)
            if current is not None and current != dtype:
                for name in self.state_fields:
                    field = map_arrays(getattr(self, name), lambda x: x.astype(dtype) if x.dtype == current else x)
                    setattr(self, name, field)
            chunk = KeysValues(*(to_storage_dtype(part, dtype) for part in chunk))
        self.absorb(*chunk, mass)

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> mx.array | str | None:
        """Return the mask of the next chunk: all stored tokens are visible, and the chunk is causal.

        Parameters
        ----------
        N
            Tokens in the chunk.
        return_array
            Whether to return an array in place of "causal".
        window_size
            Number of newest tokens that a query sees, its own included; None for all.

        Returns
        -------
        mx.array, str or None
            None for one token, else "causal" or bool `[N, kept + N]`; bool `[1, kept + 1]` also for one token with a window.

        Raises
        ------
        UnsupportedError
            For a window where tokens were given up.
        """
        if window_size is not None:
            if self.kept != self._offset:
                raise UnsupportedError(
                    f"{self.method_name} gave tokens up, so that a window of {window_size} has no place"
                )
            return causal_mask(N, self._offset + N, window_size)
        if N == 1:
            return None
        return causal_mask(N, self.kept + N) if return_array else "causal"


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
