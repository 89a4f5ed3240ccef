"""What a model writes: greedy continuations with a method on and off, compared word by word.

SmolLM2 holds 256 tokens of an essay and continues it. The reference is the continuation from the untouched cache. A
continuation that differs early is another text, not a worse one: the measures say how long both stay the same.
"""

from __future__ import annotations

from benchmarks import evaluations
from benchmarks.schema import Outcome, Result
from mlxkv.evaluate.tasks.text import TextOptions

PHASE = 1
PRESETS = ("full", "int8", "int4", "kivi-2", "smartkv-0.5", "smartkv-0.3", "h2o-96", "mp-kvm-96", "streaming-llm-96")
QUICK = ("smartkv-0.3", "h2o-96")
HEADS = {"equal_leading_tokens": "equal from the start", "exact": "all equal", "rouge_l": "ROUGE-L", "bleu": "BLEU"}


def run(quick: bool) -> Outcome:
    if quick:
        return evaluations.outcome("text", QUICK, TextOptions(max_tokens=24, samples=3), seeds=1)
    return evaluations.outcome("text", PRESETS, TextOptions(max_tokens=96, samples=3), 3, (16,), (22, 35))


def brief(result: Result) -> str:
    """Say what a README shows."""
    tokens = result["config"]["options"]["max_tokens"]
    verdict = evaluations.verdict(result, "equal_leading_tokens")
    return f"How many of {tokens} tokens of a continuation are the same up to the first that is not. {verdict}"


def section(result: Result) -> str:
    return "\n\n".join([brief(result), evaluations.table(result, HEADS), evaluations.note(result)])
