"""One small run of a live model, watched: what reaches its caches, its rotations and its attention."""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from types import ModuleType
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache

from mlxkv import stock

ATTENTION = "scaled_dot_product_attention"
CHUNKS = (5, 1)  # tokens of the two passes: one of a prompt, one of decoding
WATCHED = (KVCache, RotatingKVCache)
LOCK = threading.RLock()  # functions of modules are replaced meanwhile


@dataclass(frozen=True)
class Update:
    """A call of a cache's `update_and_fetch`.

    Parameters
    ----------
    offset
        Tokens that the cache had seen.
    taken
        Keys and values of the chunk.
    given
        What the cache returned.
    """

    offset: int
    taken: tuple[mx.array, mx.array]
    given: tuple[mx.array, mx.array]


@dataclass(frozen=True)
class Rotation:
    """A call of `mx.fast.rope`.

    Parameters
    ----------
    output
        What it returned.
    dims
        Number of rotated dims.
    settings
        Its keyword arguments.
    """

    output: mx.array
    dims: int
    settings: dict[str, Any]


@dataclass(frozen=True)
class Attention:
    """A call of mlx-lm's attention function.

    Parameters
    ----------
    keys, values
        What it attends to.
    cache
        The cache that it is told of.
    """

    keys: mx.array
    values: mx.array
    cache: Any


@dataclass
class Pass:
    """One pass through the model.

    Parameters
    ----------
    updates
        Calls of each entry's `update_and_fetch`, by the entry's index.
    rotations, attentions
        Calls of the other functions, in their order.
    """

    updates: dict[int, list[Update]] = field(default_factory=dict)
    rotations: list[Rotation] = field(default_factory=list)
    attentions: list[Attention] = field(default_factory=list)


@dataclass
class Probe:
    """A watched run.

    Parameters
    ----------
    caches
        The prompt cache, of which entries of `WATCHED` classes are watched.
    passes
        The two passes: a prompt of five tokens, then one token.
    """

    caches: list[Any]
    passes: list[Pass]

    @cached_property
    def entries(self) -> list[Any]:
        """The entries of the prompt cache, those within lists one by one."""
        return stock.entries(self.caches)


def run(model: Any, zero: mx.array | int = 0) -> Probe:
    """Run six tokens through a model with a cache of its own, and record what happens.

    Nothing is computed that nobody looks at, and the model is left as it was.

    Parameters
    ----------
    model
        A loaded mlx-lm model.
    zero
        Added to the tokens: inside a transformation, such as `mx.compile`, an argument makes everything that is computed from
        them part of it.

    Returns
    -------
    Probe
        The records. Whatever the model raises comes through.
    """
    caches = make_prompt_cache(model)
    watched: dict[int, Any] = {}
    passes = [Pass() for _ in CHUNKS]
    current: list[Pass] = passes[:1]
    for index, entry in enumerate(stock.entries(caches)):
        if type(entry) in WATCHED:
            watched[index] = _watched(entry, index, current)
    caches = stock.with_entries(caches, watched)
    with LOCK, _watched_functions(model, current):
        first = 1
        for count, current[0] in zip(CHUNKS, passes):
            model(mx.arange(first, first + count, dtype=mx.int32)[None] + zero, cache=caches)
            first += count
    return Probe(caches, passes)


def attention_modules(model: Any) -> list[ModuleType]:
    """Return the Python modules that define the model's parts and have imported mlx-lm's attention function by name.

    Parameters
    ----------
    model
        A loaded mlx-lm model.

    Returns
    -------
    list of ModuleType
        Sorted by name.
    """
    names = {kind.__module__ for part in model.modules() for kind in type(part).__mro__}
    return [sys.modules[name] for name in sorted(names) if hasattr(sys.modules[name], ATTENTION)]


def _watched(entry: Any, index: int, current: list[Pass]) -> Any:
    """Return an equal entry whose `update_and_fetch` is recorded in the current pass; models may ask for its class."""
    kind = type(entry)

    def update_and_fetch(self: Any, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        offset = self.offset
        given = kind.update_and_fetch(self, keys, values)
        current[0].updates.setdefault(index, []).append(Update(offset, (keys, values), given))
        return given

    return type(kind.__name__, (kind,), {"update_and_fetch": update_and_fetch}).from_state(entry.state)  # type: ignore[attr-defined]


@contextmanager
def _watched_functions(model: Any, current: list[Pass]) -> Iterator[None]:
    """Record this thread's calls of `mx.fast.rope` and of the model's attention function."""
    thread = threading.get_ident()

    def rotation(output: mx.array, array: mx.array, dims: int, **settings: Any) -> None:
        current[0].rotations.append(Rotation(output, dims, settings))

    def attention(
        output: mx.array,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        cache: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        current[0].attentions.append(Attention(keys, values, cache))

    def recording(original: Callable[..., Any], record: Callable[..., None]) -> Callable[..., Any]:
        @functools.wraps(original)
        def call(*args: Any, **kwargs: Any) -> Any:
            output = original(*args, **kwargs)
            if threading.get_ident() == thread:
                record(output, *args, **kwargs)
            return output

        return call

    modules = attention_modules(model)
    before = [getattr(module, ATTENTION) for module in modules]
    rope = mx.fast.rope
    try:
        mx.fast.rope = recording(rope, rotation)
        for module, original in zip(modules, before):
            setattr(module, ATTENTION, recording(original, attention))
        yield
    finally:
        mx.fast.rope = rope
        for module, original in zip(modules, before):
            setattr(module, ATTENTION, original)
