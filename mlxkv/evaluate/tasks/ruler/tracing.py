"""Variable tracking: a chain of assignments hidden in noise; which variables have the first one's value?

https://arxiv.org/abs/2404.06654, section 3.2. Quoted from RULER, since they define the task: the instruction, the
question with its last blank, the form of an assignment, and the noise. An example with its answer comes first.
Departure: the example has a fixed number of paragraphs; RULER fits it to 500 tokens of the tokenizer, about as many.
"""

from __future__ import annotations

import string
from dataclasses import dataclass
from itertools import pairwise
from random import Random

from mlxkv.evaluate.tasks.ruler.niah import NOISE, among
from mlxkv.evaluate.tasks.ruler.task import Draft, Request, RulerTask

_BEFORE = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
_ASKS = "Question: Find all variables that are assigned the value"
_QUESTION = (
    _ASKS + " {value} in the text above. Answer: According to the chain(s) of variable assignment in the text above,"
    " {count} variables are assigned the value {value}, they are: "
)
_EXAMPLE_NOISE = 14


@dataclass(frozen=True, kw_only=True)
class Tracing(RulerTask):
    """hops: assignments after the first; `hops` + 1 variables are asked for. Size: paragraphs of noise."""

    hops: int = 4
    tokens: int = 30

    @property
    def smallest(self) -> int:
        return self.hops + 1

    @property
    def asks(self) -> str:
        return _ASKS

    def draft(self, request: Request, size: int) -> Draft:
        rng = request.random()
        values = rng.sample(range(10_000, 100_000), 2)
        example = self._chain(rng, _EXAMPLE_NOISE, values[0], letters=3)
        asked = self._chain(rng, size, values[1], letters=5)
        # After the question's last blank comes another one, as in RULER: so the answer begins with the token that the
        # model is to go on with.
        shown = example.context + example.question + " " + " ".join(example.answers) + "\n\n"
        return Draft(shown + asked.context, asked.question, asked.answers)

    def _chain(self, rng: Random, size: int, value: int, letters: int) -> Draft:
        names = letter_words(rng, self.hops + 1, letters, string.ascii_uppercase)
        lines = [f"VAR {names[0]} = {value}", *(f"VAR {b} = VAR {a} " for a, b in pairwise(names))]
        text = "\n".join(among(rng, [NOISE] * size, lines))
        return Draft(_BEFORE + text + "\n", _QUESTION.format(value=value, count=len(names)), tuple(names))


def letter_words(rng: Random, count: int, letters: int, alphabet: str) -> list[str]:
    """`count` different strings of `letters` random letters."""
    words: dict[str, None] = {}
    while len(words) < count:
        words["".join(rng.choices(alphabet, k=letters))] = None
    return list(words)
