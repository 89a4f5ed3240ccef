"""Questions about one of many documents: SQuAD (qa_1) and HotpotQA (qa_2) among distracting documents.

https://arxiv.org/abs/2404.06654, section 3.4. Quoted from RULER, since they define the task: the instruction, the
question and the headings of documents. Departures: questions are drawn in an order that depends on the seed, RULER's
are those of the file in turn; the files are the user's, or else a few of the project's own (`sources`), with so little text
that beyond about 700 tokens documents come again, the one with the answer too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from random import Random

from mlxkv.evaluate.tasks.ruler.task import Draft, Request, RulerTask, any_part

_INSTRUCTION = (
    "Answer the question based on the given documents. Only give me the answer and do not output any other words."
)


@dataclass(frozen=True, kw_only=True)
class Answering(RulerTask):
    """Size: documents besides those that belong to the question."""

    reads: str | None
    tokens: int = 32

    @property
    def smallest(self) -> int:
        return 0

    @property
    def asks(self) -> str:
        return _INSTRUCTION

    def draft(self, request: Request, size: int) -> Draft:
        questions, documents = request.sources.questions(str(self.reads))
        order = Random(request.seed).sample(range(len(questions)), len(questions))
        asked = questions[order[request.index % len(order)]]
        rng = request.random()
        related = asked.related
        near = rng.sample(related, min(size, len(related)))
        known = {*asked.own, *related}
        others = [i for i in range(len(documents)) if i not in known]
        far = rng.sample(others, min(size - len(near), len(others)))
        # When there are no more documents, all of them come again, as in RULER.
        again = islice(cycle(range(len(documents))), size - len(near) - len(far))
        chosen = [*asked.own, *near, *far, *again]
        rng.shuffle(chosen)
        text = "\n\n".join(f"Document {i}:\n{documents[number]}" for i, number in enumerate(chosen, 1))
        return Draft(
            f"{_INSTRUCTION}\n\nThe following are given documents.\n\n{text}\n\n",
            f"{_INSTRUCTION}\n\nQuestion: {asked.query} Answer:",
            asked.answers,
        )

    def score(self, said: str, answers: Sequence[str]) -> float:
        """1 when any of the answers is there: they are ways to say the same."""
        return any_part(said, answers)
