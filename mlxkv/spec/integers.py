"""Integers from untrusted places: JSON and TOML have booleans and fractions where a count is meant."""

from __future__ import annotations


def is_int(value: object, least: int = 0) -> bool:
    """Return whether a value read from somewhere is an int, and not a bool, of at least `least`.

    Parameters
    ----------
    value
        Anything.
    least
        The smallest number allowed.

    Returns
    -------
    bool
        True for such a number.

    Examples
    --------
    >>> is_int(3), is_int(True), is_int(3.0), is_int(0, least=1)
    (True, False, False, False)
    """
    return type(value) is int and value >= least
