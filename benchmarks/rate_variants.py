"""What `rate_distortion` compares with: mlx's own quantization, and the Gaussian bound."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np

from mlxkv import lm
from mlxkv.codec.layout import Layout
from mlxkv.codec.methods import kvtc_rd
from mlxkv.codec.session import CacheCodec
from mlxkv.codec.stages.rows import to_rows
from mlxkv.evaluate.variants import CachedContext, Variant, baseline
from mlxkv.models import cache_spec

SINKS, WINDOW, GROUP = 4, 128, 64


def quantized(bits: int) -> Variant:
    """mlx's own quantization of what is between sinks and window, by token in groups of 64, on rotated keys."""

    def hold(model: Any, tokens: Sequence[int], exact: CachedContext | None = None) -> CachedContext:
        spec, cache = cache_spec(model), (exact or baseline().build(model, tokens)).cache
        dump = lm.extract_cache(cache, spec, [list(tokens)], fingerprint=lm.fingerprint(model), dtype="float16")
        middle, stored = slice(SINKS, len(tokens) - WINDOW), 0
        arrays = {}
        for name in "kv":
            arrays[name] = dump.stream(name).copy()
            packed = mx.quantize(mx.array(arrays[name][..., middle, :]), group_size=GROUP, bits=bits)
            stored += sum(part.nbytes for part in packed)
            arrays[name][..., middle, :] = np.array(mx.dequantize(*packed, group_size=GROUP, bits=bits))
        ends = dump.fp16_bytes * (SINKS + WINDOW) // len(tokens)
        sizes = {"tokens": len(tokens), "fp16_bytes": dump.fp16_bytes, "cache_bytes": stored + ends}
        return CachedContext(
            lm.restore(model, replace(dump, k=arrays["k"], v=arrays["v"])), {**sizes, "ratio": dump.fp16_bytes / (stored + ends)},
            {"coded_bytes": stored, "ratio_middle": (dump.fp16_bytes - ends) / stored},
        )  # fmt: skip

    return Variant(f"mx.quantize {bits}", {"bits": bits}, hold, needs_baseline=True)


def gaussian(model: Any, tokens: Sequence[int], codec: CacheCodec, quality: float) -> dict[str, Any]:
    """Bytes of the middle, and those that reverse water-filling would take for Gaussian coefficients of the text's own
    variances at the same squared error."""
    dump = lm.dump(model, tokens, dtype="float16")
    coder, layout = codec.coder, Layout(1, len(tokens), SINKS, WINDOW, 512)
    found: dict[str, list[np.ndarray]] = {"k": [], "v": []}
    errors: dict[str, list[np.ndarray]] = {"k": [], "v": []}
    for _, start, stop in layout.blocks():
        rows = {name: to_rows(dump.spec.stream(name), list(dump.stream(name)), start, stop) for name in "kv"}
        for name, coefficients in coder.coefficients(rows, quality).items():
            step = kvtc_rd.step_size(quality, name)
            found[name].append(np.array(coefficients))
            errors[name].append(
                np.array(coefficients - kvtc_rd._dequantize(kvtc_rd._quantize(coefficients, step), step))
            )
    bits = 0.0
    for name in "kv":
        c, e = np.concatenate(found[name]), np.concatenate(errors[name])
        bits += len(c) * water_filling(c.var(axis=0), float(np.square(e).sum(axis=1).mean()))
    return {"variant": "Gaussian R(D)", "at": quality, "kind": "theory", "coded_bytes": bits / 8}


def water_filling(variances: np.ndarray, distortion: float) -> float:
    """Bits of Gaussian components `[r]` at this sum of squared errors."""
    low, high = 0.0, float(variances.max())
    for _ in range(60):
        level = (low + high) / 2
        low, high = (level, high) if np.minimum(variances, level).sum() < distortion else (low, level)
    return float(np.log2(np.maximum(variances / max(high, 1e-30), 1)).sum() / 2)
