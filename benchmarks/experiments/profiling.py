"""What does a live method cost? Bytes held, peaks above them, and speed against the untouched cache.

Bytes and speed are those of mlxkv's evaluations `memory` and `latency`. Where the time of a step goes, part by part, is a
settled study (`benchmarks/STUDIES.md`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.schema import MODEL, Outcome, Result
from benchmarks.tables import megabytes, table
from mlxkv import lm
from mlxkv.evaluate.runner import run as evaluate
from mlxkv.evaluate.tasks.latency import Latency, LatencyOptions
from mlxkv.evaluate.tasks.memory import Memory, MemoryOptions
from mlxkv.evaluate.variants import live_variant

PHASE = 8


@dataclass(frozen=True)
class Sizes:
    """What is measured.

    Parameters
    ----------
    presets
        Of live methods.
    context
        Tokens held.
    tokens, rounds
        As `latency` takes them.
    """

    presets: tuple[str, ...]
    context: int = 1024
    tokens: int = 22
    rounds: int = 3


FULL = Sizes(
    ("full", "int8", "int4", "kivi-2", "kivi-4", "smartkv-0.3", "smartkv-0.5", "smartkv-0.7", "h2o-512",
     "streaming-llm-512", "mp-kvm-512", "sketch-topk-512", "sketch-aggregate-512"),
)  # fmt: skip
QUICK = Sizes(("full", "int8", "kivi-2", "smartkv-0.5", "h2o-256", "mp-kvm-256"), context=256, tokens=8)


def run(quick: bool) -> Outcome:
    sizes = QUICK if quick else FULL
    model, tokenizer = lm.load(MODEL)
    variants = [live_variant(preset) for preset in sizes.presets]
    options = {
        "memory": MemoryOptions(lengths=(sizes.context,)),
        "latency": LatencyOptions(context_tokens=sizes.context, tokens=sizes.tokens, rounds=sizes.rounds),
    }
    samples = []
    for name, chosen in options.items():
        found = evaluate(name, model, tokenizer, variants, chosen)["samples"]
        samples += [{"measured": name, **record} for record in found]
    return Outcome({"model": MODEL, **dataclasses.asdict(sizes)}, samples, summarise(samples))


def summarise(samples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for each variant, with the least and the greatest relative speed of the rounds."""
    held, speeds = (
        {sample["variant"]: sample for sample in samples if sample["measured"] == name}
        for name in ("memory", "latency")
    )
    untouched = next(iter(speeds.values()))
    rows = []
    for name, speed in speeds.items():
        rounds = [sum(a) / sum(b) for a, b in zip(untouched["seconds"], speed["seconds"])]
        row = {key: held[name][key] for key in Memory.scores} | {key: speed[key] for key in Latency.scores}
        rows.append({"variant": name, **row, "decode_relative_rounds": [min(rounds), max(rounds)]})
    return rows


def section(result: Result) -> str:
    rows = result["summary"]
    heads = ("variant", "held", "peak of prefill", "of a token, on top", "prefill", "speed", "ms a token", "95 of 100 within",
             "speed", "in rounds")  # fmt: skip
    keys = ("resident_bytes", "prefill_peak_bytes", "decode_peak_bytes")
    cells = [
        (
            row["variant"],
            *(megabytes(row[key]) for key in keys),
            f"{row['prefill_seconds']:.1f} s",
            f"{row['prefill_relative']:.2f}",
            *(f"{1e3 * row[key]:.0f}" for key in ("token_seconds", "slowest_token_seconds")),
            f"{row['decode_relative']:.2f}",
            "{:.2f} to {:.2f}".format(*row["decode_relative_rounds"]),
        )
        for row in rows
    ]
    note = (
        f"After {result['config']['context']:,} tokens, by MLX's allocator. Speeds are relative to `whole`, mlx-lm's own"
        " cache, which is float32 here; below 1 is slower."
    )
    return "\n\n".join([speed_found(rows), table(heads, cells), note])


def speed_found(rows: Sequence[dict[str, Any]]) -> str:
    """Say how fast decoding is against the untouched cache, and what is faster in every round."""
    whole, *others = rows
    faster = [row["variant"] for row in others if row["decode_relative_rounds"][0] > 1]
    slowest, fastest = (choose(others, key=lambda row: row["decode_relative"]) for choose in (min, max))
    return (
        f"Against {whole['variant']}, mlx-lm's own cache, decoding runs at {slowest['decode_relative']:.2f} "
        f"({slowest['variant']}) to {fastest['decode_relative']:.2f} ({fastest['variant']}) of the speed; faster in every "
        f"round: {', '.join(faster) or 'none'}."
    )
