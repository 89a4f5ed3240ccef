"""How much memory? What a held context really takes, and what a decoded token takes on top, against theory."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any, cast

import mlx.core as mx
from mlx.utils import tree_flatten

from mlxkv.errors import InputError
from mlxkv.evaluate.variants import Variant
from mlxkv.models import cache_spec


def evaluate(
    model: Any, variants: Sequence[Variant], tokens: Sequence[int], lengths: Sequence[int]
) -> list[dict[str, Any]]:
    """A record for each variant and length, one held at a time.

    fp16_bytes: of all keys and values at 2 bytes an element. cache_bytes: of all arrays that the caches hold, other
    layers' states included. resident_bytes: by how much MLX's allocator holds more than before. decode_peak_bytes: most
    that one decoded token needs above that, the model's own activations included.
    Raises InputError where `tokens` has no token after the longest length.
    """
    if max(lengths) >= len(tokens) or min(lengths) < 1:
        raise InputError(f"lengths must be 1 to {len(tokens) - 1} for {len(tokens)} tokens, not {list(lengths)}")
    slots = [slot for layer in cache_spec(model).layers if layer for slot in layer]
    records = []
    for variant in variants:
        for length in lengths:
            before = _active()
            cache = variant.hold(model, tokens[:length])
            resident = _active() - before
            state = cast(dict[str, Any], tree_flatten([entry.state for entry in cache], destination={}))
            held = sum(part.nbytes for part in state.values() if isinstance(part, mx.array))
            mx.reset_peak_memory()
            mx.eval(model(mx.array([[tokens[length]]]), cache=cache), [entry.state for entry in cache])
            records.append(
                {
                    "variant": variant.name,
                    "tokens": length,
                    "fp16_bytes": 2 * length * sum(slot.heads * slot.dim for slot in slots),
                    "cache_bytes": held,
                    "resident_bytes": resident,
                    "decode_peak_bytes": mx.get_peak_memory() - before - resident,
                }
            )
            del cache
    return records


def _active() -> int:
    gc.collect()
    mx.clear_cache()
    return mx.get_active_memory()
