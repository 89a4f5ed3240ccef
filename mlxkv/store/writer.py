"""The thread that writes what is to be stored, after the work that people wait for."""

from __future__ import annotations

import atexit
import threading
import time
from collections.abc import Callable
from typing import Protocol

WAITING_BYTES = 2**30  # of snapshots that wait; the oldest are dropped for new ones
MOST_PAUSE = 4.0  # seconds that a block waits while requests run
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


class Writer:
    """A thread that does one job after another.

    Parameters
    ----------
    busy
        Asked before each block: while it is true, writing waits, some seconds at most.
    most_bytes
        Bytes of jobs that may wait.
    """

    def __init__(self, busy: Callable[[], bool] | None = None, most_bytes: int = WAITING_BYTES) -> None:
        self._busy, self._most = busy, most_bytes
        self._waiting: list[Job] = []
        self._running: Job | None = None
        self._hurried = 0
        self._stopping = False
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    @property
    def waiting(self) -> tuple[int, int]:
        """Jobs that wait or run, and the bytes that they keep in memory."""
        with self._changed:
            jobs = [*self._waiting, *([] if self._running is None else [self._running])]
            return len(jobs), sum(job.nbytes for job in jobs)

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
            for other in self._waiting[:]:
                if (both := job.merged(other)) is not None:
                    self._waiting.remove(other)
                    job = both
            self._waiting.append(job)
            while len(self._waiting) > 1 and sum(each.nbytes for each in self._waiting) > self._most:
                self._waiting.pop(0).dropped()
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
            left = [*self._waiting, self._running]
            self._hurried += 1
            self._changed.notify_all()
            try:
                return self._changed.wait_for(lambda: not any(self._has(job) for job in left), timeout)
            finally:
                self._hurried -= 1

    def _has(self, job: Job | None) -> bool:
        return job is not None and (job is self._running or any(job is each for each in self._waiting))

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
            for job in self._waiting:
                job.dropped()
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
                self._running.write(self._pause)
            except Stopped:
                self._running.dropped()

    def _pause(self) -> None:
        """Wait while requests run, and end where the process ends."""
        until = time.monotonic() + MOST_PAUSE
        with self._changed:
            while not self._stopping and not self._hurried and time.monotonic() < until and self._busy and self._busy():
                self._changed.wait(_ASK_AGAIN)
            if self._stopping:
                raise Stopped
