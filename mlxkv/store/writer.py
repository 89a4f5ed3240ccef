"""The thread that writes what is to be stored, after the work that people wait for."""

from __future__ import annotations

import atexit
import threading
import time
from collections.abc import Callable
from typing import NamedTuple, Protocol

WAITING_BYTES = 2**30  # of snapshots that wait; the oldest are dropped for new ones
MOST_PAUSE = 4.0  # seconds that a block waits while requests run, where little else waits
LONGEST_WAIT = 60.0  # seconds after which a job waits for no requests any more
_ASK_AGAIN = 0.05
_LAST_BLOCK = 30.0  # seconds that the end of the process waits for a block that is being written


class Job(Protocol):
    """Something to write."""

    @property
    def nbytes(self) -> int:
        """Bytes that it keeps in memory while it waits."""

    def merged(self, other: Job) -> Job | None:
        """Return a job that does the work of this one and of one that waits; None where there is none such.

        Parameters
        ----------
        other
            The one that waits.

        Returns
        -------
        Job or None
            One of the two, changed.
        """

    def write(self, pause: Callable[[], None]) -> None:
        """Do it.

        Parameters
        ----------
        pause
            Called before each piece of work: returns when it may begin, or raises `Stopped`.
        """

    def dropped(self) -> None:
        """Count that it was never begun."""


class Stopped(Exception):  # noqa: N818  # no error: what is written so far stays
    """The writer has to end now."""


class _Turn(NamedTuple):
    job: Job
    since: float  # when it came, or the first of those whose work it does


class Writer:
    """A thread that does one job after another.

    Parameters
    ----------
    busy
        Asked before each block: while it is true, writing waits, some seconds at most, and the fewer the more waits.
    most_bytes
        Bytes of jobs that may wait.
    clock
        Returns seconds.
    """

    def __init__(
        self,
        busy: Callable[[], bool] | None = None,
        most_bytes: int = WAITING_BYTES,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._busy, self._most, self._clock = busy, most_bytes, clock
        self._waiting: list[_Turn] = []
        self._running: _Turn | None = None
        self._hurried = 0
        self._stopping = False
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    @property
    def waiting(self) -> tuple[int, int]:
        """Jobs that wait or run, and the bytes that they keep in memory."""
        with self._changed:
            turns = self._turns()
            return len(turns), sum(turn.job.nbytes for turn in turns)

    def add(self, job: Job) -> None:
        """Let a job be done later.

        Parameters
        ----------
        job
            The job.
        """
        with self._changed:
            if self._stopping:
                job.dropped()
                return
            since = self._clock()
            for other in self._waiting[:]:
                if (both := job.merged(other.job)) is not None:
                    self._waiting.remove(other)
                    job, since = both, min(since, other.since)
            self._waiting.append(_Turn(job, since))
            while len(self._waiting) > 1 and sum(turn.job.nbytes for turn in self._waiting) > self._most:
                self._waiting.pop(0).job.dropped()
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="mlxkv-store", daemon=True)
                self._thread.start()
                atexit.register(self._end)
            self._changed.notify_all()

    def flush(self, timeout: float | None = None) -> bool:
        """Wait until everything is written that waits now, without regard to what else runs.

        Parameters
        ----------
        timeout
            Seconds; None for no bound.

        Returns
        -------
        bool
            Whether all was written in that time.
        """
        with self._changed:
            left = self._turns()
            self._hurried += 1
            self._changed.notify_all()
            try:
                return self._changed.wait_for(lambda: not any(self._has(turn.job) for turn in left), timeout)
            finally:
                self._hurried -= 1

    def _turns(self) -> list[_Turn]:
        return [*([] if self._running is None else [self._running]), *self._waiting]

    def _has(self, job: Job) -> bool:
        return any(job is turn.job for turn in self._turns())

    def close(self, timeout: float | None = None) -> bool:
        """Write what waits, as far as the time allows, and end the thread.

        Parameters
        ----------
        timeout
            Seconds; None for no bound. A block that is being written is finished in any case.

        Returns
        -------
        bool
            Whether all was written.
        """
        done = self.flush(timeout)
        self._end()
        atexit.unregister(self._end)
        return done

    def _end(self) -> None:
        """Stop after the block that is being written."""
        with self._changed:
            self._stopping = True
            for turn in self._waiting:
                turn.job.dropped()
            self._waiting.clear()
            self._changed.notify_all()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(_LAST_BLOCK)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._running = None
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._waiting or self._stopping)
                if self._stopping:
                    return
                self._running = self._waiting.pop(0)
            try:
                self._running.job.write(self._pause)
            except Stopped:
                self._running.job.dropped()

    def _pause(self) -> None:
        """Wait while requests run, and end where the process ends."""
        began = self._clock()
        with self._changed:
            while not self._stopping and self._clock() - began < self._patience() and self._busy and self._busy():
                self._changed.wait(_ASK_AGAIN)
            if self._stopping:
                raise Stopped

    def _patience(self) -> float:
        """Return the seconds that a block waits for requests: none once half of the room is taken, or a job came long ago."""
        if self._hurried or not (turns := self._turns()):
            return 0.0
        taken = 2 * sum(turn.job.nbytes for turn in turns) / self._most
        waited = (self._clock() - min(turn.since for turn in turns)) / LONGEST_WAIT
        return MOST_PAUSE * max(0.0, 1 - max(taken, waited))
