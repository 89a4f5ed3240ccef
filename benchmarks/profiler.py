"""Where a step of a model with live caches spends its time: parts that are evaluated before and after by themselves."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from time import perf_counter
from typing import Any
from unittest import mock

import mlx.core as mx

from mlxkv import live
from mlxkv.kernels.operations import arrays
from mlxkv.live.methods import h2o, int4, int8, kivi, mp_kvm, smartkv
from mlxkv.live.sketches import CountMin

PARTS = {
    "attention": (
        (live, "decode_attention"),
        (mx.fast, "scaled_dot_product_attention"),
        (live.LayerCache, "_concat_stored"),
    ),
    "weights again": ((live, "attention_mass"),),
    "importance": ((smartkv.SmartKVCache, "_weigh"), (mp_kvm.MPKVMCache, "_weighed"), (CountMin, "update")),
    "reallocation": (
        (smartkv.SmartKVCache, "_flush_tail"),
        (h2o.H2OCache, "_evict"),
        (mp_kvm.MPKVMCache, "_flush"),
        (sketching.SketchingCache, "_flush_tail"),
        (CountMin, "query"),
        *((module.Cache, "pack") for module in (int4, int8, kivi)),
    ),
    "storing": tuple(
        (owner, "absorb")
        for owner in (
            smartkv.SmartKVCache,
            h2o.H2OCache,
            mp_kvm.MPKVMCache,
            sketching.SketchingCache,
            packing.PackingCache,
            selection.SelectingCache,
        )
    ),
}
REST = "rest of the model"


class Profiler:
    """Seconds by part; a part inside of another counts for itself alone."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._inside = [0.0]

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, with what it is given evaluated before its clock starts, and what it makes before that stops."""

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            _evaluate(args, *kwargs.values())
            self._inside.append(0.0)
            start = perf_counter()
            result = function(*args, **kwargs)
            _evaluate(args[:1], result)
            seconds = perf_counter() - start
            self.seconds[part] += seconds - self._inside.pop()
            self._inside[-1] += seconds
            return result

        return call

    @contextmanager
    def watching(self) -> Iterator[None]:
        """PARTS are timed meanwhile."""
        with ExitStack() as stack:
            for part, functions in PARTS.items():
                for owner, name in functions:
                    stack.enter_context(mock.patch.object(owner, name, self.timed(part, getattr(owner, name))))
            yield


def _evaluate(*values: Any) -> None:
    """Arrays in arguments, and the state of caches among them."""
    for value in values:
        items = value if isinstance(value, tuple) else (value,)
        mx.eval([item.state if isinstance(item, live.LayerCache) else arrays(item) for item in items])


def in_parts(measured: str, step: Callable[[], object]) -> dict[str, Any]:
    """One step with its seconds, in all and in each of PARTS; the rest is the model's own."""
    profiler = Profiler()
    start = perf_counter()
    with profiler.watching():
        step()
    seconds = perf_counter() - start
    parts = {part: profiler.seconds[part] for part in PARTS}
    return {"measured": measured, "seconds": seconds, "parts": {**parts, REST: seconds - sum(parts.values())}}
