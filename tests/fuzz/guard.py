"""What a reader may cost: seconds, and memory beyond what the process had."""

import resource
import signal
import sys
import time
import warnings
from contextlib import contextmanager

import mlx.core as mx

from mlxkv.errors import MlxkvError

SECONDS = 10.0
BYTES = 256 * 2**20  # of growth: the formats' own limit for small files is what they decode to, at most as much


class TooLong(BaseException):
    """Raised by the alarm in a reader that does not end."""


def peak():
    """Most bytes that the process ever had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@contextmanager
def alarm(seconds):
    """Raise TooLong in what takes longer."""

    def ring(*_):
        raise TooLong(f"it takes more than {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def outcome(read):
    """What a call of `read` came to: "read", or the name of the typed error; with its seconds and growth in bytes.

    Any other exception, TooLong included, goes through.
    """
    start, before = time.perf_counter(), peak()
    with alarm(SECONDS), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of NumPy, on odd array files
        try:
            read()
            found = "read"
        except MlxkvError as error:
            found = type(error).__name__
            if len(str(error)) > 20_000:
                raise AssertionError(f"a message of {len(str(error))} characters") from error
    mx.clear_cache()
    return found, time.perf_counter() - start, peak() - before
