"""Scores of a generated answer against an expected one, as in LongBench: github.com/THUDM/LongBench, metrics.py.

Words are separated by white space, Chinese ones by jieba. The packages are those that LongBench scores with, since
another ROUGE and another segmentation give other numbers than the published ones.
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
from tempfile import TemporaryDirectory
from typing import Any

from mlxkv.evaluate.optional import import_optional

PARAGRAPH = re.compile(r"(?:Paragraph |段落)(\d+)")
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
# ASCII's, the full-width forms but for the full stop, and the marks of Chinese text that LongBench lists.
_MARKS = re.compile(
    f"[{re.escape(string.punctuation)}\uff01-\uff0d\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff64"
    "\u3001-\u3003\u300b-\u3011\u3014-\u301f\u3030\u303e\u303f"
    "\u2013\u2014\u2018\u2019\u201b-\u201f\u2026\u2027\ufe4f]"
)


def f1(answer: str, expected: str) -> float:
    """Return the F1 score of the words in common, without case, ASCII punctuation and the articles a, an and the.

    Parameters
    ----------
    answer
        Text that the model generated.
    expected
        Reference answer.

    Returns
    -------
    float
        0 to 1; LongBench's `qa_f1_score`.

    Examples
    --------
    >>> f1("The cat, a dog!", "cat and dog")
    0.8
    """
    return _f1(_plain_words(answer), _plain_words(expected))


def f1_zh(answer: str, expected: str) -> float:
    """Return the F1 score of the words in common of two Chinese texts, without case, punctuation and white space.

    Parameters
    ----------
    answer
        Text that the model generated.
    expected
        Reference answer.

    Returns
    -------
    float
        0 to 1; LongBench's `qa_f1_zh_score`.
    """
    return _f1(*([word for word in map(_plain_zh, _words_zh(text)) if word] for text in (answer, expected)))


def rouge(answer: str, expected: str) -> float:
    """Return the F1 score of ROUGE-L as the package rouge has it: of sentences, each word counted once.

    Parameters
    ----------
    answer
        Text that the model generated; sentences end at full stops.
    expected
        Reference answer.

    Returns
    -------
    float
        0 to 1; LongBench's `rouge_score`. As there, 0 where the package fails: for an empty answer, and for a sentence
        that is too long for its recursion, which happens at about 900 words of both texts together.
    """
    scorer = import_optional("rouge").Rouge(metrics=["rouge-l"])
    try:
        return scorer.get_scores(answer, expected)[0]["rouge-l"]["f"]
    except (ValueError, RecursionError):
        return 0.0


def rouge_zh(answer: str, expected: str) -> float:
    """Return `rouge` of two Chinese texts, split into words.

    Parameters
    ----------
    answer
        Text that the model generated.
    expected
        Reference answer.

    Returns
    -------
    float
        0 to 1; LongBench's `rouge_zh_score`.
    """
    return rouge(" ".join(_words_zh(answer)), " ".join(_words_zh(expected)))


def classification(answer: str, expected: str, classes: Sequence[str]) -> float:
    """Return 1 divided by the number of classes that an answer names, or 0 where it does not name the expected one.

    Parameters
    ----------
    answer
        Text that the model generated.
    expected
        Name of the right class.
    classes
        Names of all classes.

    Returns
    -------
    float
        0 to 1; LongBench's `classification_score`.

    Notes
    -----
    Departure: every class whose name is a part of the expected one is left out; LongBench's loop removes items from the
    list that it iterates over, and so misses some where there are several.

    Examples
    --------
    >>> classification("date or place", "date", ["date", "place", "person"])
    0.5
    """
    named = [name for name in classes if name in answer and (name == expected or name not in expected)]
    return 1 / len(named) if expected in named else 0.0


def count(answer: str, expected: str) -> float:
    """Return the share of the expected number among all numbers in an answer.

    Parameters
    ----------
    answer
        Text that the model generated.
    expected
        The number in decimal digits.

    Returns
    -------
    float
        0 to 1, 0 without any number; LongBench's `count_score`.

    Examples
    --------
    >>> count("There are 12, not 7.", "12")
    0.5
    """
    numbers = re.findall(r"\d+", answer)
    return numbers.count(expected) / len(numbers) if numbers else 0.0


def retrieval(answer: str, expected: str) -> float:
    """Return the share of a paragraph's number among all numbers in an answer.

    Parameters
    ----------
    answer
        Text that the model generated.
    expected
        The right paragraph, such as "Paragraph 3", or that in Chinese.

    Returns
    -------
    float
        0 to 1; LongBench's `retrieval_score` and `retrieval_zh_score`.

    Examples
    --------
    >>> retrieval("Paragraph 3 (of 30)", "Paragraph 3")
    0.5
    """
    paragraph = PARAGRAPH.search(expected)
    return count(answer, paragraph[1]) if paragraph else 0.0


def code_similarity(answer: str, expected: str) -> float:
    """Return the ratio of matching characters of the first line that is neither a comment nor markup.

    Parameters
    ----------
    answer
        Text that the model generated.
    expected
        The right line of code.

    Returns
    -------
    float
        0 to 1 in steps of 0.01; LongBench's `code_sim_score`.

    Notes
    -----
    LongBench calls fuzzywuzzy, which calls the same function of the standard library unless python-Levenshtein is
    installed too.

    Examples
    --------
    >>> code_similarity("x = 1", "x = 2")
    0.8
    """
    lines = answer.lstrip("\n").split("\n")
    line = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
    return round(100 * SequenceMatcher(None, line, expected).ratio()) / 100


def _plain_words(text: str) -> list[str]:
    """Return lower-case words without punctuation and articles."""
    bare = text.lower().translate(str.maketrans("", "", string.punctuation))
    return _ARTICLES.sub(" ", bare).split()


def _plain_zh(word: str) -> str:
    """Return a Chinese word without punctuation, white space and case."""
    return "".join(_MARKS.sub("", word.lower()).split())


def _f1(answer: Sequence[str], expected: Sequence[str]) -> float:
    """Return the F1 score of two bags of words."""
    same = sum((Counter(answer) & Counter(expected)).values())
    return 2 * same / (len(answer) + len(expected)) if same else 0.0


def _words_zh(text: str) -> list[str]:
    """Split a Chinese text into words."""
    return _segmenter().lcut(text)


@cache
def _segmenter() -> Any:
    """Return jieba's tokenizer with its own dictionary."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # jieba's own, about setuptools and escapes in its source
        jieba = import_optional("jieba")
    jieba.setLogLevel(logging.WARNING)
    segmenter = jieba.Tokenizer()
    # jieba unmarshals whatever it finds under a fixed name in the machine's temporary folder.
    with TemporaryDirectory() as folder:
        segmenter.tmp_dir = folder
        segmenter.initialize()
    return segmenter
