"""Words for keys of needles and for lists: those of the package wonderwords, as in RULER.

Departure: a list of more words than there are has compounds of an adjective and a noun; RULER then draws from another,
larger list.
"""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from random import Random

from mlxkv.evaluate.optional import import_optional


def draw_keys(rng: Random, count: int) -> list[str]:
    """Draw pairs of an adjective and a noun, such as "hushed-lamp".

    Parameters
    ----------
    rng
        Random numbers.
    count
        Number of pairs.

    Returns
    -------
    list of str
        `count` different pairs.
    """
    return _pairs(rng, count, "-")


def draw_words(rng: Random, count: int) -> list[str]:
    """Draw nouns, adjectives and verbs, or compounds where there are not as many words.

    Parameters
    ----------
    rng
        Random numbers.
    count
        Number of words.

    Returns
    -------
    list of str
        `count` different words.
    """
    known = words("noun", "adjective", "verb")
    return rng.sample(known, count) if count <= len(known) else _pairs(rng, count, "")


@cache
def words(*kinds: str) -> tuple[str, ...]:
    """Return all words of some kinds; MlxkvError where the package wonderwords is missing.

    Parameters
    ----------
    *kinds
        "noun", "adjective" or "verb".

    Returns
    -------
    tuple of str
        Different words, sorted.
    """
    import_optional("wonderwords")
    lists = [files("wonderwords") / "assets" / f"{kind}list.txt" for kind in kinds]
    return tuple(sorted({word for path in lists for word in path.read_text("utf-8").splitlines() if word}))


def _pairs(rng: Random, count: int, joint: str) -> list[str]:
    """Draw different pairs of an adjective and a noun."""
    adjectives, nouns = words("adjective"), words("noun")
    drawn: dict[str, None] = {}  # two pairs can read alike
    while len(drawn) < count:
        drawn[rng.choice(adjectives) + joint + rng.choice(nouns)] = None
    return list(drawn)
