"""Variants: the caches that an evaluation compares, and the steps that all evaluations have in common.

A cache is built of its context before the question is known, as in a conversation, so a method cannot prepare for it.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import operator
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.models.cache import KVCache, make_prompt_cache

from mlxkv import lm, stock
from mlxkv.codec.session import CacheCodec
from mlxkv.codec.summary import summary
from mlxkv.dump import KVDump
from mlxkv.errors import InputError
from mlxkv.evaluate import metrics
from mlxkv.io.container import Reader
from mlxkv.live import live_config
from mlxkv.live.base import LayerCache
from mlxkv.live.seam import make_cache
from mlxkv.models import cache_spec
from mlxkv.spec import STREAMS, Layer


@dataclass(frozen=True)
class CachedContext:
    """A context in a cache, ready for the tokens that come next.

    Parameters
    ----------
    cache
        A prompt cache of mlx-lm, one entry for each layer.
    sizes
        As `cache_sizes` returns them.
    details
        More numbers for records, such as seconds, or a codec's errors.
    """

    cache: list[Any]
    sizes: dict[str, Any]
    details: dict[str, Any] = field(default_factory=dict)


class CacheBuilder(Protocol):
    """A function that reads tokens into a new cache."""

    def __call__(self, model: Any, tokens: Sequence[int], exact: CachedContext | None = None) -> CachedContext:
        """Read tokens into a new cache.

        Parameters
        ----------
        model
            A model that mlx-lm loaded.
        tokens
            1 or more.
        exact
            The untouched cache of the same tokens, where it is at hand; not to be changed. Builders that begin with one
            make it where it is None.

        Returns
        -------
        CachedContext
            The cache.
        """


@dataclass(frozen=True)
class Variant:
    """One kind of cache in an evaluation, with its settings.

    Parameters
    ----------
    name
        The row's in a table; different from those of other variants of a run.
    settings
        JSON values that describe it in results.
    build
        Reads a context into such a cache.
    needs_baseline
        Whether `build` begins with the untouched cache, and uses its argument `exact`.
    """

    name: str
    settings: Mapping[str, Any]
    build: CacheBuilder
    needs_baseline: bool = False


def baseline() -> Variant:
    """Return mlx-lm's own cache, untouched: every other variant is compared with it.

    Returns
    -------
    Variant
        The variant; its name is "whole".
    """

    def build(model: Any, tokens: Sequence[int], exact: CachedContext | None = None) -> CachedContext:
        cache: list[Any] = make_prompt_cache(model)
        start = time.perf_counter()
        lm.prefill(model, tokens, cache)
        return CachedContext(cache, cache_sizes(model, cache), {"prefill_seconds": time.perf_counter() - start})

    return Variant("whole", {}, build)


def live_variant(method: str, **overrides: Any) -> Variant:
    """Return a live cache, prefilled in chunks of `lm.PREFILL_CHUNK` tokens.

    Parameters
    ----------
    method
        Name of a live method or of a preset.
    **overrides
        Settings of the method that differ from the preset's, as in `mlxkv.make_cache`.

    Returns
    -------
    Variant
        The variant; its name has the overrides.

    Examples
    --------
    >>> live_variant("h2o", heavy=48).name
    'h2o (heavy=48)'
    """

    def build(model: Any, tokens: Sequence[int], exact: CachedContext | None = None) -> CachedContext:
        cache = make_cache(model, method, **overrides)
        start = time.perf_counter()
        lm.prefill(model, tokens, cache)
        return CachedContext(cache, cache_sizes(model, cache), {"prefill_seconds": time.perf_counter() - start})

    changed = ", ".join(f"{key}={value}" for key, value in overrides.items())
    settings = dataclasses.asdict(live_config(method, **overrides))
    return Variant(f"{method} ({changed})" if changed else method, {"cache": method, **settings}, build)


def codec_variant(codec: CacheCodec, name: str, dtype: str = "auto", fingerprint: str | None = None) -> Variant:
    """Return the untouched cache after compression and decompression.

    Parameters
    ----------
    codec
        The codec, made for the model that is evaluated.
    name
        The variant's.
    dtype
        Of the dump that is compressed, as in `lm.extract_cache`.
    fingerprint
        `lm.fingerprint` of the model, where it is known: to compute it reads all weights.

    Returns
    -------
    Variant
        The variant. `cache_bytes` are those of the compressed file; its details have the file's parts, the errors of
        `coding_errors`, `artifact_bytes`, `compress_seconds` and `decompress_seconds`.
    """

    def build(model: Any, tokens: Sequence[int], exact: CachedContext | None = None) -> CachedContext:
        cache = (exact or baseline().build(model, tokens)).cache
        known = lm.fingerprint(model) if fingerprint is None else fingerprint
        dump = lm.extract_cache(cache, cache_spec(model), [list(tokens)], fingerprint=known, dtype=dtype)
        clock = [time.perf_counter()]
        blob = codec.compress_dump(dump)
        clock.append(time.perf_counter())
        decoded = codec.decompress_dump(blob, limit=2 * dump.fp16_bytes)
        clock.append(time.perf_counter())
        with Reader(blob) as reader:
            layout = summary(reader)
        details = {
            **{key: value for key, value in layout.items() if key not in ("tokens", "fp16_bytes", "ratio")},
            **coding_errors(layout, dump, decoded),
            "artifact_bytes": codec.artifacts.nbytes,
            "compress_seconds": clock[1] - clock[0],
            "decompress_seconds": clock[2] - clock[1],
        }
        fp16_bytes, file_bytes = cache_sizes(model, cache)["fp16_bytes"], layout["file_bytes"]  # both with other states
        sizes = {
            "tokens": layout["tokens"],
            "fp16_bytes": fp16_bytes,
            "ratio": fp16_bytes / file_bytes,
            "cache_bytes": file_bytes,
        }
        unnamed = dataclasses.replace(
            decoded, fingerprint=""
        )  # it is this model's: hashing that again may take a second
        return CachedContext(lm.restore(model, unnamed), sizes, details)

    settings: dict[str, Any] = {"artifacts": codec.artifacts.fingerprint, "recent": codec.recent, "sinks": codec.sinks}
    if codec.quality is not None:
        settings |= {"quality": codec.quality, "window_quality": codec.window_quality}
    return Variant(name, settings, build, needs_baseline=True)


def iter_variants(
    model: Any, variants: Sequence[Variant], tokens: Sequence[int]
) -> Iterator[tuple[Variant, CachedContext]]:
    """Build the caches of all variants, one after the other.

    Parameters
    ----------
    model
        A model that mlx-lm loaded.
    variants
        The variants; the baseline comes before those that need it.
    tokens
        The context, 1 token or more.

    Yields
    ------
    variant : Variant
        The variant.
    cached : CachedContext
        Its cache, which the caller may change. One prefill serves the baseline and the variants that need it.

    Raises
    ------
    InputError
        For an empty context.
    """
    if not len(tokens):
        raise InputError("a context of 1 token or more is needed")
    exact: CachedContext | None = None
    for variant in variants:
        if variant.name != baseline().name:
            yield variant, variant.build(model, tokens, exact)
            continue
        exact = variant.build(model, tokens)
        if any(other.needs_baseline for other in variants):
            yield variant, dataclasses.replace(exact, cache=copy.deepcopy(exact.cache))
        else:
            # Nothing begins with it, so a large cache is not kept twice.
            yield variant, exact
            exact = None


def cache_sizes(model: Any, cache: Sequence[Any]) -> dict[str, Any]:
    """Measure a cache in use, for a batch of one.

    Parameters
    ----------
    model
        The model that the cache belongs to.
    cache
        A prompt cache, one entry for each layer.

    Returns
    -------
    dict
        `tokens`, the number that the cache has seen; `cache_bytes` of all arrays that the entries keep, allocated steps,
        windows and states of other layers included; `fp16_bytes` that mlx-lm's own cache of these tokens takes at 16 bits
        an element, where windows hold what they hold now; and `ratio`, the latter over the former.
    """
    spec = cache_spec(model)
    entries = stock.entries(cache)
    fp16_bytes = sum(2 * _elements(entry, layer) for entry, layer in zip(entries, spec.layers) if entry is not None)
    cache_bytes = sum(entry.nbytes for entry in entries if entry is not None)
    return {
        "tokens": entries[spec.groups[0].indices[0]].offset,
        "fp16_bytes": fp16_bytes,
        "cache_bytes": cache_bytes,
        "ratio": fp16_bytes / cache_bytes,
    }


def _elements(entry: Any, layer: Layer | None) -> int:
    """Return the elements that mlx-lm keeps in the place of an entry, of those tokens that it has seen."""
    if layer is not None and (layer.window is None or isinstance(entry, LayerCache | KVCache)):
        return sum(layer.rows(entry.offset) * slot.heads * slot.dim for slot in layer)
    rows = getattr(entry, "offset", None)
    leaves = cast(list[tuple[str, Any]], tree_flatten(entry.state))
    arrays = [array for _, array in leaves if isinstance(array, mx.array)]
    # A window that is not full yet has room for tokens that it has not seen.
    return sum(array[:, :, :rows].size if rows is not None and array.ndim == 4 else array.size for array in arrays)


def coding_errors(layout: Mapping[str, Any], original: KVDump, decoded: KVDump) -> dict[str, Any]:
    """Measure the error of coded tokens of the main group of layers, those between sinks and recent tokens.

    Parameters
    ----------
    layout
        A container's `summary`, or a mapping with its numbers `sinks` and `recent`.
    original, decoded
        A dump before and after coding.

    Returns
    -------
    dict
        `k_relative_error` and `v_relative_error` over all layers, and `k_layer_mse` and `v_layer_mse`, a list with a
        number for each layer.
    """
    middle = slice(layout["sinks"], max(layout["sinks"], original.k.shape[3] - layout["recent"]))
    pairs = {name: (original.stream(name)[..., middle, :], decoded.stream(name)[..., middle, :]) for name in STREAMS}
    return {
        **{f"{name}_relative_error": metrics.relative_error(*pair) for name, pair in pairs.items()},
        **{f"{name}_layer_mse": metrics.layer_mse(*pair) for name, pair in pairs.items()},
    }


def iter_logits(model: Any, cache: list[Any], tokens: Sequence[int], chunk: int) -> Iterator[mx.array]:
    """Predict the tokens of a text, each from the cache and those before it.

    Parameters
    ----------
    model
        A model that mlx-lm loaded.
    cache
        A prompt cache; all tokens but the last are in it afterwards.
    tokens
        The text that comes after what is in the cache.
    chunk
        Tokens that the model reads at a time; 1 as in generation. Tokens of one chunk see each other exactly, whatever
        the cache does to stored ones.

    Yields
    ------
    mx.array
        Logits `[n, vocabulary]` for the next `n <= chunk` tokens after the first.
    """
    for start in range(0, len(tokens) - 1, chunk):
        part = tokens[start : min(start + chunk, len(tokens) - 1)]
        logits = model(mx.array([list(part)]), cache=cache)[0]
        mx.eval(logits, [entry.state for entry in cache])
        yield logits


def split_tokens(tokenizer: Any, context: str, question: str) -> tuple[list[int], list[int]]:
    """Tokenize a context and a question together, and split where the tokens are no longer those of the context alone.

    Parameters
    ----------
    tokenizer
        The model's.
    context, question
        Two texts that follow each other.

    Returns
    -------
    context_tokens : list of int
        Tokens of the context, but for those at its end that the question changes.
    question_tokens : list of int
        The rest. They are those that the question has after the context; on its own, some tokenizers would put a blank
        before it.
    """
    tokens, alone = tokenizer.encode(context + question), tokenizer.encode(context)
    boundary = sum(itertools.takewhile(bool, map(operator.eq, tokens, alone)))
    return tokens[:boundary], tokens[boundary:]


def generate_answer(
    model: Any, tokenizer: Any, cached: CachedContext, question: Sequence[int], max_tokens: int
) -> list[int]:
    """Generate greedily after a question about a context.

    Parameters
    ----------
    model, tokenizer
        As `mlxkv.lm.load` returns them.
    cached
        The context; question and answer are in its cache afterwards.
    question
        Tokens of the question, 1 or more.
    max_tokens
        The most tokens to generate.

    Returns
    -------
    list of int
        The answer's tokens, up to an end-of-text token, which is not among them.

    Raises
    ------
    InputError
        For an empty question.
    """
    if not len(question):
        raise InputError("a question of 1 token or more is needed")
    logits = lm.prefill(model, question, cached.cache)
    answer = lm.continue_greedily(model, cached.cache, logits, tuple(tokenizer.eos_token_ids))
    return list(itertools.islice(answer, max_tokens))
