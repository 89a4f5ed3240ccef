"""The texts of stored prompts, as their tokens."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from mlxkv.codec.parts import read_tokens
from mlxkv.errors import FormatError
from mlxkv.io.container import Reader
from mlxkv.store.index import BlockStore


def texts(blocks: BlockStore, root: bytes) -> Iterator[np.ndarray]:
    """Read what prompts said, the one used last first; what cannot be read is left out.

    Parameters
    ----------
    blocks
        Index and files.
    root
        Name that all of them begin with: of their model, its cache and their grade.

    Yields
    ------
    np.ndarray
        Token ids `[T]`, int32. A text that goes on from another one has its tokens as well.
    """
    for entry in blocks.entries():
        parts: list[np.ndarray] = []
        try:
            block = blocks.find(entry.name)
            while block is not None:
                with blocks.open_block(block.name) as file:
                    parts.append(read_tokens(Reader(file)))
                if not block.start:
                    break
                block = blocks.find(block.parent)
        except (OSError, FormatError):
            continue
        if block is not None and block.parent == root:
            yield np.concatenate(parts[::-1])
