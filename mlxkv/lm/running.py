"""A model run over a text: the prompt in chunks, then one token at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import mlx.core as mx

from mlxkv.errors import InputError

PREFILL_CHUNK = 256
Progress = Callable[[int], None]


def prefill(model: Any, tokens: Sequence[int], cache: list[Any], progress: Progress | None = None) -> mx.array:
    """Run tokens through the model in chunks, filling a cache.

    Parameters
    ----------
    model
        A loaded mlx-lm model.
    tokens
        Token ids; at least one.
    cache
        The model's prompt cache; it grows by the tokens.
    progress
        Called with the number of tokens of each chunk that is done.

    Returns
    -------
    mx.array
        Logits `[vocabulary]` of the last token.

    Raises
    ------
    InputError
        When there are no tokens.
    """
    if not len(tokens):
        raise InputError("no tokens to run: the prompt is empty")
    logits = mx.zeros(0)
    for start in range(0, len(tokens), PREFILL_CHUNK):
        chunk = mx.array([list(tokens[start : start + PREFILL_CHUNK])])
        logits = model(chunk, cache=cache)[0, -1]
        # Without the states in the same eval, the graph of the whole prompt would be kept.
        mx.eval(logits if start + PREFILL_CHUNK >= len(tokens) else [], [entry.state for entry in cache])
        if progress:
            progress(chunk.shape[1])
    return logits


def continue_greedily(model: Any, cache: list[Any], logits: mx.array, stop: Sequence[int] = ()) -> Iterator[int]:
    """Generate the most likely tokens, one by one.

    Parameters
    ----------
    model
        A loaded mlx-lm model.
    cache
        The model's prompt cache; each token is fed into it before it is yielded.
    logits
        Logits `[vocabulary]` of the last token in the cache.
    stop
        Tokens that end the text; they are neither yielded nor fed.

    Yields
    ------
    int
        Token ids, without end unless one of `stop` comes up.
    """
    while True:
        token = int(mx.argmax(logits))
        if token in stop:
            return
        logits = model(mx.array([[token]]), cache=cache)[0, -1]
        mx.eval(logits, [entry.state for entry in cache])
        yield token
