"""The thread that generates: mlx-lm's own, with room for other work when nobody asks."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
from mlx_lm import server

from mlxkv.errors import InputError
from mlxkv.serving.prompt_cache import PromptCache
from mlxkv.serving.provider import Provider

log = logging.getLogger("mlxkv.serving")
IDLE_SECONDS = 5.0  # without a request, before other work begins
_REPORT_SECONDS = 1.0


class Generator(server.ResponseGenerator):
    """mlx-lm's generation, which can also be ended.

    Parameters
    ----------
    provider
        Its models.
    prompts
        Its prompt cache.
    idle
        Called on the thread that generates, one short piece of work at a time, when no request has come for some seconds.
        False where there is nothing to do for now. None for nothing.
    report
        Called on that thread every second or so.
    ended
        Called when the thread ends, for whatever reason.

    Attributes
    ----------
    failure
        What ended the thread, where that was an error.
    """

    model_provider: Provider

    def __init__(
        self,
        provider: Provider,
        prompts: PromptCache,
        *,
        idle: Callable[[], bool] | None = None,
        report: Callable[[], None] = lambda: None,
        ended: Callable[[], None] = lambda: None,
    ) -> None:
        self.prompts = prompts
        self.failure: BaseException | None = None
        self._idle, self._report, self._ended = idle, report, ended
        self._last_request = self._last_report = time.monotonic()
        self._contexts: dict[int, Any] = {}
        self._running = threading.Condition()
        self._count = self._begun = 0
        super().__init__(provider, prompts)  # type: ignore[arg-type]

    @property
    def running(self) -> int:
        """Requests that are being answered."""
        return self._count

    @contextmanager
    def answering(self) -> Iterator[None]:
        """Count a request as being answered.

        Yields
        ------
        None
            While it is.
        """
        with self._running:
            self._count += 1
            self._begun += 1
        try:
            yield
        finally:
            with self._running:
                self._count -= 1
                self._running.notify_all()

    def wait(self, seconds: float) -> bool:
        """Wait for all answers.

        Parameters
        ----------
        seconds
            How long at most.

        Returns
        -------
        bool
            Whether there are none left.
        """
        with self._running:
            return self._running.wait_for(lambda: not self._count, seconds)

    def end(self, seconds: float) -> bool:
        """End the thread, and what it still answers.

        Parameters
        ----------
        seconds
            How long to wait for it.

        Returns
        -------
        bool
            Whether it has ended.
        """
        self._stop = True
        for context in list(self._contexts.values()):
            context.stop()
        self._generation_thread.join(seconds)
        return not self._generation_thread.is_alive()

    def generate(self, *arguments: Any, **more: Any) -> tuple[Any, Iterator[Any]]:
        """Hand a request to the thread that generates, as mlx-lm does.

        Parameters
        ----------
        *arguments, **more
            Those of mlx-lm.

        Returns
        -------
        tuple
            mlx-lm's context, and its responses one by one.
        """
        alone_since = self._begun if self._count == 1 else None
        context, responses = super().generate(*arguments, **more)
        self._contexts[id(context)] = context
        return context, self._while_running(context, responses, alone_since)

    def _while_running(self, context: Any, responses: Iterator[Any], alone_since: int | None) -> Iterator[Any]:
        try:
            for index, response in enumerate(responses):
                if index == 0 and alone_since == self._begun:  # the prompt was computed, and nothing else
                    self.prompts.computed(len(context.prompt) - context.prompt_cache_count)
                yield response
        finally:
            self._contexts.pop(id(context), None)

    def _run_generate(self) -> None:
        """Run the thread."""
        try:
            self._generate()  # type: ignore[no-untyped-call]
        except BaseException as error:  # noqa: BLE001  # told by who started it
            self.failure, self._generation_failed = error, True
        finally:
            self.prompts.trim_to(n_sequences=0)  # by the thread that made the arrays
            mx.clear_streams()  # or the process aborts when it ends, with MLX 0.32
            self._ended()

    def _tokenize(self, tokenizer: Any, request: Any, args: Any) -> tuple[Any, ...]:
        """Refuse what no model can go on from, which would end mlx-lm's thread."""
        found = super()._tokenize(tokenizer, request, args)  # type: ignore[no-untyped-call]
        if not found[0]:
            raise InputError("the prompt has no tokens")
        if not all(isinstance(token, int) for token in found[0]):
            raise InputError("the prompt has to be one text")
        if args.seed is not None and not 0 <= args.seed < 2**64:
            raise InputError("seed has to be a whole number from 0 to 2**64 - 1")
        if bias := args.logits.logit_bias:  # MLX writes to any place in memory that is asked for
            count = len(tokenizer.get_vocab())
            if not all(0 <= token < count for token in bias):
                raise InputError(f"logit_bias names a token that there is not: there are 0 to {count - 1}")
        return found

    def _log_cache_stats(self) -> None:
        """Say nothing: a line tells what each request found."""

    def _next_request(self, timeout: float | None = None) -> Any:
        """Return a request if there is one; do other work where none has come for a while."""
        request = super()._next_request(timeout)  # type: ignore[no-untyped-call]
        now = time.monotonic()
        if request is not None or timeout is None or self._count:
            self._last_request = now
        elif self._idle is not None and now - self._last_request >= IDLE_SECONDS:
            self._work()
        if now - self._last_report >= _REPORT_SECONDS:
            self._last_report = now
            self._report()
        return request

    def _work(self) -> None:
        """Do a piece of other work."""
        try:
            more = self._idle is not None and self._idle()
        except Exception:  # whatever it is, requests are still answered
            log.exception("what was to be done while nobody asks is given up")
            self._idle = None
            return
        if not more:
            self._last_request = time.monotonic()
