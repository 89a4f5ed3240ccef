"""Seconds, memory and disk of a calibration, estimated from sizes and from how fast this machine is."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mlxkv.calibration.work import stretch_bytes
from mlxkv.codec.methods.kvtc_rd import QuickKVTCRD
from mlxkv.spec import STREAMS, CacheSpec

MAX_ROWS_BYTES = 2 * 10**9  # of the float32 rows of one stream, which training holds a few times
USEFUL_TOKENS = 4_096  # from fewer, artifacts are of little use: they are run whatever the budget
_COPIES = 3  # of the rows, at the peak of training
_PROBE_SIDE = 1_024  # of the matrices whose product tells a machine's speed
_QUALITY_SECONDS = 0.9  # of a held-out text at one quality, in units of a stretch's
_OVERHEAD = 1.4  # times the arithmetic that is counted


class Plan(NamedTuple):
    """Seconds, memory and disk that a calibration needs, as far as they are known.

    Attributes
    ----------
    stretches, tokens
        To learn from.
    seconds
        From the beginning to the end.
    memory_bytes
        Beside the model's weights, at most.
    disk_bytes
        Of the private folder, until the artifacts are saved.
    """

    stretches: int
    tokens: int
    seconds: float
    memory_bytes: int
    disk_bytes: int


def machine_flops(clock: Callable[[], float] = time.perf_counter) -> float:
    """Measure how many floating-point operations a second a product of two matrices makes.

    Parameters
    ----------
    clock
        Returns seconds.

    Returns
    -------
    float
        Above 0.
    """
    matrix = np.ones((_PROBE_SIDE, _PROBE_SIDE), np.float32)
    best = float("inf")
    for _ in range(3):
        start = clock()
        matrix @ matrix  # for its time alone
        best = min(best, clock() - start)
    return 2 * _PROBE_SIDE**3 / max(best, 1e-6)


def most_stretches(spec: CacheSpec, lengths: Sequence[int]) -> int:
    """Return how many stretches training can hold in memory.

    Parameters
    ----------
    spec
        Description of the model's cache.
    lengths
        Tokens of each stretch.

    Returns
    -------
    int
        One at least.
    """
    room = MAX_ROWS_BYTES // (4 * _width(spec))
    return max(1, int(np.searchsorted(np.cumsum(lengths), room, side="right")))


def memory_bytes(spec: CacheSpec, tokens: int) -> int:
    """Estimate the most memory that training takes.

    Parameters
    ----------
    spec
        Description of the model's cache.
    tokens
        To learn from.

    Returns
    -------
    int
        Bytes: a few copies of the rows of one stream, and the matrices of its components.
    """
    width = _width(spec)
    return 4 * width * (_COPIES * tokens + 3 * min(width, tokens // 3, QuickKVTCRD.most_components or width))


def disk_bytes(spec: CacheSpec, lengths: Sequence[int]) -> int:
    """Estimate the bytes of finished stretches on disk.

    Parameters
    ----------
    spec
        Description of the model's cache.
    lengths
        Tokens of each stretch.

    Returns
    -------
    int
        Bytes.
    """
    return sum(stretch_bytes(spec, tokens) for tokens in lengths)


def free_memory() -> int | None:
    """Return how much memory other programs leave, as far as the system tells.

    Returns
    -------
    int or None
        Bytes that can be had without swapping; None where that is not known.
    """
    try:
        if sys.platform == "darwin":
            return _free_on_mac(subprocess.run(["/usr/bin/vm_stat"], capture_output=True, text=True, timeout=5).stdout)
        found = re.search(r"^MemAvailable:\s+(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE)
    except (OSError, subprocess.SubprocessError):
        return None
    return 1024 * int(found[1]) if found else None


def _free_on_mac(said: str) -> int | None:
    """Return the bytes of pages that `vm_stat` says are free, or can be made so at once."""
    size = re.search(r"page size of (\d+) bytes", said)
    pages = re.findall(r"^Pages (?:free|inactive|speculative|purgeable):\s+(\d+)\.$", said, re.MULTILINE)
    return int(size[1]) * sum(map(int, pages)) if size and pages else None


def training_seconds(spec: CacheSpec, tokens: int, flops: float) -> float:
    """Estimate how long training takes.

    Parameters
    ----------
    spec
        Description of the model's cache.
    tokens
        To learn from.
    flops
        As `machine_flops` measures them.

    Returns
    -------
    float
        Seconds.
    """
    work = 0.0
    for group in spec.groups:
        for name in STREAMS:
            width, heads = group.stream(name).width, group.stream(name).layers * group.stream(name).heads
            dim = group.stream(name).dim
            rank = max(1, min(width, tokens // 3, QuickKVTCRD.most_components or width))
            passes = min(12 * rank, width) if tokens > width else 10 * rank
            components = tokens * width * (passes + 6 * rank + 4 * dim) + 60 * width * rank**2 + 25 * rank**3
            tables = 12 * 512 * 16 * rank * width
            attention = 300 * heads * min(tokens, 50 * dim) * dim**2
            work += components + tables + attention
    return _OVERHEAD * work / flops


@dataclass
class Budget:
    """Time that is left, by a clock.

    Parameters
    ----------
    seconds
        For everything.
    clock
        Returns seconds.
    started
        When everything began, by that clock.
    """

    seconds: float
    clock: Callable[[], float]
    started: float

    @property
    def elapsed(self) -> float:
        """Seconds since everything began."""
        return self.clock() - self.started

    def allows(self, seconds: float) -> bool:
        """Return whether there is so much time left.

        Parameters
        ----------
        seconds
            Of work to come.

        Returns
        -------
        bool
            False where it would end too late.
        """
        return self.elapsed + seconds <= self.seconds


def measuring_seconds(texts: int, qualities: int, stretch_seconds: float) -> float:
    """Estimate how long measuring on held-out texts takes.

    Parameters
    ----------
    texts
        Number of held-out texts.
    qualities
        Number of qualities that each is coded at.
    stretch_seconds
        Time that a stretch took.

    Returns
    -------
    float
        Seconds.
    """
    return texts * stretch_seconds * (0.6 + _QUALITY_SECONDS * qualities)


def _width(spec: CacheSpec) -> int:
    """Return the width of the widest stream's rows."""
    return max(group.stream(name).width for group in spec.groups for name in STREAMS)
