"""What the miniatures read: bytes of Python's documentation and of the standard library's sources.

Held out are the topics and texts that `benchmarks/texts.py` holds out, and every eighth module. Training text leaves
out every paragraph that has a line longer than 30 characters in common with any of them. A token is a byte, and
END stands between documents.
"""

from __future__ import annotations

import sysconfig
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from benchmarks import texts

END = 256
VOCABULARY = 257
SHORTEST = 128
_STANDARD_LIBRARY = Path(sysconfig.get_path("stdlib"))
_READ_ELSEWHERE = {"heapq", "statistics"}  # texts.OTHER_KINDS


def held_out_modules() -> list[str]:
    """Names of the top-level modules of the standard library that training never reads."""
    return [name for i, name in enumerate(_modules()) if i % 8 == 1 or name in _READ_ELSEWHERE]


def _modules() -> list[str]:
    return sorted(path.stem for path in _STANDARD_LIBRARY.glob("[a-z]*.py"))


def held_out() -> dict[str, list[str]]:
    """Held-out texts by kind: documentation, code and other."""
    return {
        "documentation": texts.documentation(held_out=True),
        "code": [_source(name) for name in held_out_modules()],
        "other": [read() for read in texts.OTHER_KINDS.values()],
    }


def training_texts() -> dict[str, list[str]]:
    """Training texts by kind: documentation and code, without any paragraph that has a held-out line."""
    known = {line for kind in held_out().values() for text in kind for line in texts.long_lines(text)}
    code = [_source(name) for name in _modules() if name not in held_out_modules()]
    return {
        kind: ["\n\n".join(part for part in text.split("\n\n") if not known & texts.long_lines(part)) for text in raw]
        for kind, raw in {"documentation": texts.documentation(held_out=False), "code": code}.items()
    }


def _source(module: str) -> str:
    return (_STANDARD_LIBRARY / f"{module}.py").read_text(encoding="utf-8")


def encode(documents: list[str]) -> np.ndarray:
    """Tokens `[T]`, int32: each document's UTF-8 bytes and END."""
    return np.concatenate([np.append(np.frombuffer(text.encode(), np.uint8), np.int32(END)) for text in documents])


@cache
def training() -> tuple[np.ndarray, ...]:
    """Tokens of each kind of training text."""
    return tuple(encode(documents) for documents in training_texts().values())


def batch(streams: tuple[np.ndarray, ...], count: int, context: int, rng: np.random.Generator) -> mx.array:
    """Random windows `[count, context + 1]`, each from a random stream.

    One byte in about 13 belongs to a copy of an earlier stretch: small models learn late to look far back, and a cache
    is only worth measuring in a model that does. context: at least SHORTEST.
    """
    rows = []
    for _ in range(count):
        stream = streams[rng.integers(len(streams))]
        start = rng.integers(len(stream) - context)
        row = stream[start : start + context + 1].copy()
        for _ in range(rng.binomial(context // 128, 0.25)):
            length = rng.integers(16, SHORTEST // 2)
            source = rng.integers(context - 2 * length)
            target = rng.integers(source + length, context - length)
            row[target : target + length] = row[source : source + length]
        rows.append(row)
    return mx.array(np.stack(rows))


def windows(length: int, count: int) -> dict[str, np.ndarray]:
    """Of each kind of held-out text and of the training's, `count` windows `[count, length + 1]` spread evenly."""
    streams = {kind: encode(documents) for kind, documents in held_out().items()}
    streams |= {f"{kind}, trained on": tokens for kind, tokens in zip(training_texts(), training())}
    return {
        kind: np.array(texts.spread(tokens.tolist(), length + 1, count), np.int32) for kind, tokens in streams.items()
    }


@cache
def _pairs() -> np.ndarray:
    """How often each token follows each other token in a million of each kind `[VOCABULARY, VOCABULARY]`."""
    shares = [
        np.bincount(VOCABULARY * tokens[:-1] + tokens[1:], minlength=VOCABULARY**2) / len(tokens)
        for tokens in training()
    ]
    return 1e6 * np.sum(shares, axis=0).reshape(VOCABULARY, VOCABULARY)


def bigram_bits(rows: np.ndarray) -> np.ndarray:
    """Bits that a model of counted pairs needs for each token but the first of rows `[N, T]`: `[N, T - 1]`.

    A token that never followed counts a tenth of its own frequency, so that no pair is impossible.
    """
    pairs, singles = _pairs(), _pairs().sum(0) + 1
    smooth = pairs + 0.1 * VOCABULARY * singles / singles.sum()
    return -np.log2(smooth / smooth.sum(1, keepdims=True))[rows[:, :-1], rows[:, 1:]]


def unigram_bits(rows: np.ndarray) -> np.ndarray:
    """The same for a model that counts single tokens."""
    singles = _pairs().sum(0) + 1
    return -np.log2(singles / singles.sum())[rows[:, 1:]]


def tokenizer() -> Any:
    """A Hugging Face tokenizer whose token is a byte; 256 ends a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    vocabulary = {character: byte for byte, character in bytes_to_unicode().items()}  # type: ignore[no-untyped-call]
    model = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=model, eos_token="<|end|>", clean_up_tokenization_spaces=False
    )
