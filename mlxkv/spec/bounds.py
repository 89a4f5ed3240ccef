"""Bounds on what a description may say, since files of any source hold one; they are far above those of any model."""

from __future__ import annotations

from typing import Any

MAX_LAYERS, MAX_HEADS, MAX_DIM, MAX_WINDOW = 4096, 2**14, 2**14, 2**30


def is_int(value: object, least: int = 0, most: int | None = None) -> bool:
    """Check whether a value is an int, and not a bool, in a range.

    Parameters
    ----------
    value
        Anything.
    least
        The smallest number allowed.
    most
        The largest number allowed; None for no bound.

    Returns
    -------
    bool
        True for such a number.

    Examples
    --------
    >>> is_int(3), is_int(True), is_int(3.0), is_int(0, least=1), is_int(9, most=8)
    (True, False, False, False, False)
    """
    return type(value) is int and value >= least and (most is None or value <= most)


def check_text(value: Any) -> str:
    """Check that a value read from a file is text and return it.

    Parameters
    ----------
    value
        Anything.

    Returns
    -------
    str
        The same value.

    Raises
    ------
    TypeError
        For anything else.
    """
    if not isinstance(value, str):
        raise TypeError(f"expected text, got {type(value).__name__}")
    return value
