"""Requests at once: what a batch of unequal lengths gains over one request at a time, in live caches and in mlx-lm's own.

Each server gets eight prompts of 40 to 400 tokens one after the other and, started again so that it remembers none, all at once; every
answer is 64 tokens, greedy. Tokens a second are those of all answers until the last has come, prompts included; while decoding, those
that came while every request was being answered. An answer of the batch should be the one that its request got alone. Quick: a
miniature, three short prompts.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks import texts
from benchmarks.schema import MODEL, NAMED, Outcome, Result
from benchmarks.served import OURS, THEIRS, Contender
from benchmarks.serving import Answer, float32_folder, running
from benchmarks.tables import megabytes, table
from mlxkv import lm

PHASE = 8
LENGTHS, ANSWER = (40, 400, 90, 350, 140, 300, 190, 240), 64
PRESETS = ("int8", "int4", "kivi-2", "smartkv-0.3", "h2o-256")
QUICK_LENGTHS, QUICK_ANSWER, QUICK_PRESETS = (40, 120, 60), 8, ("int8",)
WARM_UP = ("4 5 6", "7 8 9")  # the first requests ever wait for what MLX compiles
BRIEF = "int8"


def run(quick: bool) -> Outcome:
    name = "miniature/qwen3" if quick else MODEL
    lengths, answer = (QUICK_LENGTHS, QUICK_ANSWER) if quick else (LENGTHS, ANSWER)
    load, samples = os.getloadavg()[0], []
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        folder = float32_folder(name, work)
        said = prompts(lm.load(str(folder))[1], lengths)
        for contender in contenders(folder, QUICK_PRESETS if quick else PRESETS):
            samples.append({"server": contender.name, **measured(contender, said, answer, work / "log")})
    config = {
        "model": name, "lengths": lengths, "answer": answer, "cores": os.cpu_count(), "load_average": round(load, 2),
        "threads": os.environ.get("OPENBLAS_NUM_THREADS", "all"),
    }  # fmt: skip
    return Outcome(config, samples, [summarise(sample) for sample in samples])


def contenders(model: Path, presets: Sequence[str]) -> list[Contender]:
    """Return mlx_lm.server, which multiplies by the same BLAS here, and mlxkv's with each preset and nothing on disk."""
    ours = ("mlxkv", "serve", "--model", model, "--no-store", "--cache")
    return [
        Contender(THEIRS, ("benchmarks.raw_server", "--model", model), {}),
        *(Contender(f"{OURS} --cache {preset}", (*ours, preset), {}) for preset in presets),
    ]


def prompts(tokenizer: Any, lengths: Sequence[int]) -> list[str]:
    """Return the beginnings of texts of different kinds, as long as asked, in tokens."""
    read = list(texts.OTHER_KINDS.values())
    return [
        tokenizer.decode(tokenizer.encode(read[place % len(read)]())[:length], skip_special_tokens=True)
        for place, length in enumerate(lengths)
    ]


def measured(contender: Contender, said: Sequence[str], tokens: int, log: Path) -> dict[str, Any]:
    """Return the answers to all prompts, alone and at once, with the memory that the server had taken by the end of each."""

    def ask(prompt: str) -> Answer:
        answer = server.ask(prompt, tokens)
        if answer.error:
            raise RuntimeError(f"{contender.name}: {answer.error}")
        return answer

    with running(contender.words, contender.environment, log) as server:
        list(map(ask, WARM_UP))
        alone = [ask(prompt) for prompt in said]
        alone_peak = server.peak_memory()
    with running(contender.words, contender.environment, log) as server, ThreadPoolExecutor(len(said)) as pool:
        list(pool.map(ask, WARM_UP))
        start = time.perf_counter()
        together = list(pool.map(ask, said))
        seconds, peak = time.perf_counter() - start, server.peak_memory()
    return {
        "alone": [answer._asdict() for answer in alone], "together": [answer._asdict() for answer in together],
        "seconds": seconds, "peak_bytes": peak, "alone_peak_bytes": alone_peak,
    }  # fmt: skip


def summarise(sample: Mapping[str, Any]) -> dict[str, Any]:
    """Return a server's row: tokens a second alone and together, from prompt to end and while decoding, and equal answers."""
    alone, together = ([Answer(**answer) for answer in sample[when]] for when in ("alone", "together"))
    row: dict[str, Any] = {"server": sample["server"], "requests": len(together)}
    whole = sum(answer.tokens for answer in alone) / sum(answer.seconds for answer in alone)
    row |= _speeds("", whole, sum(answer.tokens for answer in together) / sample["seconds"])
    spans = [span for answer in alone if (span := decoding([answer]))]
    span = decoding(together)
    if spans and span:
        row |= _speeds("decode_", sum(s[0] for s in spans) / sum(s[1] for s in spans), span[0] / span[1])
    equal = sum(one.text == other.text for one, other in zip(alone, together))
    shares = {key: sample[key] for key in ("peak_bytes", "alone_peak_bytes")}
    return {**row, "equal": equal, "tokens": sum(answer.tokens for answer in together), **shares}


def _speeds(kind: str, alone: float, together: float) -> dict[str, float]:
    return {
        f"{kind}alone": round(alone, 2),
        f"{kind}together": round(together, 2),
        f"{kind}times": round(together / alone, 2),
    }


def decoding(answers: Sequence[Answer]) -> tuple[float, float] | None:
    """Return the tokens that came while all answers, asked for at once, were under way, and how long that was; None for no time."""
    if not all(answer.pieces for answer in answers):
        return None
    begin, end = max(answer.pieces[0] for answer in answers), min(answer.pieces[-1] for answer in answers)
    if end <= begin:
        return None
    # A piece may be more than one token.
    came = sum(
        answer.tokens * sum(begin < at <= end for at in answer.pieces) / len(answer.pieces) for answer in answers
    )
    return came, end - begin


def brief(result: Result) -> str:
    """Say what a README shows: what a batch gains, in a live cache and in mlx-lm's own."""
    theirs = result["summary"][0]
    ours = next(row for row in result["summary"] if row["server"].endswith(f" {BRIEF}"))
    return (
        f"{ours['requests']} requests of {min(result['config']['lengths'])} to {max(result['config']['lengths'])} tokens at once get"
        f" {ours['times']:.1f} times the tokens a second of one after the other with `--cache {BRIEF}`, {theirs['times']:.1f} times with"
        f" {theirs['server']}; {ours['equal']} of {ours['requests']} answers are those of the requests alone ({theirs['equal']} there)."
    )


def section(result: Result) -> str:
    """Show a table of servers."""
    config, rows = result["config"], result["summary"]
    heads = ("server", "tokens/s alone", "at once", "times", "decoding alone", "at once", "times", "of mlx_lm.server's batch",
             "same answers", "peak memory at once", "alone")  # fmt: skip
    theirs = rows[0]
    return "\n\n".join(
        [
            brief(result),
            f"On {NAMED.get(config['model'], config['model'])} in float32, {config['cores']} cores, load average {config['load_average']} at"
            f" the start; answers of {config['answer']} tokens. Peak memory is the process's, weights included.",
            table(heads, [cells(row, theirs) for row in rows]),
        ]
    )


def cells(row: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """Return a row of the table."""
    decode = [
        f"{row[f'decode_{key}']:.1f}" if f"decode_{key}" in row else "-" for key in ("alone", "together", "times")
    ]
    peaks = [megabytes(row[key]) if row[key] else "-" for key in ("peak_bytes", "alone_peak_bytes")]
    return [
        f"`{row['server']}`", *(f"{row[key]:.1f}" for key in ("alone", "together", "times")), *decode,
        f"{row['together'] / theirs['together']:.2f}", f"{row['equal']} of {row['requests']}", *peaks,
    ]  # fmt: skip
