"""A thread that writes down what was used, so that who reads a prompt back does not wait for a disk, and sweeps the store once."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from threading import Event, Lock, Thread

from mlxkv.errors import InputError
from mlxkv.store.database import Unavailable

DELAY = 5.0  # seconds from the first use to the sweep, and between two looks at what was used
_END_SECONDS = 10.0


class Keeper:
    """Looks after a store that is in use, in the background.

    Parameters
    ----------
    flush
        Writes down what was used.
    sweep
        Finds what a power cut has left.
    """

    def __init__(self, flush: Callable[[], object], sweep: Callable[[], object]) -> None:
        self._flush, self._sweep = flush, sweep
        self._ended, self._starting = Event(), Lock()
        self._thread: Thread | None = None

    def wake(self) -> None:
        """Begin, unless it has begun."""
        if self._thread is None:
            with self._starting:
                if self._thread is None and not self._ended.is_set():
                    self._thread = Thread(target=self._run, name="mlxkv-store-keeper", daemon=True)
                    self._thread.start()

    def end(self) -> None:
        """Stop as soon as what it does at the moment is done."""
        with self._starting:
            self._ended.set()
        if self._thread is not None:
            self._thread.join(_END_SECONDS)

    def _run(self) -> None:
        is_swept = False
        while not self._ended.wait(DELAY):
            with suppress(Unavailable, InputError):  # the next look may find it well again
                self._flush()
                if not is_swept:
                    self._sweep()
                    is_swept = True
