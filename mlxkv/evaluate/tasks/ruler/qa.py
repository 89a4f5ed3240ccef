"""Questions about one of many documents: SQuAD (qa_1) and HotpotQA (qa_2) among distracting documents.

https://arxiv.org/abs/2404.06654, section 3.4. Quoted from RULER, since they define the task: the instruction, the
question and the headings of documents. Departures: questions are drawn in an order that depends on the seed, RULER's
are those of the file in turn; the files are the user's, or else the project's own small ones
(`mlxkv.evaluate.sources`), with so little text that beyond about 700 tokens documents are repeated, the one with the
answer too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from random import Random

from mlxkv.evaluate.tasks.ruler.task import Draft, Request, RulerTask, string_match_part

_INSTRUCTION = (
    "Answer the question based on the given documents. Only give me the answer and do not output any other words."
)


@dataclass(frozen=True, kw_only=True)
class QuestionAnswering(RulerTask):
    """A question among documents; sizes count those besides the ones that belong to the question.

    Parameters
    ----------
    source
        "squad" or "hotpotqa".
    max_tokens
        Tokens to generate.
    """

    source: str | None
    max_tokens: int = 32

    @property
    def min_size(self) -> int:
        """No other documents."""
        return 0

    @property
    def question_start(self) -> str:
        """The instruction, which comes again before the question."""
        return _INSTRUCTION

    def draft(self, request: Request, size: int) -> Draft:
        """Shuffle the question's documents, others of the same article, and others."""
        questions, documents = request.sources.questions(str(self.source))
        order = Random(request.seed).sample(range(len(questions)), len(questions))
        asked = questions[order[request.index % len(order)]]
        rng = request.random()
        related = asked.related
        same_article = rng.sample(related, min(size, len(related)))
        known = {*asked.required, *related}
        unrelated = [i for i in range(len(documents)) if i not in known]
        others = rng.sample(unrelated, min(size - len(same_article), len(unrelated)))
        # When there are no more documents, all of them are repeated, as in RULER.
        repeated = islice(cycle(range(len(documents))), size - len(same_article) - len(others))
        chosen = [*asked.required, *same_article, *others, *repeated]
        rng.shuffle(chosen)
        text = "\n\n".join(f"Document {i}:\n{documents[number]}" for i, number in enumerate(chosen, 1))
        return Draft(
            f"{_INSTRUCTION}\n\nThe following are given documents.\n\n{text}\n\n",
            f"{_INSTRUCTION}\n\nQuestion: {asked.query} Answer:",
            asked.answers,
        )

    def score(self, answer: str, answers: Sequence[str]) -> float:
        """Return 1 when one of the answers is there, since all of them mean the same."""
        return string_match_part(answer, answers)
