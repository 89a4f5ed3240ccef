"""What a model asks its cache while it reads a text: recorded once, and asked again of other caches without the model."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from time import perf_counter
from typing import Any, NamedTuple

import mlx.core as mx
from mlx_lm.models.base import scaled_dot_product_attention
from mlx_lm.models.cache import KVCache

from mlxkv.live import attach


class Call(NamedTuple):
    """One layer's attention over a chunk.

    Parameters
    ----------
    queries, keys, values
        `[1, heads, tokens, dim]`, as the model hands them over.
    scale
        Factor of the scores.
    """

    queries: mx.array
    keys: mx.array
    values: mx.array
    scale: float


Recording = list[list[Call]]  # of each chunk, the calls of all layers


class Recorder(KVCache):  # type: ignore[misc]
    """mlx-lm's own cache of a layer that notes down what it is asked."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[Call] = []

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> Any:
        self.chunk = keys, values
        return super().update_and_fetch(keys, values)  # type: ignore[no-untyped-call]

    def attend(self, queries: mx.array, keys: mx.array, values: mx.array, scale: float, mask: Any = None) -> mx.array:
        """Note a call down and answer as mlx-lm does."""
        self.calls.append(Call(queries, *self.chunk, scale))
        return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask)


def record(model: Any, tokens: Sequence[int], chunk: int) -> Recording:
    """Let a model read a text, and return what it asked.

    Parameters
    ----------
    model
        A model that mlx-lm loaded, all of whose layers keep all tokens.
    tokens
        The text.
    chunk
        Tokens that it reads at a time.
    """
    attach(model)
    recorders = [Recorder() for _ in model.layers]
    for start in range(0, len(tokens), chunk):
        model(mx.array([list(tokens[start : start + chunk])]), cache=recorders)
        mx.eval([recorder.calls[-1][:3] for recorder in recorders])
    return [list(calls) for calls in zip(*(recorder.calls for recorder in recorders))]


def replay(cache: Sequence[Any], recording: Recording, answered: bool = True) -> float:
    """Ask a new cache the same, each layer of each chunk before the next, and return how many seconds that took.

    Parameters
    ----------
    cache
        One entry a layer.
    recording
        What is asked.
    answered
        Whether answers are computed, too; else only what a cache computes to store a chunk, such as the attention that it goes by.
    """
    start = perf_counter()
    for calls in recording:
        for entry, call in zip(cache, calls, strict=True):
            output = ask(entry, call)
            mx.eval(output if answered else [], entry.state)
    return perf_counter() - start


def ask(entry: Any, call: Call) -> mx.array:
    """Return what a layer's cache, live or mlx-lm's, answers: attention over all it holds and the chunk, which it then holds too."""
    mask = entry.make_mask(call.queries.shape[2], return_array=False, window_size=None)
    keys, values = entry.update_and_fetch(call.keys, call.values)
    attention = getattr(entry, "attend", None) or partial(scaled_dot_product_attention, cache=entry)
    queries = mx.stop_gradient(call.queries)  # an array of its own: mlx-lm multiplies a quantized cache's in place
    return attention(queries, keys, values, scale=call.scale, mask=mask)


def shortened(model: Any, layers: int) -> Any:
    """Leave a model its first layers alone, for lengths at which all of them would take too long; return it."""
    model.model.layers = model.model.layers[:layers]
    return model
