"""The sections of coded tokens, made piece by piece: what one's codes take to bytes goes on beside the next one's arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import mlx.core as mx
import numpy as np

from mlxkv.codec.layout import Piece
from mlxkv.codec.methods.base import BlockCoder
from mlxkv.io.container import Section, encode_section
from mlxkv.kernels import metal

Progress = Callable[[int], None]
PENDING = 8  # sections that may wait for their coding


def encode_sections(
    coder: BlockCoder, rows: Callable[[Piece], Mapping[str, mx.array]], pieces: Iterable[Piece], lossless: str, progress: Progress | None
) -> list[tuple[Section, bytes]]:  # fmt: skip
    """Of all pieces, in their order. rows: each stream's rows `[n, p]` of a piece."""
    coding = lossless if coder.uses_lossless_stage else "raw"
    kernels = metal.available() and not (coder.uses_lossless_stage and coding != "rans")

    def section(name: str, codes: np.ndarray) -> tuple[Section, bytes]:
        return encode_section(name, coder.pack(name[0], codes), coding)

    with ThreadPoolExecutor(2) as pool:
        submit = _run_now if kernels else pool.submit
        futures: list[Future[tuple[Section, bytes]]] = []
        for piece in pieces:
            for name, codes in coder.encode(rows(piece), piece.quality).items():
                if len(futures) >= PENDING:  # wait for the coding rather than let codes pile up
                    futures[-PENDING].result()
                futures.append(submit(section, f"{name}.{piece.name}", codes))
            if progress:
                progress(piece.stop - piece.start)
        return [future.result() for future in futures]


def _run_now(function: Callable[..., Any], *arguments: Any) -> Future[Any]:
    """An executor's `submit` in this thread: rANS may launch kernels, which belong where the others are launched."""
    future: Future[Any] = Future()
    future.set_result(function(*arguments))
    return future
