"""The held-out texts that live caches are measured on: a context that is read in one chunk, and what comes after it."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks import miniature_texts, texts

MODEL = "smollm2-135m"
CONTEXT, PREDICT = 1024, 64  # 64 are one round of a tail that is packed 64 tokens at a time


def rows(name: str, tokenizer: Any, length: int) -> tuple[list[str], np.ndarray]:
    """Ten texts for MODEL, nine for a miniature: what each is, and their tokens `[N, length]`."""
    if name == MODEL:
        found = {f"documentation-{i}": row for i, row in enumerate(texts.same_kind(tokenizer, length, 2))}
        found |= {kind: tokenizer.encode(read())[:length] for kind, read in texts.OTHER_KINDS.items()}
    else:
        windows = miniature_texts.windows(length - 1, 3)
        found = {
            f"{kind}-{i}": row for kind in miniature_texts.held_out() for i, row in enumerate(windows[kind].tolist())
        }
    return list(found), np.array(list(found.values()))
