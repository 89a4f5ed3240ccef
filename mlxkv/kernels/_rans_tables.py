"""Frequency tables of rans.py: made from histograms, and rearranged for look-up in coding and decoding."""

from __future__ import annotations

import numpy as np

from mlxkv.errors import InputError

SCALE_BITS = 12  # of a frequency
TOTAL = 1 << SCALE_BITS  # every table's sum


def frequencies(counts: np.ndarray) -> np.ndarray:
    """Return tables that sum to 4,096 from histograms; each symbol that occurs gets at least 1.

    Parameters
    ----------
    counts
        `[K, 256]`, how often each symbol occurs; whole numbers from 0 on, rows that sum to at most 2**40.

    Returns
    -------
    np.ndarray
        uint16 `[K, 256]`. An empty histogram gives all to symbol 0.

    Raises
    ------
    InputError
        For another shape, negative counts or a sum above 2**40.

    Notes
    -----
    Sainte-Lague apportionment, which minimises the code length up to the step from log(1 + 1/f) to 1 / (f + 1/2). It
    works with integers, and ties go to the lower symbol: equal counts give equal tables everywhere.

    Examples
    --------
    >>> frequencies(np.bincount([0, 0, 0, 7], minlength=256)[None])[0, [0, 7]].tolist()
    [3072, 1024]
    """
    wide = np.asarray(counts).astype(np.int64)
    if wide.ndim != 2 or wide.shape[1] != 256 or wide.min(initial=0) < 0 or wide.max(initial=0) > 2**40:
        raise InputError(f"histograms are [K, 256] counts from 0 to 2**40, not {wide.shape}")
    wide[wide.sum(1) == 0, 0] = 1
    total = wide.sum(1, keepdims=True)
    if total.max(initial=0) > 2**40:
        raise InputError("a histogram may count at most 2**40 symbols")
    table = np.maximum((wide * TOTAL + total // 2) // total, wide > 0)
    while (off := TOTAL - table.sum(1)).any():
        short, long = np.flatnonzero(off > 0), np.flatnonzero(off < 0)
        gain = (wide[short] << 20) // (2 * table[short] + 1)
        table[short, gain.argmax(1)] += 1
        loss = np.where(table[long] > 1, (wide[long] << 20) // (2 * table[long] - 1), np.iinfo(np.int64).max)
        table[long, loss.argmin(1)] -= 1
    return table.astype(np.uint16)


def encode_table(tables: np.ndarray) -> np.ndarray:
    """Return the look-up table of encoding, by symbol.

    Parameters
    ----------
    tables
        uint16 `[K, 256]`, each of which sums to 4,096.

    Returns
    -------
    np.ndarray
        uint32 `[K * 256]`: the frequencies before a symbol's in the high half, its own in the low half.
    """
    wide = tables.astype(np.uint32)
    return (((wide.cumsum(1, dtype=np.uint32) - wide) << 16) | wide).ravel()


def decode_table(tables: np.ndarray) -> np.ndarray:
    """Return the look-up table of decoding, by each of a table's 4,096 slots.

    Parameters
    ----------
    tables
        uint16 `[K, 256]`, each of which sums to 4,096.

    Returns
    -------
    np.ndarray
        uint32 `[K * 4096]`: symbol (8 bits), frequency - 1 (12 bits), the slot's place in its symbol (12 bits).
    """
    wide = tables.astype(np.uint32)
    entries = np.tile(np.arange(256, dtype=np.uint32), len(wide)) << 24 | ((wide - 1) << SCALE_BITS).ravel()
    firsts = np.repeat((wide.cumsum(1, dtype=np.uint32) - wide).ravel(), wide.ravel())
    slots = np.tile(np.arange(TOTAL, dtype=np.uint32), len(wide))
    return np.repeat(entries, wide.ravel()) | (slots - firsts)
