"""How long the bit allocation takes at the width of Qwen3-30B-A3B: p = 24,576, rank 2,048, ratio 4.

The coefficients are random with the decaying spectrum of a real cache; the time does not depend on their values.
"errors" is measuring every group's error by quantizing it, "allocate" the dynamic programme itself. Quick is the same.
"""

from __future__ import annotations

from time import perf_counter

import numpy as np

from benchmarks.schema import Outcome, Result
from mlxkv.codec.methods.kvtc import MAX_ERROR_TOKENS, group_errors
from mlxkv.codec.stages.plan import allocate

PHASE = 8
WIDTH, RANK, RATIO = 24_576, 2_048, 4


def run(quick: bool) -> Outcome:
    random = np.random.default_rng(0)
    spectrum = 100 / (1 + np.arange(RANK)) ** 0.7
    coefficients = (random.standard_normal((MAX_ERROR_TOKENS, RANK)) * spectrum).astype(np.float32)
    energy = np.square(coefficients, dtype=np.float64).mean(axis=0)
    budget = 16 * WIDTH // RATIO
    start = perf_counter()
    errors = group_errors(coefficients)
    middle = perf_counter()
    plan = allocate(energy, errors, budget)
    end = perf_counter()
    config = {"width": WIDTH, "rank": RANK, "compression_ratio": RATIO, "budget_bits": budget, "seed": 0}
    summary = {
        "errors_seconds": round(middle - start, 2),
        "allocate_seconds": round(end - middle, 2),
        "bits": plan.bits,
        "groups": len(plan.groups),
    }
    return Outcome(config, [summary], summary)


def section(result: Result) -> str:
    config, summary = result["config"], result["summary"]
    return (
        f"Measuring the errors of all groups takes {summary['errors_seconds']:.1f} s, the dynamic programme"
        f" {summary['allocate_seconds']:.1f} s (p = {config['width']:,}, rank {config['rank']:,}, {config['compression_ratio']}x:"
        f" {config['budget_bits']:,} bits a token, of which the plan spends {summary['bits']:,} in {summary['groups']:,} groups)."
    )
