"""Numbers as Markdown, for `section` of every experiment."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table; the first column is text, the others are numbers and stand right."""
    align = "|".join(["---", *["---:"] * (len(heads) - 1)])
    return "\n".join([f"| {' | '.join(heads)} |", f"|{align}|", *(f"| {' | '.join(row)} |" for row in rows)])


def interval(low: float, high: float) -> str:
    """Return an interval with two significant digits."""
    return f"{low:.2g} to {high:.2g}"


def percent(share: float) -> str:
    """Return a share in percent."""
    return f"{100 * share:.1f} %"


def megabytes(size: float) -> str:
    """Return bytes in millions."""
    return f"{size / 1e6:.1f} MB"
