"""An answer as it comes, token by token and piece by piece."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class Answer:
    """An answer, up to a text that ends it.

    Parameters
    ----------
    tokenizer
        As `mlxkv.lm.load` returns it.
    stops
        Texts that end the answer and are no part of it.

    Attributes
    ----------
    tokens
        Token ids that were generated, the one that ends the answer included.
    stopped
        Whether one of the stops has come.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str]) -> None:
        self._tokenizer, self._stops = tokenizer, stops
        self._seen, self._shown = "", 0
        self.tokens: list[int] = []
        self.stopped = False

    def take(self, response: Any) -> str:
        """Add what mlx-lm has generated.

        Parameters
        ----------
        response
            One of the responses of mlx-lm's `stream_generate`.

        Returns
        -------
        str
            Text to show, without what may be the beginning of a stop.
        """
        if response.generation_tokens > len(self.tokens):  # the last response repeats the last token
            self.tokens.append(int(response.token))
        self._seen += response.text
        kept = self._before_stop(self._seen)
        self.stopped = len(kept) < len(self._seen)
        self._seen = kept
        ends = (n for stop in self._stops for n in range(1, len(stop)) if self._seen.endswith(stop[:n]))
        return self._show(len(self._seen) - (0 if self.stopped or response.finish_reason else max(ends, default=0)))

    @property
    def text(self) -> str:
        """The whole answer, as its tokens say it: the pieces may lack a space that it begins with."""
        ended = bool(self.tokens) and self.tokens[-1] in self._tokenizer.eos_token_ids
        said = self.tokens[:-1] if ended else self.tokens
        return self._before_stop(self._tokenizer.decode(said, clean_up_tokenization_spaces=False)) if said else ""

    def _before_stop(self, text: str) -> str:
        return text[: min((found for found in map(text.find, self._stops) if found >= 0), default=None)]

    def _show(self, end: int) -> str:
        piece, self._shown = self._seen[self._shown : end], max(self._shown, end)
        return piece
