"""The server as a whole: what it says when it starts, and an end that loses nothing."""

from __future__ import annotations

import functools
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from mlx_lm.models.cache import make_prompt_cache

from mlxkv.errors import InputError, MlxkvError
from mlxkv.live import live_config, make_cache
from mlxkv.serving.batches import Batches
from mlxkv.serving.flags import check_ranks, machine_share, replaced, run_server
from mlxkv.serving.generation import Generator
from mlxkv.serving.handler import Handler
from mlxkv.serving.http import Listener
from mlxkv.serving.prompt_cache import PromptCache, megabytes
from mlxkv.serving.provider import Provider

if TYPE_CHECKING:
    from mlxkv.store import Store

log = logging.getLogger("mlxkv.serving")
GRACE_SECONDS = 5.0  # for answers that are under way when the server is asked to stop
END_SECONDS = 10.0  # for the thread that generates
STORE_SECONDS = 20.0  # for what is still to be written
_PROGRESS_SECONDS = 5.0  # between lines about a long prompt
_SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")
_INTERRUPTED = 130
_SAME_SIGNAL_SECONDS = 0.5  # within which a wrapper, such as `timeout`, passes a signal on that came here as well


@dataclass(frozen=True)
class Options:
    """What `mlxkv serve` adds to mlx-lm's command line.

    Parameters
    ----------
    cache
        A live preset or method to run in; None for mlx-lm's own caches.
    store
        Whether prompts are kept on disk.
    folder
        Where; None for the default.
    limit
        Bytes that they may take there; None for the default.
    quality
        Quality in which they are kept, 0 to 100; None for the default.
    exact
        Whether they are kept bit for bit.
    calibrate
        Whether artifacts are learnt from prompts when nobody asks.
    """

    cache: str | None = None
    store: bool = True
    folder: Path | None = None
    limit: int | None = None
    quality: float | None = None
    exact: bool = False
    calibrate: bool = True


class Serving:
    """A server, from its command line to its end.

    Parameters
    ----------
    flags
        Those of mlx-lm's server.
    options
        What is added to them.
    ready
        Called with the server's URL when it listens.

    Raises
    ------
    InputError
        For options that cannot be used.
    """

    def __init__(self, flags: Sequence[str], options: Options, ready: Callable[[str], None] = lambda url: None) -> None:
        if options.cache is not None:
            live_config(options.cache)
        self._flags, self._options, self._ready = list(flags), options, ready
        self._stops: SimpleQueue[str] = SimpleQueue()  # which a signal handler may put into, as into no other queue
        self._interrupted: float | None = None  # when the first signal came
        self._generator: Generator | None = None

    def run(self) -> None:
        """Serve until `stop` is called or a signal comes.

        Raises
        ------
        InputError
            For flags, a model, an address or a folder that cannot be used.
        UnsupportedError
            For several processes that serve one model.
        MlxkvError
            When the thread that generates has ended by an error.
        """
        run_server(self._flags, self._run)

    def stop(self) -> None:
        """End the server; any thread may ask for it."""
        self._stops.put("")

    def _run(self, host: str, port: int, provider: Any) -> None:
        """Serve, once mlx-lm has read its command line."""
        check_ranks()
        arguments, options = provider.cli_args, self._options
        if options.cache is not None and arguments.kv_bits is not None:
            raise InputError("--cache and --kv-bits both say how caches are kept", "give one of them")
        limit = arguments.prompt_cache_bytes
        # A conversation that is larger than our own bound would else be read from disk, or computed, at each turn.
        prompts = PromptCache(
            arguments.prompt_cache_size, machine_share() if limit is None else limit, spares_newest=limit is None
        )
        with ExitStack() as stack:
            stack.enter_context(_short_log())
            listener = Listener(host, port, self._handle)
            stack.callback(listener.server_close)
            store = self._store(stack) if options.store else None
            opener = functools.partial(self._open, store) if store is not None else None
            own = Provider(arguments, opener, prompts.keep_on_disk, self._learnt_quality())
            if options.cache is not None:
                made = functools.partial(_caches, options.cache, own)
                batches = functools.partial(Batches, made)
                stack.enter_context(replaced(make_prompt_cache=made, BatchGenerator=batches))
            self._greet(listener, store)
            generator = Generator(own, prompts, idle=own.learn, report=prompts.report, ended=self.stop)
            self._generator = generator
            self._serve(listener, generator, store)
        if generator.failure is not None:
            _raise(generator.failure)

    def _handle(self, *connection: Any) -> Handler:
        assert self._generator is not None, "nobody can connect before"
        return Handler(self._generator, *connection)

    def _is_busy(self) -> bool:
        return self._generator is not None and self._generator.running > 0

    def _learnt_quality(self) -> float | None:
        """Return the quality at which learnt artifacts would be used; None where they would not."""
        from mlxkv.store.codings import DEFAULT_QUALITY

        options = self._options
        if options.exact or not options.calibrate:
            return None
        return DEFAULT_QUALITY if options.quality is None else options.quality

    def _store(self, stack: ExitStack) -> Store:
        from mlxkv.store import Store

        return stack.enter_context(Store(self._options.folder, self._options.limit, busy=self._is_busy))

    def _open(self, store: Store, model: Any, name: str) -> Any:
        options = self._options
        return store.for_model(model, name=name, quality=options.quality, exact=options.exact, method=options.cache)

    def _greet(self, listener: Listener, store: Store | None) -> None:
        """Say where the server listens, and where it keeps prompts."""
        if store is not None:
            most = store.blocks.limit
            limit = f"{most / 1e9:,.3g} GB" if most >= 1e9 else megabytes(most)
            log.info(
                "prompts are stored in %s, up to %s: --store-max bounds it, --no-store turns it off",
                store.blocks.folder.path,
                limit,
            )
        if not listener.is_private:
            log.warning("other machines may reach this server, which asks for no password: --host 127.0.0.1 is private")
        log.info("listening on %s/v1", listener.url)

    def _serve(self, listener: Listener, generator: Generator, store: Store | None) -> None:
        """Take connections until the end, and end."""
        thread = threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True)
        with self._stopped_by_signals():
            thread.start()
            self._ready(listener.url)
            why = self._stops.get()
            listener.shutdown()
            if why:
                log.info("%s: stopping, Ctrl-C again ends at once", why)
            if generator.running and not generator.wait(GRACE_SECONDS):
                log.warning("%d requests are not answered to their end", generator.running)
            ended = generator.end(END_SECONDS)
            if store is not None:
                _finish(generator.prompts)
        if not ended and self._interrupted is not None:  # in the middle of a long prompt: nothing is lost but that
            logging.shutdown()
            os._exit(0)

    @contextmanager
    def _stopped_by_signals(self) -> Iterator[None]:
        """Let signals end the server: the first one in order, the second at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {}
        for name in _SIGNALS:
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, self._signalled)
        try:
            yield
        finally:
            for number, usual in before.items():
                signal.signal(number, usual)

    def _signalled(self, number: int, _: Any) -> None:
        if self._interrupted is None:
            self._interrupted = time.monotonic()
            self._stops.put(signal.Signals(number).name)
        elif time.monotonic() - self._interrupted > _SAME_SIGNAL_SECONDS:
            os._exit(_INTERRUPTED)  # the store is whole at any time


def _finish(prompts: PromptCache) -> None:
    """Write what is waiting, and say so where it takes a while."""
    waiting = threading.Timer(0.5, log.info, ("writing the last prompts to disk, at most %.0f s", STORE_SECONDS))
    waiting.start()
    written = prompts.flush(STORE_SECONDS)
    waiting.cancel()
    prompts.report()
    if written:
        log.info("stopped: every prompt that was to be stored is on disk")
    else:
        log.warning("the last prompts were not stored in time: they will be read again")


def _caches(preset: str, provider: Provider, model: Any) -> list[Any]:
    """Make the caches that a model runs in, a draft model in mlx-lm's own."""
    return make_prompt_cache(model) if model is provider.draft_model else make_cache(model, preset)


def _raise(failure: BaseException) -> None:
    """Raise what ended the thread that generates."""
    if isinstance(failure, MlxkvError):
        raise failure
    log.error("the thread that generates ended", exc_info=failure)
    raise MlxkvError(f"the server ended: {type(failure).__name__}: {str(failure)[:500]}") from failure


class _SlowProgress(logging.Filter):
    """Passes lines about the progress of a prompt only where nothing else was said for a while."""

    def __init__(self) -> None:
        super().__init__()
        self._last = float("-inf")

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether a line is to be logged.

        Parameters
        ----------
        record
            The line.

        Returns
        -------
        bool
            True for all lines of others.
        """
        now, before = time.monotonic(), self._last
        if (
            record.funcName == "keepalive_callback"
            and record.levelno <= logging.INFO
            and now - before < _PROGRESS_SECONDS
        ):
            return False
        self._last = now
        return True


@contextmanager
def _short_log() -> Iterator[None]:
    """Log progress only where it is slow, unless everything is asked for."""
    root, short = logging.getLogger(), _SlowProgress()
    handlers = [] if root.isEnabledFor(logging.DEBUG) else list(root.handlers)
    for handler in handlers:
        handler.addFilter(short)
    try:
        yield
    finally:
        for handler in handlers:
            with suppress(ValueError):
                handler.removeFilter(short)
