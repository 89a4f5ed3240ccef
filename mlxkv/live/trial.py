"""A trial of a model: whether texts in a batch give what each gives alone, which not every model of mlx-lm does."""

from __future__ import annotations

import weakref
from collections.abc import Collection
from typing import Any

import mlx.core as mx

from mlxkv.errors import UnsupportedError

# Two texts in three calls: the second is shorter in the first call, and the first in the second.
_TEXTS: tuple[tuple[list[int], ...], ...] = (([1, 2, 3, 4, 5], [6], [7]), ([8, 9], [10, 11, 12], [13]))
_TOLERANCE = 0.15  # of the logits' deviation: many times what bfloat16 costs, a fraction of what a wrong mask does

_reasons: dict[int, tuple[weakref.ref[Any], str | None]] = {}


def check_batches(model: Any, layers: Collection[int]) -> None:
    """Check that a model takes batches with live caches; what was found is remembered.

    Parameters
    ----------
    model
        A loaded mlx-lm model.
    layers
        The layers that have live caches.

    Raises
    ------
    UnsupportedError
        When it does not.
    """
    key = id(model)
    known = _reasons.get(key)
    if known is None or known[0]() is not model:
        model_reference = weakref.ref(model)
        _reasons[key] = model_reference, None  # the trial makes a batch as well
        _reasons[key] = known = model_reference, _reason(model, layers)
    if (reason := known[1]) is not None:
        raise UnsupportedError(
            f"this {type(model).__module__.rpartition('.')[2]} model does not take batches ({reason})",
            "run its requests one after another",
        )


def _reason(model: Any, layers: Collection[int]) -> str | None:
    """Return why a model does not take batches; None where it does."""
    try:
        difference = _difference(model, layers)
    except Exception as error:  # noqa: BLE001  # whatever it raises here it would raise in the middle of answers
        return f"{type(error).__name__}: {str(error)[:200]}"
    return None if difference <= _TOLERANCE else "its logits are not those of the same texts alone"


def _difference(model: Any, layers: Collection[int]) -> float:
    """Return how far the logits of two texts in a batch are from those of each alone, of their own deviation."""
    from mlx_lm.generate import PromptProcessingBatch  # with transformers, which planning does without

    from mlxkv.live.base import cache_class_of  # which need this file
    from mlxkv.live.seam import assemble_cache, live_config

    settings = live_config("int8")  # it works in any layer

    def new() -> list[Any]:
        return assemble_cache(model, dict.fromkeys(layers, (cache_class_of(settings), settings)))

    alone = []
    for text in _TEXTS:
        cache = new()
        for chunk in text:
            logits = model(mx.array([chunk]), cache=cache)
        alone.append(logits[:, -1])
    prompts = PromptProcessingBatch(model, [0, 1], [new(), new()])  # type: ignore[no-untyped-call]
    *calls, last = zip(*_TEXTS)
    for call in calls:
        prompts.prompt([*call])  # type: ignore[no-untyped-call]
    together = model(mx.array(last), cache=prompts.prompt_cache)[:, -1].astype(mx.float32)
    expected = mx.concatenate(alone).astype(mx.float32)
    spread = (expected - expected.mean(axis=-1, keepdims=True)).square().mean(axis=-1).sqrt()
    return float(((together - expected).square().mean(axis=-1).sqrt() / spread).max().item())
