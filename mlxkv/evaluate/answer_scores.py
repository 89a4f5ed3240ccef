"""Scores of an answer against an expected one, from 0 to 1, as LongBench defines them: github.com/THUDM/LongBench.

Words are what is between white space, for Chinese what jieba makes of the text. The libraries are those that LongBench
scores with, since others' ROUGE and other segmentation give other numbers than the published ones.
Departure: `classification` leaves out every class whose name is a part of the expected one; LongBench's loop steps
over some where there are several.
"""

from __future__ import annotations

import logging
import re
import string
import warnings
from collections import Counter
from collections.abc import Sequence
from difflib import SequenceMatcher
from functools import cache
from importlib import import_module
from tempfile import TemporaryDirectory
from typing import Any

from mlxkv.errors import MlxkvError

PARAGRAPH = re.compile(r"(?:Paragraph |段落)(\d+)")
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
# ASCII's, the full-width forms but for the full stop, and the marks of Chinese text that LongBench lists.
_MARKS = re.compile(
    f"[{re.escape(string.punctuation)}\uff01-\uff0d\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff64"
    "\u3001-\u3003\u300b-\u3011\u3014-\u301f\u3030\u303e\u303f"
    "\u2013\u2014\u2018\u2019\u201b-\u201f\u2026\u2027\ufe4f]"
)


def library(name: str) -> Any:
    """A module of a package that is installed with the extra `eval`. Raises MlxkvError where it is missing."""
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        raise MlxkvError(f"no module {error.name}; install what evaluations need: pip install 'mlxkv[eval]'") from None


def f1(said: str, expected: str) -> float:
    """F1 of the words in common, without case, ASCII punctuation and the articles a, an and the."""
    return _f1(_plain_words(said), _plain_words(expected))


def f1_zh(said: str, expected: str) -> float:
    """F1 of the words in common of two Chinese texts, without case, punctuation and white space."""
    return _f1(*([word for word in map(_plain_zh, _words_zh(text)) if word] for text in (said, expected)))


def rouge(said: str, expected: str) -> float:
    """F1 of ROUGE-L as the package rouge has it: of sentences, which end at a full stop, each word counted once.

    0 where the package gives up, as in LongBench: nothing is said, or a sentence is too long for its recursion,
    which happens at about 900 words of both texts together.
    """
    scorer = library("rouge").Rouge(metrics=["rouge-l"])
    try:
        return scorer.get_scores(said, expected)[0]["rouge-l"]["f"]
    except (ValueError, RecursionError):
        return 0.0


def rouge_zh(said: str, expected: str) -> float:
    """`rouge` of Chinese words."""
    return rouge(" ".join(_words_zh(said)), " ".join(_words_zh(expected)))


def classification(said: str, expected: str, classes: Sequence[str]) -> float:
    """One over how many classes are named, if the expected one is among them; names inside its name do not count."""
    named = [name for name in classes if name in said and (name == expected or name not in expected)]
    return 1 / len(named) if expected in named else 0.0


def count(said: str, expected: str) -> float:
    """The share of the expected number among all numbers said."""
    numbers = re.findall(r"\d+", said)
    return numbers.count(expected) / len(numbers) if numbers else 0.0


def retrieval(said: str, expected: str) -> float:
    """The share of the paragraph's number among all numbers said. Expected is "Paragraph 3", or that in Chinese."""
    paragraph = PARAGRAPH.search(expected)
    return count(said, paragraph[1]) if paragraph else 0.0


def code_similarity(said: str, expected: str) -> float:
    """Ratio of matching characters, in whole per cent, of the first line that is neither a comment nor markup.

    LongBench calls fuzzywuzzy, which calls the same standard library unless python-Levenshtein is installed too.
    """
    lines = said.lstrip("\n").split("\n")
    line = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
    return round(100 * SequenceMatcher(None, line, expected).ratio()) / 100


def _plain_words(text: str) -> list[str]:
    bare = text.lower().translate(str.maketrans("", "", string.punctuation))
    return _ARTICLES.sub(" ", bare).split()


def _plain_zh(word: str) -> str:
    return "".join(_MARKS.sub("", word.lower()).split())


def _f1(said: Sequence[str], expected: Sequence[str]) -> float:
    same = sum((Counter(said) & Counter(expected)).values())
    return 2 * same / (len(said) + len(expected)) if same else 0.0


def _words_zh(text: str) -> list[str]:
    return _segmenter().lcut(text)


@cache
def _segmenter() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # jieba's own, about setuptools and escapes in its source
        jieba = library("jieba")
    jieba.setLogLevel(logging.WARNING)
    segmenter = jieba.Tokenizer()
    # jieba unmarshals whatever it finds under a fixed name in the machine's temporary folder.
    with TemporaryDirectory() as folder:
        segmenter.tmp_dir = folder
        segmenter.initialize()
    return segmenter
