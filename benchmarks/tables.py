"""Numbers as Markdown, for `section` of every benchmark."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; the first column is text, the others are numbers and stand right."""
    align = "|".join(["---", *["---:"] * (len(heads) - 1)])
    return "\n".join([f"| {' | '.join(heads)} |", f"|{align}|", *(f"| {' | '.join(row)} |" for row in rows)])


def interval(low: float, high: float) -> str:
    """An interval with two significant digits."""
    return f"{low:.2g} to {high:.2g}"


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def megabytes(size: float) -> str:
    return f"{size / 1e6:.1f} MB"
