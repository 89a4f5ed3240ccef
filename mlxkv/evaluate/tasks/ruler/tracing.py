"""Variable tracking: a chain of assignments hidden in noise, and a question for the variables that have one value.

https://arxiv.org/abs/2404.06654, section 3.2. Quoted from RULER, since they define the task: the instruction, the
question with its last blank, the form of an assignment, and the noise. An example with its answer comes first.
Departure: the example has a fixed number of paragraphs; RULER fits it to 500 tokens of the tokenizer, about as many.
"""

from __future__ import annotations

import string
from dataclasses import dataclass
from itertools import pairwise
from random import Random

from mlxkv.evaluate.tasks.ruler.niah import NOISE, insert_between_lines
from mlxkv.evaluate.tasks.ruler.task import Draft, Request, RulerTask

_BEFORE = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
_ASKS = "Question: Find all variables that are assigned the value"
_QUESTION = (
    _ASKS + " {value} in the text above. Answer: According to the chain(s) of variable assignment in the text above,"
    " {count} variables are assigned the value {value}, they are: "
)
_EXAMPLE_NOISE = 14


@dataclass(frozen=True, kw_only=True)
class VariableTracking(RulerTask):
    """A chain of assignments in noise, of which sizes count paragraphs.

    Parameters
    ----------
    hops
        Assignments after the first; the answers are `hops` + 1 variables.
    max_tokens, source
        As in `RulerTask`.
    """

    hops: int = 4
    max_tokens: int = 30

    @property
    def min_size(self) -> int:
        """Number of assignments."""
        return self.hops + 1

    @property
    def question_start(self) -> str:
        """The question up to the value."""
        return _ASKS

    def draft(self, request: Request, size: int) -> Draft:
        """Hide a chain, after an example with its answer."""
        rng = request.random()
        values = rng.sample(range(10_000, 100_000), 2)
        example = self._chain(rng, _EXAMPLE_NOISE, values[0], letters=3)
        asked = self._chain(rng, size, values[1], letters=5)
        # After the question's last blank comes another one, as in RULER: so the answer begins with the token that the
        # model is to go on with.
        shown = example.context + example.question + " " + " ".join(example.answers) + "\n\n"
        return Draft(shown + asked.context, asked.question, asked.answers)

    def _chain(self, rng: Random, size: int, value: int, letters: int) -> Draft:
        """Return one chain in noise, with names of so many letters."""
        names = random_words(rng, self.hops + 1, letters, string.ascii_uppercase)
        lines = [f"VAR {names[0]} = {value}", *(f"VAR {b} = VAR {a} " for a, b in pairwise(names))]
        text = "\n".join(insert_between_lines(rng, [NOISE] * size, lines))
        return Draft(_BEFORE + text + "\n", _QUESTION.format(value=value, count=len(names)), tuple(names))


def random_words(rng: Random, count: int, letters: int, alphabet: str) -> list[str]:
    """Draw strings of random letters.

    Parameters
    ----------
    rng
        Random numbers.
    count
        Number of strings.
    letters
        Letters in each.
    alphabet
        Letters to draw from.

    Returns
    -------
    list of str
        `count` different strings.
    """
    words: dict[str, None] = {}
    while len(words) < count:
        words["".join(rng.choices(alphabet, k=letters))] = None
    return list(words)
