"""Ways to hold a context that experiments compare: live presets, points of curves beside them, and mlx's quantization."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, ClassVar

import mlx.core as mx
import numpy as np

from mlxkv import lm, stock
from mlxkv.config import Config, choice, integer
from mlxkv.errors import UnsupportedError
from mlxkv.evaluate.tasks import fidelity
from mlxkv.evaluate.variants import CachedContext, Variant, baseline, cache_sizes, iter_logits, iter_variants
from mlxkv.kernels._rotation import rotate, rotate_back
from mlxkv.kernels.decode_attention import Bucket
from mlxkv.live import live_config, live_methods
from mlxkv.live.arrays import KeysValues, append_chunk, concat_pairs
from mlxkv.live.base import LayerCache, cache_class_of
from mlxkv.live.packing import PackingCache, quantize_per_token
from mlxkv.live.seam import make_cache_of
from mlxkv.models import cache_spec
from mlxkv.presets import method_preset, preset_names
from mlxkv.spec import CacheSpec

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


@dataclass(frozen=True, kw_only=True)
class LloydConfig(Config):
    """Settings of LloydCache: bits of every value, and tokens that stay as they are, as klt leaves them."""

    bits: int = choice(4, (2, 3, 4))
    sinks: int = integer(4)
    recent: int = integer(32)
    block: int = integer(16, 1)


class LloydCache(LayerCache):
    """Rotated tokens, a norm and Lloyd-Max codes each: a baseline in the manner of TurboQuant.

    A token's key or value is divided by its length, which is kept in float16, and rotated, so that its elements are nearly
    Gaussian of variance 1 / D; each is coded by itself with the levels that are best for that. Nothing is learnt.

    Notes
    -----
    Paper: "TurboQuant: Online Vector Quantization with Near-optimal Distortion Rate", https://arxiv.org/abs/2504.19874, its
    variant for the least squared error. Departures: the rotation is the project's fixed one by signs and a Hadamard matrix, not a
    random orthogonal matrix; no outlier channels have more bits; sinks and the newest tokens stay as they are. The code is our own.
    """

    config_class = LloydConfig
    config: LloydConfig
    state_fields = ("codes", "norms", "tail", "first")
    state_types: ClassVar = {"tail": KeysValues, "first": KeysValues}

    def __init__(self, config: LloydConfig, spec: CacheSpec, layer: int) -> None:
        super().__init__(config, spec, layer)
        self.codes: tuple[mx.array, mx.array] | None = None
        self.norms: tuple[mx.array, mx.array] | None = None
        self.tail: KeysValues | None = None
        self.first: KeysValues | None = None

    def buckets(self) -> list[Bucket]:
        """Return the sinks, the decoded tokens, then the tail."""
        parts = [self.first, None if self.codes is None else self._decoded(), self.tail]
        return [part.as_bucket() for part in parts if part is not None]

    def absorb(self, keys: mx.array, values: mx.array, mass: mx.array | None) -> None:
        """Append the chunk to the tail, and code the blocks that are old enough."""
        self.tail = append_chunk(self.tail, keys, values)
        start = 0 if self.first is not None else self.config.sinks
        count = (self.tail.tokens - start - self.config.recent) // self.config.block * self.config.block
        if count <= 0:
            return
        if start:
            self.first = self.tail.copy_tokens(0, start)
        made = [lloyd_codes(part, self.config.bits) for part in self.tail.slice_tokens(start, start + count)]
        (key_codes, key_norms), (value_codes, value_norms) = made
        codes, norms = (key_codes, value_codes), (key_norms, value_norms)
        self.codes = codes if self.codes is None else _pair(concat_pairs(self.codes, codes))
        self.norms = norms if self.norms is None else _pair(concat_pairs(self.norms, norms))
        self.tail = self.tail.copy_tokens(start + count)

    def _decoded(self) -> KeysValues:
        assert self.codes is not None
        assert self.norms is not None
        assert self.tail is not None
        made = (lloyd_values(codes, norms, self.config.bits) for codes, norms in zip(self.codes, self.norms))
        return KeysValues(*(part.astype(self.tail.keys.dtype) for part in made))


def _pair(arrays: Iterable[mx.array]) -> tuple[mx.array, mx.array]:
    first, second = arrays
    return first, second


@cache
def lloyd_levels(bits: int) -> tuple[float, ...]:
    """Return the `2**bits` levels that code a standard Gaussian with the least squared error, ascending."""
    x = np.linspace(-6, 6, 20_001)
    density = np.exp(-(x**2) / 2)
    mass, moment = (np.append(0, np.cumsum(part)) for part in (density, density * x))
    levels = np.linspace(-2, 2, 2**bits)
    for _ in range(500):
        inner = np.searchsorted(x, (levels[1:] + levels[:-1]) / 2)
        edges = np.concatenate([[0], inner, [len(x)]])
        levels = np.diff(moment[edges]) / np.diff(mass[edges])
    return tuple(levels.tolist())


def lloyd_codes(x: mx.array, bits: int) -> tuple[mx.array, mx.array]:
    """Code rows `[..., D]`, D a multiple of 8; return bytes `[..., D * bits / 8]` and norms `[..., 1]` in float16."""
    levels = np.array(lloyd_levels(bits))
    wide = x.astype(mx.float32)
    norms = mx.linalg.norm(wide, axis=-1, keepdims=True)
    unit = rotate(wide / mx.maximum(norms, 1e-20)) * math.sqrt(x.shape[-1])
    codes = sum((unit > edge).astype(mx.uint32) for edge in ((levels[1:] + levels[:-1]) / 2).tolist())
    assert isinstance(codes, mx.array)
    eights = (codes.reshape(*x.shape[:-1], -1, 8) << _eight_places(bits)).sum(axis=-1, keepdims=True)
    return eights.view(mx.uint8)[..., :bits].reshape(*x.shape[:-1], -1), norms.astype(mx.float16)


def lloyd_values(codes: mx.array, norms: mx.array, bits: int) -> mx.array:
    """Return float32 rows `[..., D]` of what `lloyd_codes` returned."""
    eights = mx.pad(codes.reshape(*codes.shape[:-1], -1, bits), [(0, 0)] * codes.ndim + [(0, 4 - bits)]).view(mx.uint32)
    unit = mx.array(lloyd_levels(bits))[(eights >> _eight_places(bits)) & (2**bits - 1)]
    rows = unit.reshape(*codes.shape[:-1], -1)
    return rotate_back(rows) * (norms.astype(mx.float32) / math.sqrt(rows.shape[-1]))


def _eight_places(bits: int) -> mx.array:
    return mx.arange(8, dtype=mx.uint32) * bits


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
    model: Any,
    variants: Sequence[Variant],
    tokens: Sequence[int],
    context_tokens: int,
    sizes_of: Callable[[Any, Sequence[Any]], dict[str, Any]] = cache_sizes,
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
    sizes_of
        What counts bytes: `cache_sizes`, or `sizes_of_live`.

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
        restored = sizes_of(model, held.cache)["fp16_bytes"]  # windows hold fewer tokens than after a prompt's chunk
        for start in range(0, len(following) - 1, CHUNK):
            now = sizes_of(model, held.cache)
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


def sizes_of_live(model: Any, cache: Sequence[Any]) -> dict[str, Any]:
    """Measure as `cache_sizes` does the layers alone that live caches hold."""
    live = [entry for entry in stock.entries(cache) if isinstance(entry, LayerCache)]
    fp16_bytes = sum(2 * slot.heads * slot.dim * entry.offset for entry in live for slot in entry.slots)
    cache_bytes = sum(entry.nbytes for entry in live)
    return {
        "tokens": live[0].offset,
        "fp16_bytes": fp16_bytes,
        "cache_bytes": cache_bytes,
        "ratio": fp16_bytes / cache_bytes,
    }


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
