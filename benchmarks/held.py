"""A text that a model reads once, exactly, and many live caches then take in without the model: what it asked is replayed.

Unlike `benchmarks.recorded` this also holds for models with sliding windows, whose other layers keep mlx-lm's own cache.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

from benchmarks.recorded import Call, Recorder, ask
from benchmarks.variants import sizes_of_live
from mlxkv import stock
from mlxkv.config import Config
from mlxkv.evaluate.variants import CachedContext, Variant
from mlxkv.live.base import LayerCache
from mlxkv.live.seam import assemble_cache, attach
from mlxkv.models import cache_spec

READ = 1024  # tokens that the model reads at a time


@dataclass(frozen=True)
class Held:
    """What a model asked its cache while it read a context, as if in one chunk.

    Parameters
    ----------
    calls
        The call of each layer that attends to all tokens, by index.
    others
        Entries of the other layers as they are after the context; not to be changed.
    """

    calls: Mapping[int, Call]
    others: Mapping[int, Any]


def read(model: Any, tokens: Sequence[int], lengths: Sequence[int]) -> Iterator[tuple[int, Held]]:
    """Let a model read a text once.

    Parameters
    ----------
    model
        A model that mlx-lm loaded.
    tokens
        The text, as long as the longest of `lengths`.
    lengths
        Contexts to hold, each a number of its first tokens: multiples of READ, or less than READ.

    Yields
    ------
    length : int
        One of `lengths`, ascending.
    held : Held
        What was asked up to there.
    """
    attach(model)
    layers = cache_spec(model).attention_layers
    cache = stock.with_entries(make_prompt_cache(model), {layer: Recorder() for layer in layers})
    entries, done = stock.entries(cache), 0
    for length in sorted(lengths):
        while done < length:
            count = min(READ, length - done)
            mx.eval(model(mx.array([list(tokens[done : done + count])]), cache=cache)[:, -1])
            mx.eval([entries[layer].calls[-1][:3] for layer in layers])
            done += count
        calls = {layer: _joined(entries[layer].calls) for layer in layers}
        others = {i: copy.deepcopy(entry) for i, entry in enumerate(entries) if i not in layers}
        yield length, Held(calls, others)


def _joined(calls: Sequence[Call]) -> Call:
    queries, keys, values = (mx.concatenate(arrays, axis=2) for arrays in zip(*(call[:3] for call in calls)))
    return Call(queries, keys, values, calls[0].scale)


def replayed(name: str, kind: type[LayerCache], config: Config, held: Held) -> Variant:
    """Return a live cache that takes a context in at once, without the model.

    Parameters
    ----------
    name
        The variant's.
    kind
        The method's class, on every layer that attends to all tokens; the others have mlx-lm's own cache.
    config
        Settings.
    held
        What the model asked.
    """
    return Variant(name, asdict(config), partial(_replay, kind, config, held))


def _replay(
    kind: type[LayerCache], config: Config, held: Held, model: Any, tokens: Sequence[int], exact: Any = None
) -> CachedContext:
    cache: list[Any] = assemble_cache(model, dict.fromkeys(held.calls, (kind, config)))
    entries = stock.entries(cache)
    for layer, entry in enumerate(entries):  # in their order, as entries check that the others are as far
        if layer in held.calls:
            ask(entry, held.calls[layer])
            mx.eval(entry.state)  # not what it answered, which all variants answer alike
        else:
            vars(entry).update(vars(copy.deepcopy(held.others[layer])))  # the object stays: other entries know it
    return CachedContext(cache, sizes_of_live(model, cache))
