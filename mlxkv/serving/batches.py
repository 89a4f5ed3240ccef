"""Batches of requests: mlx-lm's own, in the caches that the server was asked to run in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from mlx_lm.generate import BatchGenerator


class Batches(BatchGenerator):
    """mlx-lm's `BatchGenerator`, which makes the caches of requests that begin like no earlier one.

    Parameters
    ----------
    make_caches
        Makes the prompt cache of a model.
    *arguments, **more
        Those of mlx-lm.
    """

    def __init__(self, make_caches: Callable[[Any], list[Any]], *arguments: Any, **more: Any) -> None:
        self._make_caches = make_caches
        super().__init__(*arguments, **more)  # type: ignore[no-untyped-call]

    def insert_segments(
        self,
        segments: list[list[list[int]]],
        max_tokens: list[int] | None = None,
        caches: Sequence[list[Any] | None] | None = None,
        *arguments: Any,
        **more: Any,
    ) -> list[int]:
        """Add requests.

        Parameters
        ----------
        segments, max_tokens, *arguments, **more
            Those of mlx-lm.
        caches
            A prompt cache of each request, or None for a new one.

        Returns
        -------
        list of int
            Numbers of the requests.
        """
        known = [None] * len(segments) if caches is None else caches
        made = [self._make_caches(self.model) if cache is None else cache for cache in known]
        return super().insert_segments(segments, max_tokens, made, *arguments, **more)  # type: ignore[no-untyped-call, no-any-return]
