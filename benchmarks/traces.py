"""A synthetic day of an agent: what it asks a server, when, and what of it was asked before. Written for this project.

Sessions of several projects begin with one system prompt and its tool definitions, then the project's own instructions. A task is a
user's message, and a model that calls tools and reads what they give until it answers. Now and then an answer is asked for again, a
message in the middle is edited or an old tool result cleared, a session goes on in two ways, stays for hours and goes on, or has
grown too long and begins anew from a summary; and an answer may stand in the next prompt in other tokens than it was generated in.
All is drawn from the seed: the same one gives the same day. Nobody's real traffic is in it.

    requests = day()            tokens are random ids: enough for whatever only compares them
    requests = day(pieces=text_pieces(tokenizer))       tokens of the texts that ship along, for a real model
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from benchmarks import texts
from mlxkv.bundled import corpus

Tokens = np.ndarray  # [n] int32
Pieces = Callable[[np.random.Generator, int], Tokens]  # makes that many tokens

SESSIONS, PROJECTS = 160, 8
SYSTEM, INSTRUCTIONS = 4_000, (400, 3_000)  # tokens of the system prompt and tools; least and most of a project's own
LONGEST = 32_000  # tokens of a prompt, beyond which a session begins anew from a summary
HOUR = 3600.0
OPENING_HOURS = (8.0, 19.0)
VOCABULARY = 100_000
TASKS, CALLS = 6.0, 4.0  # mean number in a session, in a task
# Median tokens, spread (of the logarithm) and most of a message, by who wrote it.
LENGTHS = {
    "user": (60, 0.9, 2_000),
    "assistant": (90, 0.8, 1_500),
    "tool": (350, 1.2, 8_000),
    "summary": (700, 0.3, 1_500),
}
# How often: an answer is asked for again, a message edited, an old result cleared, a session goes on in two ways, is left for
# hours before a task; an answer is written into the next prompt otherwise.
RETRY, EDIT, CLEAR, BRANCH, LEFT, REWRITTEN = 0.04, 0.06, 0.05, 0.06, 0.08, 0.03
THINKING = 180.0  # mean seconds between an answer and the next task
READING, WRITING = 2_000.0, 40.0  # tokens a second: how fast the clock runs while a prompt is read, an answer written


class Request(NamedTuple):
    """One request to a server.

    Parameters
    ----------
    at
        Seconds since midnight.
    session
        Number of its session.
    kind
        What it is: "user", "tool", "retry", "edit", "clear", "branch", "left" or "summary".
    parts
        The prompt, message by message; equal parts are one array.
    answer
        What the model answers.
    """

    at: float
    session: int
    kind: str
    parts: tuple[Tokens, ...]
    answer: Tokens

    @property
    def prompt(self) -> Tokens:
        """The prompt in one piece, `[n]` int32."""
        return np.concatenate(self.parts)

    @property
    def system(self) -> int:
        """How many tokens it begins with that all sessions have."""
        return len(self.parts[0])


def day(seed: int = 0, sessions: int = SESSIONS, pieces: Pieces | None = None) -> list[Request]:
    """Return the requests of a day, in order of time: about thirty a session.

    Parameters
    ----------
    seed
        What the day is drawn from.
    sessions
        How many begin.
    pieces
        Makes tokens; None for random ids below `VOCABULARY`.
    """
    pieces = pieces or random_pieces
    random = np.random.default_rng([seed, sessions])
    system = pieces(random, SYSTEM)
    projects = [pieces(random, int(random.integers(*INSTRUCTIONS))) for _ in range(PROJECTS)]
    share = 1 / np.arange(1, PROJECTS + 1)
    starts = np.sort(random.uniform(*OPENING_HOURS, sessions)) * HOUR
    requests: list[Request] = []
    for number, start in enumerate(starts):
        project = projects[random.choice(PROJECTS, p=share / share.sum())]
        own = np.random.default_rng([seed, sessions, number])
        _Session(own, pieces, number, (system, project), float(start), requests).work()
    return sorted(requests, key=lambda request: (request.at, request.session))


def random_pieces(random: np.random.Generator, length: int) -> Tokens:
    """Return random ids."""
    return random.integers(VOCABULARY, size=length, dtype=np.int32)


def text_pieces(tokenizer: Any) -> Pieces:
    """Return what cuts pieces out of the texts that ship along and those of `benchmarks/texts`, at random places."""
    written = [text.text for text in corpus.texts()] + [
        texts.written(path.stem) for path in sorted(texts.FOLDER.glob("*.txt"))
    ]
    tokens = np.array(tokenizer.encode("\n\n".join(written)), np.int32)

    def piece(random: np.random.Generator, length: int) -> Tokens:
        start = int(random.integers(len(tokens)))
        return np.take(tokens, np.arange(start, start + length), mode="wrap")

    return piece


def words(random: np.random.Generator, count: int) -> str:
    """Return a passage of `benchmarks/texts` that begins at a random word, for requests that are sent as text."""
    stream = [word for path in sorted(texts.FOLDER.glob("*.txt")) for word in texts.written(path.stem).split()]
    start = int(random.integers(len(stream)))
    return " ".join((stream * 2)[start : start + count])


def summary(requests: Sequence[Request]) -> dict[str, Any]:
    """Return what a day is made of: requests by kind, sessions, and tokens asked, answered and different ones."""
    kinds = [request.kind for request in requests]
    different = {id(part): len(part) for request in requests for part in (*request.parts, request.answer)}
    return {
        "requests": len(requests),
        "sessions": len({request.session for request in requests}),
        "kinds": {kind: kinds.count(kind) for kind in sorted(set(kinds))},
        "prompt_tokens": sum(len(part) for request in requests for part in request.parts),
        "answer_tokens": sum(len(request.answer) for request in requests),
        "different_tokens": sum(different.values()),
    }


@dataclass
class _Session:
    """A session as it goes on; every request is appended to `requests`."""

    random: np.random.Generator
    pieces: Pieces
    number: int
    head: tuple[Tokens, ...]
    clock: float
    requests: list[Request]
    history: list[tuple[str, Tokens]] = field(default_factory=list)  # who wrote it, and what

    def work(self, tasks: int | None = None) -> None:
        """Do a number of tasks; about `TASKS` where none is given."""
        for _ in range(tasks or int(self.random.geometric(1 / TASKS))):
            left = bool(self.history) and self._happens(LEFT)
            self.clock += self.random.uniform(2, 10) * HOUR if left else self.random.exponential(THINKING)
            if self.history and self._happens(EDIT):
                self._edit()
            elif len(self.history) > 6 and self._happens(BRANCH):
                self._branch()
            self._say("user")
            self._ask("left" if left else "user")
            for _ in range(int(self.random.geometric(1 / CALLS))):
                self._say("tool")
                cleared = self._happens(CLEAR) and self._clear()
                self._ask("clear" if cleared else "tool")

    def _happens(self, probability: float) -> bool:
        return bool(self.random.random() < probability)

    def _say(self, role: str) -> None:
        self.history.append((role, self._message(role)))

    def _message(self, role: str) -> Tokens:
        median, spread, most = LENGTHS[role]
        return self.pieces(self.random, int(min(most, max(4, median * np.exp(spread * self.random.standard_normal())))))

    def _ask(self, kind: str) -> None:
        """Send what was said so far, once more where the answer does not please, and add the answer to it."""
        if sum(len(part) for _, part in self.history) > LONGEST - sum(map(len, self.head)):
            self.history, kind = [("user", self._message("summary")), self.history[-1]], "summary"
        for again in range(1 + self._happens(RETRY)):
            parts = (*self.head, *(part for _, part in self.history))
            answer = self._message("assistant")
            self.requests.append(Request(self.clock, self.number, "retry" if again else kind, parts, answer))
            self.clock += sum(map(len, parts)) / READING / 10 + len(answer) / WRITING + self.random.exponential(3)
        self.history.append(("assistant", self._message("assistant") if self._happens(REWRITTEN) else answer))

    def _edit(self) -> None:
        """Write an earlier message of the user's anew; what came after it is gone."""
        asked = [place for place, (role, _) in enumerate(self.history) if role == "user"]
        place = int(self.random.choice(asked))
        self.history[place:] = [("user", self._message("user"))]
        self._ask("edit")

    def _clear(self) -> bool:
        """Replace the oldest tool result by a word; what came after it stays. Return whether there was one to replace."""
        results = [place for place, (role, part) in enumerate(self.history[:-4]) if role == "tool" and len(part) > 8]
        if results:
            self.history[results[0]] = ("tool", self.pieces(self.random, 6))
        return bool(results)

    def _branch(self) -> None:
        """Go on from an earlier answer in another way, at the same time."""
        answers = [place for place, (role, _) in enumerate(self.history[:-1]) if role == "assistant"]
        place = int(self.random.choice(answers))
        other = _Session(
            self.random, self.pieces, self.number, self.head, self.clock + 5, self.requests, self.history[: place + 1]
        )
        other._say("user")
        other._ask("branch")
        other.work(tasks=1)
