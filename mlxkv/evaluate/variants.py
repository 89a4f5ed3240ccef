"""What is evaluated: a way to hold a context in a cache, to ask about it, and to go on from there.

The context is held before the question is known, as in a conversation, so a method cannot prepare for the question.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_lm.models.cache import make_prompt_cache

from mlxkv import lm
from mlxkv.codec.kvtc import KVTCCacheCodec
from mlxkv.errors import InputError
from mlxkv.live import make_cache
from mlxkv.models import cache_spec


@dataclass(frozen=True)
class Variant:
    """name: of the row in a table. hold: of a model and tokens, the prompt cache that holds them in the method's way."""

    name: str
    hold: Callable[[Any, Sequence[int]], list[Any]]


def whole() -> Variant:
    """mlx-lm's own cache: what every other variant is compared with."""

    def hold(model: Any, tokens: Sequence[int]) -> list[Any]:
        cache: list[Any] = make_prompt_cache(model)
        lm.prefill(model, tokens, cache)
        return cache

    return Variant("whole", hold)


def live(method: str, **overrides: Any) -> Variant:
    """A live cache, `make_cache(model, method, **overrides)`, prefilled in chunks of `lm.PREFILL_CHUNK`."""

    def hold(model: Any, tokens: Sequence[int]) -> list[Any]:
        cache = make_cache(model, method, **overrides)
        lm.prefill(model, tokens, cache)
        return cache

    changed = ", ".join(f"{key}={value}" for key, value in overrides.items())
    return Variant(f"{method} ({changed})" if changed else method, hold)


def coded(codec: KVTCCacheCodec, name: str) -> Variant:
    """A whole cache that went through a codec and back."""

    def hold(model: Any, tokens: Sequence[int]) -> list[Any]:
        cache: list[Any] = make_prompt_cache(model)
        lm.prefill(model, tokens, cache)
        dump = lm.take(cache, cache_spec(model), [list(tokens)], fingerprint=lm.fingerprint(model))
        return lm.restore(model, codec.decompress_dump(codec.compress_dump(dump)))

    return Variant(name, hold)


def beside_whole(variants: Sequence[Variant]) -> list[Variant]:
    """The untouched cache first, then the others."""
    return [whole(), *(variant for variant in variants if variant.name != whole().name)]


def encode(tokenizer: Any, context: str, question: str) -> tuple[list[int], list[int]]:
    """Tokens of both, apart. Only the context begins with the tokenizer's own first token, if it has one."""
    return tokenizer.encode(context), tokenizer.encode(question, add_special_tokens=False)


def answer(
    model: Any, tokenizer: Any, variant: Variant, context: Sequence[int], question: Sequence[int], max_tokens: int
) -> list[int]:
    """What the model says, greedily, to a question asked after the context; ends before an end-of-text token.

    Raises InputError for an empty context or question.
    """
    if not len(context) or not len(question):
        raise InputError(
            f"a context and a question of 1 token or more are needed, not {len(context)} and {len(question)}"
        )
    cache = variant.hold(model, context)
    logits = lm.prefill(model, question, cache)
    said = lm.continue_greedily(model, cache, logits, tuple(tokenizer.eos_token_ids))
    return list(itertools.islice(said, max_tokens))
