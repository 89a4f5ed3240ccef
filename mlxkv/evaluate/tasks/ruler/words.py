"""Counting words: the ten common words of a list (cwe), the three most frequent of a coded text (fwe).

https://arxiv.org/abs/2404.06654, section 3.3. Quoted from RULER, since they define the tasks: the instructions and the
questions. Common words: an example with its answer comes first, of other words than the list. Frequent words: as in RULER, six random letters a word,
the word of rank k written in proportion to 1 / k^2, and the first rank is three dots that do not count.
"""

from __future__ import annotations

import math
import string
from dataclasses import dataclass
from random import Random

from mlxkv.errors import InputError
from mlxkv.evaluate.tasks.ruler.task import Draft, Request, RulerTask
from mlxkv.evaluate.tasks.ruler.tracing import letter_words
from mlxkv.evaluate.tasks.ruler.vocabulary import listed

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
class Common(RulerTask):
    """Ten words stand 30 times in the list, the others 3 times; 6 times and once below 4096 tokens, as in RULER.

    Size: words besides the ten.
    """

    tokens: int = 120

    @property
    def asks(self) -> str:
        return _CWE_QUESTION.partition("?")[0]

    def draft(self, request: Request, size: int) -> Draft:
        rng = request.random()
        short = request.length < _SHORT
        shown, often, seldom = (10, 3, 1) if short else (30, 10, 3)
        words = listed(rng, _COMMON + shown + _COMMON + size)
        example, asked = words[: _COMMON + shown], words[_COMMON + shown :]
        before = (
            _CWE_BEFORE + word_list(rng, example, often, seldom) + f"\n{_CWE_QUESTION} " + numbered(example[:_COMMON])
        )
        text = word_list(rng, asked, *((6, 1) if short else (30, 3)))
        return Draft(f"{before}\n{_CWE_BEFORE}{text}\n", _CWE_QUESTION, tuple(asked[:_COMMON]))


def word_list(rng: Random, words: list[str], often: int, seldom: int) -> str:
    """The first ten words `often` times and the others `seldom` times, shuffled and numbered."""
    entries = words[:_COMMON] * often + words[_COMMON:] * seldom
    rng.shuffle(entries)
    return numbered(entries)


def numbered(words: list[str]) -> str:
    """ "1. a 2. b"."""
    return " ".join(f"{i}. {word}" for i, word in enumerate(words, 1))


@dataclass(frozen=True, kw_only=True)
class Frequent(RulerTask):
    """Coded words, one for every 50 tokens of the input. Size: words that are written, before counts are cut to integers."""

    tokens: int = 50

    @property
    def smallest(self) -> int:
        # From here on the third word stands more often than the fourth.
        return 53

    @property
    def asks(self) -> str:
        return _FWE_ASKS

    def draft(self, request: Request, size: int) -> Draft:
        rng = request.random()
        ranks = (request.length - self.tokens) // 50
        if ranks <= _ASKED:
            raise InputError(
                f"fwe needs a length of {self.tokens + 50 * (_ASKED + 1)} tokens or more, not {request.length}"
            )
        words = ["...", *letter_words(rng, ranks - 1, 6, string.ascii_lowercase)]
        written = [word for k, word in enumerate(words, 1) for _ in range(int(size / (_ZETA * k**2)))]
        rng.shuffle(written)
        return Draft(_FWE_BEFORE + " ".join(written) + "\n", _FWE_QUESTION, tuple(words[1 : 1 + _ASKED]))
