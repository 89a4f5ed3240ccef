"""Ways to hold a context that experiments compare: live presets, points of curves beside them, and mlx's quantization."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import mlx.core as mx
import numpy as np

from mlxkv import lm
from mlxkv.config import Config, choice
from mlxkv.errors import UnsupportedError
from mlxkv.evaluate.tasks import fidelity
from mlxkv.evaluate.variants import CachedContext, Variant, baseline, cache_sizes, iter_logits, iter_variants
from mlxkv.kernels.decode_attention import Bucket
from mlxkv.live import live_config, live_methods
from mlxkv.live.base import LayerCache, cache_class_of
from mlxkv.live.packing import PackingCache, quantize_per_token
from mlxkv.live.seam import make_cache_of
from mlxkv.models import cache_spec
from mlxkv.presets import method_preset, preset_names

CONTEXT, PREDICT = 1024, 64  # 64 are one round of a tail that is packed 64 tokens at a time
CHUNK = 16  # tokens: far faster than single ones, and nearly the same, as every method keeps the newest as they are
KEEPS_ALL = f"-{CONTEXT}"  # of presets with nothing to evict in this context
GROUP = 64  # elements that mlx quantizes together


@dataclass(frozen=True, kw_only=True)
class UniformConfig(Config):
    """Settings of UniformCache: bits of every value, 16 for float16."""

    bits: int = choice(16, (2, 3, 4, 8, 16))


class UniformCache(PackingCache):
    """int8 with another number of bits: the curve that others must beat."""

    config_class = UniformConfig
    config: UniformConfig

    def pack(self, keys: mx.array, values: mx.array) -> Bucket:
        """Quantize keys and values token by token."""
        return quantize_per_token(keys, self.config.bits), quantize_per_token(values, self.config.bits)


@cache
def presets() -> dict[str, Config]:
    """Return settings of every live preset by name, but of those that would keep the context whole; `full` first."""
    smaller = [name for name in preset_names("methods") if not name.endswith(KEEPS_ALL)]
    live = [name for name in smaller if method_preset(name).method in live_methods.names()]
    return {name: live_config(name) for name in sorted(live, key=lambda name: (name != "full", name))}


@cache
def references() -> dict[str, Config]:
    """Return settings that the curves of uniform quantization and KIVI have besides presets."""
    return {
        **{f"uniform-{bits}": UniformConfig(bits=bits) for bits in (2, 3, 4, 16)},
        **{f"kivi-{bits}": live_config("kivi", bits=bits) for bits in (3, 8)},
    }


def method_of(name: str) -> str:
    """Return the line of a picture that a variant is a point of."""
    if name == "int8" or name.startswith("uniform"):
        return "uniform"
    if name.startswith("kvtc"):
        return name.rpartition("-")[0]
    return live_methods.name_of(cache_class_of({**presets(), **references()}[name]))


def cached_at_once(name: str, config: Config) -> Variant:
    """Return a live cache that reads its context in one chunk, whatever the length.

    Parameters
    ----------
    name
        The variant's.
    config
        Settings of a live method, or a UniformConfig.
    """
    kind = UniformCache if isinstance(config, UniformConfig) else cache_class_of(config)
    return Variant(name, dataclasses.asdict(config), partial(_read_at_once, kind, config))


def _read_at_once(
    kind: type[LayerCache], config: Config, model: Any, tokens: Sequence[int], exact: CachedContext | None = None
) -> CachedContext:
    held: list[Any] = make_cache_of(model, kind, config)
    mx.eval(model(mx.array([list(tokens)]), cache=held)[:, -1], [entry.state for entry in held])
    return CachedContext(held, cache_sizes(model, held))


def supported(model: Any, variants: Sequence[Variant]) -> list[Variant]:
    """Return the live variants that this model can have; say which it cannot and why."""
    left = []
    for variant in variants:
        try:
            variant.build(model, [0])
        except UnsupportedError as error:
            print(f"left out: {variant.name}: {error}")
        else:
            left.append(variant)
    return left


def measure_while_growing(
    model: Any, variants: Sequence[Variant], tokens: Sequence[int], context_tokens: int
) -> list[dict[str, Any]]:
    """Score variants as `mlxkv eval fidelity` does, and measure their bytes while the text goes on.

    Parameters
    ----------
    model
        A model that mlx-lm loaded.
    variants
        The first is what the others are compared with.
    tokens
        The text.
    context_tokens
        Tokens of it that are held first; the others are given CHUNK at a time.

    Returns
    -------
    list of dict
        For each variant its scores, and `cache_bytes` and `share_of_fp16`, means over what each chunk finds stored. A
        restored file counts its bytes, and tokens that came since 2 bytes an element.
    """
    following, records = tokens[context_tokens:], []
    reference: mx.array | None = None
    untouched = [baseline()] if any(variant.needs_baseline for variant in variants) else []
    for variant, held in iter_variants(model, [*untouched, *variants], tokens[:context_tokens]):
        if variant.name == baseline().name:
            continue
        stored: list[tuple[float, float]] = []
        parts: list[mx.array] = []
        restored = cache_sizes(model, held.cache)["fp16_bytes"]  # windows hold fewer tokens than after a prompt's chunk
        for start in range(0, len(following) - 1, CHUNK):
            now = cache_sizes(model, held.cache)
            since = now["fp16_bytes"] - restored
            size = held.sizes["cache_bytes"] + since if variant.needs_baseline else now["cache_bytes"]
            stored.append((size, size / now["fp16_bytes"]))
            parts += iter_logits(model, held.cache, following[start : start + CHUNK + 1], CHUNK)
        logits = mx.concatenate(parts)
        reference = logits if reference is None else reference
        cache_bytes, share = np.mean(stored, axis=0).tolist()
        sizes = {"cache_bytes": cache_bytes, "share_of_fp16": share}
        records.append({"variant": variant.name, **sizes, **fidelity.compare(reference, logits, following)})
    return records


def mlx_quantized(bits: int, sinks: int, recent: int) -> Variant:
    """Return mlx's own quantization of what is between sinks and recent tokens, by token in groups of GROUP, on rotated keys.

    Parameters
    ----------
    bits
        Of every value between.
    sinks, recent
        Tokens that stay in float16.
    """
    build = partial(_quantized_by_mlx, bits, sinks, recent)
    return Variant(f"mx.quantize {bits}", {"bits": bits, "group_size": GROUP}, build, needs_baseline=True)


def _quantized_by_mlx(
    bits: int, sinks: int, recent: int, model: Any, tokens: Sequence[int], exact: CachedContext | None = None
) -> CachedContext:
    whole = (exact or baseline().build(model, tokens)).cache
    dump = lm.extract_cache(
        whole, cache_spec(model), [list(tokens)], fingerprint=lm.fingerprint(model), dtype="float16"
    )
    middle, stored, arrays = slice(sinks, len(tokens) - recent), 0, {}
    for name in "kv":
        arrays[name] = dump.stream(name).copy()
        packed = mx.quantize(mx.array(arrays[name][..., middle, :]), group_size=GROUP, bits=bits)
        stored += sum(part.nbytes for part in packed)
        arrays[name][..., middle, :] = np.array(mx.dequantize(*packed, group_size=GROUP, bits=bits))
    ends = dump.fp16_bytes * (sinks + recent) // len(tokens)
    sizes = {"tokens": len(tokens), "fp16_bytes": dump.fp16_bytes, "cache_bytes": stored + ends}
    return CachedContext(
        lm.restore(model, dataclasses.replace(dump, k=arrays["k"], v=arrays["v"])),
        {**sizes, "ratio": dump.fp16_bytes / (stored + ends)},
        {"coded_bytes": stored, "ratio_middle": (dump.fp16_bytes - ends) / stored},
    )
