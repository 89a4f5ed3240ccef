"""Counting words: the ten common words of a list (cwe), the three most frequent of a coded text (fwe).

https://arxiv.org/abs/2404.06654, section 3.3. Quoted from RULER, since they define the tasks: the instructions and the
questions. Common words: an example with its answer comes first, of other words than the list. Frequent words: as in
RULER, words of six random letters, the word of rank k written in proportion to 1 / k^2, and the first rank is three
dots that do not count.
"""

from __future__ import annotations

import math
import string
from dataclasses import dataclass
from random import Random

from mlxkv.errors import InputError
from mlxkv.evaluate.tasks.ruler.task import Draft, Request, RulerTask
from mlxkv.evaluate.tasks.ruler.tracing import random_words
from mlxkv.evaluate.tasks.ruler.vocabulary import draw_words

_CWE_BEFORE = (
    "Below is a numbered list of words. In these words, some appear more often than others."
    " Memorize the ones that appear most often.\n"
)
_CWE_QUESTION = (
    "Question: What are the 10 most common words in the above list?"
    " Answer: The top 10 words that appear most often in the list are:"
)
_COMMON = 10
_SHORT = 4096  # below this length RULER writes each word less often

_FWE_BEFORE = (
    "Read the following coded text and track the frequency of each coded word."
    " Find the three most frequently appeared coded words. "
)
_FWE_ASKS = "Question: Do not provide any explanation."
_FWE_QUESTION = (
    _FWE_ASKS + " Please ignore the dots '....'. What are the three most frequently appeared words in the above coded"
    " text? Answer: According to the coded text above, the three most frequently appeared words are:"
)
_ASKED = 3
_ZETA = math.pi**2 / 6  # the sum of all 1 / k^2


@dataclass(frozen=True, kw_only=True)
class CommonWords(RulerTask):
    """A list in which ten words stand 30 times and the others, which sizes count, 3 times.

    Below 4096 tokens ten words stand 6 times and the others once, as in RULER.

    Parameters
    ----------
    max_tokens, source
        As in `RulerTask`.
    """

    max_tokens: int = 120

    @property
    def question_start(self) -> str:
        """The question up to its question mark."""
        return _CWE_QUESTION.partition("?")[0]

    def draft(self, request: Request, size: int) -> Draft:
        """Make a list, after an example with its answer."""
        rng = request.random()
        short = request.length < _SHORT
        others, often, seldom = (10, 3, 1) if short else (30, 10, 3)
        words = draw_words(rng, _COMMON + others + _COMMON + size)
        example, asked = words[: _COMMON + others], words[_COMMON + others :]
        before = (
            _CWE_BEFORE
            + word_list(rng, example, often, seldom)
            + f"\n{_CWE_QUESTION} "
            + numbered_list(example[:_COMMON])
        )
        text = word_list(rng, asked, *((6, 1) if short else (30, 3)))
        return Draft(f"{before}\n{_CWE_BEFORE}{text}\n", _CWE_QUESTION, tuple(asked[:_COMMON]))


def word_list(rng: Random, words: list[str], often: int, seldom: int) -> str:
    """Repeat words, shuffle them and number the list.

    Parameters
    ----------
    rng
        Random numbers.
    words
        Different words, more than ten.
    often
        How many times each of the first ten words stands in the list.
    seldom
        How many times each other word does.

    Returns
    -------
    str
        The numbered list.
    """
    entries = words[:_COMMON] * often + words[_COMMON:] * seldom
    rng.shuffle(entries)
    return numbered_list(entries)


def numbered_list(words: list[str]) -> str:
    """Join words to a numbered list.

    Parameters
    ----------
    words
        The words.

    Returns
    -------
    str
        One line.

    Examples
    --------
    >>> numbered_list(["a", "b"])
    '1. a 2. b'
    """
    return " ".join(f"{i}. {word}" for i, word in enumerate(words, 1))


@dataclass(frozen=True, kw_only=True)
class FrequentWords(RulerTask):
    """A text of coded words, one for every 50 tokens of its length; sizes count written words, before rounding down.

    Parameters
    ----------
    max_tokens, source
        As in `RulerTask`.
    """

    max_tokens: int = 50

    @property
    def min_size(self) -> int:
        """The size from which on the third word stands more often than the fourth."""
        return 53

    @property
    def question_start(self) -> str:
        """The question's first sentence."""
        return _FWE_ASKS

    def draft(self, request: Request, size: int) -> Draft:
        """Write words as often as their ranks say."""
        rng = request.random()
        ranks = (request.length - self.max_tokens) // 50
        if ranks <= _ASKED:
            raise InputError(
                f"fwe needs a length of {self.max_tokens + 50 * (_ASKED + 1)} tokens or more, not {request.length}"
            )
        words = ["...", *random_words(rng, ranks - 1, 6, string.ascii_lowercase)]
        written = [word for k, word in enumerate(words, 1) for _ in range(int(size / (_ZETA * k**2)))]
        rng.shuffle(written)
        return Draft(_FWE_BEFORE + " ".join(written) + "\n", _FWE_QUESTION, tuple(words[1 : 1 + _ASKED]))
