"""How long the bit allocation takes at the width of Qwen3-30B-A3B: p = 24,576, rank 2,048, ratio 4.

The coefficients are random with the decaying spectrum of a real cache; the time does not depend on their values.
"errors" is measuring every group's error by quantizing it, "allocate" the dynamic programme itself.

    python -m benchmarks.dp_speed
"""

from __future__ import annotations

from time import perf_counter

import numpy as np

from benchmarks.schema import write_result
from mlxkv.codec.calibrate import MAX_ERROR_TOKENS, group_errors
from mlxkv.codec.plan import allocate

WIDTH, RANK, RATIO = 24_576, 2_048, 4


def main() -> None:
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
    print(summary)
    print(write_result("dp_speed", config, [summary], summary))


if __name__ == "__main__":
    main()
