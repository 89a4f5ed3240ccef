"""Time to the first token over HTTP, cold, from memory and after a restart, and many clients at once, of `mlxkv serve` and others."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import traces
from benchmarks.serving import Answer, Load, Messages, Server, load, running

QUESTIONS = (
    "What is the first thing that this text says, and to whom does it say it? Answer in one sentence, please.",
    "Which of all the things that are named above would you look up first, and why would you choose that one?",
    "Is there anything in this text that contradicts what you know about the matter? Name it, or say that not.",
)
ANSWER = 16  # tokens
THEIRS, OURS = "mlx_lm.server", "mlxkv serve"
FORGOTTEN = 2  # texts that it is asked about after a restart, where all of them are new to it again
Speak = Callable[[str, list[str]], str | Messages]


@dataclass(frozen=True)
class Contender:
    """A server to measure.

    Parameters
    ----------
    name
        As tables call it.
    words
        Module and arguments, without port.
    environment
        Variables beside those of this process.
    folder
        Where it keeps files; None where it keeps none.
    """

    name: str
    words: tuple[object, ...]
    environment: Mapping[str, str]
    folder: Path | None = None


def contenders(model: Path, libraries: Mapping[str, Path], work: Path) -> list[Contender]:
    """Return `mlx_lm.server`, the same with its caches in raw files, and `mlxkv serve` in each mode, each with a folder of its own."""
    (folder := work / "raw").mkdir(parents=True)
    theirs = ("benchmarks.raw_server", "--model", model)
    return [
        Contender(THEIRS, theirs, {}),
        Contender(f"{THEIRS} and raw files", (*theirs, "--raw-files", folder), {}, folder),
        *(ours(mode, model, library, work) for mode, library in libraries.items()),
    ]


def ours(mode: str, model: Path, library: Path, work: Path) -> Contender:
    """Return `mlxkv serve` in a mode."""
    words: tuple[object, ...] = ("mlxkv", "serve", "--model", model, "--store", work / mode, "--no-calibrate")
    words += ("--exact",) if mode == "exact" else ()
    return Contender(f"{OURS}, {mode}", words, {"MLXKV_ARTIFACTS": str(library)}, work / mode)


def spoken(has_template: bool) -> Speak:
    """Return what makes a request of a prefix and of what was said after it: messages, or text for a model without a template."""

    def messages(prefix: str, said: list[str]) -> str | Messages:
        roles = ("user", "assistant")
        return [{"role": "system", "content": prefix}] + [
            {"role": roles[place % 2], "content": text} for place, text in enumerate(said)
        ]

    def text(prefix: str, said: list[str]) -> str | Messages:
        return "".join([prefix, *said])

    return messages if has_template else text


def first_tokens(contender: Contender, passages: Mapping[str, str], speak: Speak, log: Path) -> list[dict[str, Any]]:
    """Ask about each text cold, once more from memory, and after a restart; return a record for each.

    A model without a template cannot be asked another question about a text whose cache cannot be cut: it reads the text, and then
    its own answer and a question.
    """
    records: list[dict[str, Any]] = []
    chat = isinstance(speak("", []), list)

    def ask(server: Server, when: str, name: str, said: list[str]) -> Answer:
        answer = server.ask(speak(passages[name], said), ANSWER)
        if answer.error:
            raise RuntimeError(f"{contender.name}, {when}: {answer.error}")
        records.append({"server": contender.name, "when": when, "passage": name, **answer._asdict()})
        return answer

    with running(contender.words, contender.environment, log) as server:
        begun = {}
        for name in passages:
            answer = ask(server, "cold", name, [QUESTIONS[0]] if chat else [])
            begun[name] = [] if chat else [answer.text]
            server.settle()  # what is written behind the answer is not to slow the next one down
        for question, when in ((1, "memory"), *([(2, "reference")] if contender.name == THEIRS else [])):
            for name in passages:
                ask(server, when, name, [*begun[name], QUESTIONS[question]])
                server.settle()
    if contender.folder is not None:
        read_from_disk(contender.folder)
    with running(contender.words, contender.environment, log) as server:
        for name in list(passages)[: FORGOTTEN if contender.name == THEIRS else None]:
            ask(server, "restarted", name, [*begun[name], QUESTIONS[2]])
            server.settle()
    return records


def read_from_disk(folder: Path) -> None:
    """Let the system forget what it holds in memory of a folder's files, where it can be asked to."""
    if hasattr(os, "posix_fadvise"):
        for path in folder.rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def clients(
    contender: Contender, speak: Speak, counts: tuple[int, ...], rounds: int, log: Path
) -> list[dict[str, Any]]:
    """Let several clients talk at once, each `rounds` questions on one system prompt; return a record for each number of them."""
    records = []
    for count in counts:
        with running(contender.words, contender.environment, log) as server:
            talks = [talk(speak, [count, number], rounds) for number in range(count)]
            records.append(
                {"server": contender.name, **summary(load(server, talks)), "peak_bytes": server.peak_memory()}
            )
    return records


def talk(speak: Speak, seed: list[int], rounds: int) -> Callable[[Callable[[str | Messages, int], Answer]], None]:
    """Return a client that asks one question after the other, with all answers so far in its prompt."""

    def talking(ask: Callable[[str | Messages, int], Answer]) -> None:
        random, said = np.random.default_rng(seed), []
        for _ in range(rounds):
            said.append(traces.words(random, 15))
            said.append(ask(speak(SHARED, said), ANSWER).text or "?")

    return talking


SHARED = traces.words(np.random.default_rng(0), 150)  # the system prompt of all clients


def summary(found: Load) -> dict[str, Any]:
    """Return requests a second and the like."""
    return {
        "clients": found.clients,
        "requests": found.requests,
        "errors": found.errors,
        "requests_a_second": round(found.requests / found.seconds, 3),
        "first_median": round(float(np.median(found.first)), 3) if found.first else None,
        "first_95": round(float(np.quantile(found.first, 0.95)), 3) if found.first else None,
        "cached_share": round(found.cached / max(1, found.asked), 3),
    }
