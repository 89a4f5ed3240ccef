"""What does a live method cost? Bytes against theory, speed against the whole cache, and where the time goes.

Bytes and speed are those of mlxkv's evaluations `memory` and `latency`. Theory is worked out from a method's settings:
bits, scales, tokens kept and what is known of each. A decoded token and a prefill chunk are then taken apart: each part is
evaluated before and after by itself, so MLX cannot overlap parts or put them together, and their sum differs from the time
without that, which stands beside it. Python's share, the building of the graph included, is cProfile's: all but the time in
`mx.eval`. The profiler slows Python down and not MLX, so it is an upper bound.
"""

from __future__ import annotations

import copy
import cProfile
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.profiler import REST, in_parts
from benchmarks.schema import Outcome, Result
from benchmarks.tables import megabytes, percent, table
from benchmarks.theory import theory
from mlxkv import lm
from mlxkv.evaluate import texts
from mlxkv.evaluate.tasks import latency, memory

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PHASE = 8
MODEL = "smollm2-135m"


@dataclasses.dataclass(frozen=True)
class Sizes:
    """presets: of live methods. dissected: those of them that are taken apart. context: tokens held. tokens, rounds: as of
    `latency`. followed: tokens taken apart after that; every method packs or chooses anew within 64. counted: tokens under
    cProfile. chunk: tokens of the prefill chunk that is taken apart."""

    presets: tuple[str, ...]
    dissected: tuple[str, ...]
    context: int = 1024
    tokens: int = 22
    rounds: int = 3
    followed: int = 64
    counted: int = 16
    chunk: int = lm.PREFILL_CHUNK


FULL = Sizes(
    ("full", "int8", "int4", "kivi-2", "kivi-4", "smartkv-0.3", "smartkv-0.5", "smartkv-0.7", "h2o-512",
     "streaming-llm-512", "mp-kvm-512", "sketch-topk-512", "sketch-aggregate-512"),
    ("full", "kivi-4", "streaming-llm-512", "smartkv-0.5", "h2o-512", "mp-kvm-512", "sketch-topk-512",
     "sketch-aggregate-512"),
)  # fmt: skip
QUICK = Sizes(
    ("full", "int8", "kivi-2", "smartkv-0.5", "h2o-256", "mp-kvm-256"),
    ("smartkv-0.5", "h2o-256", "mp-kvm-256"),
    context=256, tokens=8, followed=16, counted=4, chunk=64,
)  # fmt: skip


def run(quick: bool) -> Outcome:
    sizes = QUICK if quick else FULL
    model, tokenizer = lm.load(MODEL)
    chosen = [variants.baseline(), *(variants.live_variant(preset) for preset in sizes.presets)]
    samples = []
    (unit,) = memory.units(tokenizer, memory.MemoryOptions(lengths=(sizes.context,)), 0)
    for record in unit.measure(model, tokenizer, chosen):
        samples.append(
            {"measured": "memory", **record, "theory_bytes": theory(model, record["variant"], sizes.context)}
        )
    options = latency.LatencyOptions(context=sizes.context, tokens=sizes.tokens, rounds=sizes.rounds)
    (unit,) = latency.units(tokenizer, options, 0)
    caches: dict[str, list[Any]] = {}
    for record in unit.measure(model, tokenizer, [remembered(variant, caches) for variant in chosen]):
        samples.append({"measured": "latency", **record})
    start = sizes.context + sizes.rounds * sizes.tokens
    tokens = texts.repeated_tokens(tokenizer, None, start + sizes.counted + sizes.followed + sizes.chunk)[start:]
    for name in list(caches):
        samples += dissected(model, name, caches.pop(name), tokens, sizes)
    return Outcome({"model": MODEL, **dataclasses.asdict(sizes)}, samples, summarised(samples))


def remembered(variant: variants.Variant, caches: dict[str, list[Any]]) -> variants.Variant:
    """The variant, whose caches can be gone on with."""

    def hold(model: Any, tokens: Sequence[int], exact: variants.CachedContext | None = None) -> variants.CachedContext:
        held = variant.build(model, tokens, exact)
        caches[variant.name] = held.cache
        return held

    return dataclasses.replace(variant, build=hold)


def dissected(model: Any, name: str, cache: list[Any], tokens: Sequence[int], sizes: Sizes) -> Iterator[dict[str, Any]]:
    """Python's share of the first tokens; then, of those that are to be, every following token and a chunk in parts."""
    counted, followed = tokens[: sizes.counted], tokens[sizes.counted : sizes.counted + sizes.followed]
    with cProfile.Profile() as profile:
        for token in counted:
            latency.decode(model, cache, token)
    times = {entry.code: entry.inlinetime for entry in profile.getstats()}
    # cProfile does not see MLX's functions: their time is that of the function which calls them, here of mx.eval.
    yield {
        "measured": "python",
        "variant": name,
        "seconds": sum(times.values()),
        "evaluating_seconds": times[latency.decode.__code__],
    }
    if name not in sizes.dissected:
        return
    for token in followed:
        yield {"variant": name, **in_parts("token", functools.partial(latency.decode, model, cache, token))}
    again, chunk = copy.deepcopy(cache), tokens[-sizes.chunk :]
    start = perf_counter()
    lm.prefill(model, chunk, again)
    plain = perf_counter() - start
    yield {"variant": name, "plain_seconds": plain, **in_parts("chunk", lambda: lm.prefill(model, chunk, cache))}


def summarised(samples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each variant; means over tokens, and of what was taken apart also the seconds without that."""
    rows = []
    whole = next(sample for sample in samples if sample["measured"] == "latency")
    for name in dict.fromkeys(sample["variant"] for sample in samples):
        own: dict[str, list[Any]] = {kind: [] for kind in ("memory", "latency", "python", "token", "chunk")}
        for sample in samples:
            if sample["variant"] == name:
                own[sample["measured"]].append(sample)
        (held,), (speed,), (python,) = own["memory"], own["latency"], own["python"]
        rounds = [sum(a) / sum(b) for a, b in zip(whole["seconds"], speed["seconds"])]
        row = {
            "variant": name,
            **{key: held[key] for key in ("theory_bytes", *memory.SCORES)},
            **{key: speed[key] for key in latency.SCORES},
            "decode_relative_rounds": [min(rounds), max(rounds)],
            "python_share": 1 - python["evaluating_seconds"] / python["seconds"],
        }
        if own["token"]:
            plain = {"token": float(np.mean(speed["seconds"])), "chunk": own["chunk"][0]["plain_seconds"]}
            for kind, seconds in plain.items():
                row[kind] = {"plain_seconds": seconds, **_means(own[kind])}
        rows.append(row)
    return rows


def _means(steps: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of all steps; and how many of them had reallocation, and how long it then took."""
    worked = [step["parts"]["reallocation"] for step in steps if step["parts"]["reallocation"]]
    return {
        "seconds": float(np.mean([step["seconds"] for step in steps])),
        "parts": {part: float(np.mean([step["parts"][part] for step in steps])) for part in steps[0]["parts"]},
        "steps": len(steps),
        "reallocations": len(worked),
        "reallocation_seconds": float(np.mean(worked)) if worked else 0.0,
    }


def section(result: Result) -> str:
    rows = result["summary"]
    apart = [row for row in rows if "token" in row]
    return "\n\n".join(
        [
            f"{_bytes_found(rows, result['config']['context'])} {_speed_found(rows)}",
            table(
                ("variant", "theory", "held", "more by", "peak of prefill", "of a token, on top"),
                (
                    (
                        row["variant"],
                        *(megabytes(row[key]) for key in ("theory_bytes", "resident_bytes")),
                        f"{100 * (row['resident_bytes'] / row['theory_bytes'] - 1):+.1f} %",
                        *(megabytes(row[key]) for key in ("prefill_peak_bytes", "decode_peak_bytes")),
                    )
                    for row in rows
                ),
            ),
            table(
                (
                    "variant",
                    "prefill",
                    "speed",
                    "ms a token",
                    "95 of 100 within",
                    "speed",
                    "in rounds",
                    "Python at most",
                ),
                (
                    (
                        row["variant"],
                        f"{row['prefill_seconds']:.1f} s",
                        f"{row['prefill_relative']:.2f}",
                        *(f"{1e3 * row[key]:.0f}" for key in ("token_seconds", "slowest_token_seconds")),
                        f"{row['decode_relative']:.2f}",
                        "{:.2f} to {:.2f}".format(*row["decode_relative_rounds"]),
                        percent(row["python_share"]),
                    )
                    for row in rows
                ),
            ),
            _parts_found(apart),
            f"Milliseconds of a decoded token, over {apart[0]['token']['steps']} tokens:",
            _parts_table(apart, "token"),
            f"Milliseconds of a prefill chunk of {result['config']['chunk']} tokens:",
            _parts_table(apart, "chunk"),
        ]
    )


def _bytes_found(rows: Sequence[dict[str, Any]], context: int) -> str:
    ratios = {row["variant"]: row["resident_bytes"] / row["theory_bytes"] for row in rows}
    budgets = [ratio for name, ratio in ratios.items() if name.startswith("smartkv")]
    name, ratio = max(
        ((name, ratio) for name, ratio in ratios.items() if not name.startswith("smartkv")),
        key=lambda item: abs(item[1] - 1),
    )
    return (
        f"After {context:,} tokens MLX's allocator holds what theory says within {100 * abs(ratio - 1):.1f} % (the farthest "
        f"is {name}); smartkv, for which theory is a limit, holds {percent(min(budgets))} to {percent(max(budgets))} of it."
    )


def _speed_found(rows: Sequence[dict[str, Any]]) -> str:
    whole, *others = sorted(rows, key=lambda row: row is not rows[0])
    faster = [row["variant"] for row in others if row["decode_relative_rounds"][0] > 1]
    slowest, fastest = (choose(others, key=lambda row: row["decode_relative"]) for choose in (min, max))
    return (
        f"Against {whole['variant']}, mlx-lm's own cache, decoding runs at {slowest['decode_relative']:.2f} "
        f"({slowest['variant']}) to {fastest['decode_relative']:.2f} ({fastest['variant']}) of the speed; faster in every "
        f"round: {', '.join(faster) or 'none'}."
    )


def _parts_found(apart: Sequence[dict[str, Any]]) -> str:
    """What looking at attention costs, in those variants that do, and what packing and choosing cost."""
    weighing = [row for row in apart if row["chunk"]["parts"]["weights again"]]

    def shares(kind: str, *parts: str) -> str:
        found = [sum(row[kind]["parts"][part] for part in parts) / row[kind]["seconds"] for row in weighing]
        return f"{percent(min(found))} to {percent(max(found))}"

    longer = [row["token"]["seconds"] / row["token"]["plain_seconds"] for row in apart]
    return (
        f"Of {len(weighing)} methods that look at attention ({', '.join(row['variant'] for row in weighing)}): computing the "
        f"weights again and keeping importance takes {shares('chunk', 'weights again', 'importance')} of a prefill chunk, "
        f"importance {shares('token', 'importance')} of a decoded token; packing, choosing or clustering anew "
        f"{shares('chunk', 'reallocation')} and {shares('token', 'reallocation')}. A decoded token's weights are a by-product "
        f"of its attention and not a part of their own; h2o's importance is a sum, in `storing`. Evaluated in parts a token "
        f"takes {min(longer):.2f} to {max(longer):.2f} times as long as together."
    )


def _parts_table(apart: Sequence[dict[str, Any]], kind: str) -> str:
    heads = ("variant", *apart[0][kind]["parts"], "sum", "together", "reallocations", "ms each")
    return table(
        heads,
        (
            (
                row["variant"],
                *(f"{1e3 * seconds:.1f}" for seconds in row[kind]["parts"].values()),
                *(f"{1e3 * row[kind][key]:.1f}" for key in ("seconds", "plain_seconds")),
                f"{row[kind]['reallocations']} of {row[kind]['steps']}",
                f"{1e3 * row[kind]['reallocation_seconds']:.1f}",
            )
            for row in apart
        ),
    )


def figure(result: Result) -> Figure:
    from benchmarks import figures

    rows = [row for row in result["summary"] if "token" in row][::-1]
    drawn, axes = figures.panes(columns=2, height=0.8 + 0.35 * len(rows), sharey=True)
    titles = {"token": "a decoded token", "chunk": f"a prefill chunk of {result['config']['chunk']} tokens"}
    places = np.arange(len(rows))
    for axis, (kind, title) in zip(axes[0], titles.items()):
        left = np.zeros(len(rows))
        for part, color, hatch in zip(rows[0][kind]["parts"], figures.COLORS, ("", "//", "..", "xx", "\\\\", "")):
            widths = np.array([1e3 * row[kind]["parts"][part] for row in rows])
            color = "#D9D9D9" if part == REST else color
            axis.barh(places, widths, left=left, color=color, hatch=hatch, edgecolor="white", linewidth=0.5, label=part)
            left += widths
        together = [1e3 * row[kind]["plain_seconds"] for row in rows]
        axis.plot(together, places, "D", color="black", markersize=5, label="all together")
        axis.set(title=title, xlabel="ms", yticks=places, yticklabels=[row["variant"] for row in rows])
        axis.grid(axis="y", visible=False)
    drawn.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return drawn
