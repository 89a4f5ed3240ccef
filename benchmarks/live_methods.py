"""Every live method on the same held-out texts: what the model notices, at how many bytes, and how fast.

SmolLM2 and the trained miniatures read 1,024 tokens in one chunk, then the next 64 in chunks of 16 through each
method's cache: KL, top-1 agreement and perplexity against `full`, and measured bytes against 2 an element. On SmolLM2 also a
hidden pass key, seconds and peak bytes, timed in turn. Uniform quantization and KIVI at all their bits, and methods that
give up tokens at all their sizes, are curves that others are compared with at equal bytes, text by text.

    python -m benchmarks.live_methods [--quick]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np

from benchmarks import miniature_texts, paired, passkey, texts, uniform
from benchmarks.live_runs import Variants, continued, possible, timed
from benchmarks.schema import RESULTS, write_result
from mlxkv import lm, miniatures
from mlxkv.presets import live_methods, live_settings, method_preset, names

MODEL = "smollm2-135m"
CONTEXT, PREDICT = 1024, 64  # 64 are one round of a tail that is packed 64 tokens at a time
SPEED_ROUNDS, SPEED_TOKENS = 3, 16
OTHER_BUDGETS = ("-96", "-256")  # of methods that are timed with 512 tokens
KEEPS_ALL = f"-{CONTEXT}"  # of presets with nothing to give up in this context
FLOAT16 = "uniform-16"  # the end of all curves
PASSKEY_CONTEXT = 900
CURVES = ("uniform", "kivi", "h2o", "streaming-llm", "random")
READINGS = {"between points": paired.at_bytes, "largest that fits": paired.within_bytes}
ABLATED = "smartkv-0.3"  # the budget at which most has to go
ABLATIONS: dict[str, dict[str, Any]] = {
    **{f"order random, seed {seed}": {"order": "random", "seed": seed} for seed in range(3)},
    "order early": {"order": "early"},
    "order late": {"order": "late"},
    "allocator greedy": {"allocator": "greedy"},
    "allocator uniform": {"allocator": "uniform"},
    "layers linear": {"layers": "linear"},
    "layers exponential": {"layers": "exponential"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two texts, one miniature, one chunk; writes nothing")
    quick = parser.parse_args().quick
    samples = []
    for name in [MODEL, *miniatures.names()[: 1 if quick else None]]:
        model, tokenizer = lm.load(name)
        for record in measure(name, model, tokenizer, quick):
            samples.append({"model": name, **record})
    summary = summarise(samples)
    for rows in summary.values():
        for row in rows:
            print(row)
    if not quick:
        config = {
            "context": CONTEXT, "predict": PREDICT, "passkey_context": PASSKEY_CONTEXT, "keys": passkey.KEYS, "seed": 0,
            "speed_rounds": SPEED_ROUNDS, "speed_tokens": SPEED_TOKENS,
            "settings": {name: str(settings) for name, settings in {**presets(), **references(), **ablations()}.items()},
        }  # fmt: skip
        print(write_result("live_methods", config, samples, summary), plot(summary["fidelity"]))


@cache
def presets() -> Variants:
    """Every live preset but those that would keep the context whole; `full` first."""
    smaller = [name for name in names("methods") if not name.endswith(KEEPS_ALL)]
    live = [name for name in smaller if method_preset(name).method in live_methods()]
    return {name: live_settings(name) for name in sorted(live, key=lambda name: (name != "full", name))}


@cache
def references() -> Variants:
    """What the curves of uniform quantization and KIVI have besides presets."""
    return {
        **{f"uniform-{bits}": uniform.Settings(bits) for bits in (2, 3, 16)},
        **{f"kivi-{bits}": live_settings("kivi", bits=bits) for bits in (3, 8)},
    }


def ablations() -> Variants:
    """ABLATED with one thing changed."""
    return {change: live_settings(ABLATED, **overrides) for change, overrides in ABLATIONS.items()}


def measure(name: str, model: Any, tokenizer: Any, quick: bool) -> list[dict[str, Any]]:
    """All records of one model."""
    predict = 8 if quick else PREDICT
    kinds, rows = held_out(name, tokenizer, CONTEXT + predict + 1)
    if quick:
        kinds, rows = kinds[::6], rows[::6]
    changed = ablations() if name == MODEL and not quick else {}
    variants = possible(model, {**presets(), **references(), **changed})
    records = continued(model, rows, CONTEXT, variants, name)
    samples = [
        {"measure": "ablation" if record["variant"] in changed else "fidelity", **record, "text": kinds[record["text"]]}
        for record in records
    ]
    if name != MODEL:
        return samples
    found = passkey.retrieved(model, tokenizer, PASSKEY_CONTEXT, presets())
    rounds, tokens = (1, 8) if quick else (SPEED_ROUNDS, SPEED_TOKENS)
    text = held_out(name, tokenizer, CONTEXT + rounds * tokens)[1][0].tolist()
    one_of_each = {name: settings for name, settings in presets().items() if not name.endswith(OTHER_BUDGETS)}
    seconds = timed(model, text, CONTEXT, one_of_each, rounds)
    return [*samples, *({"measure": "passkey", **row} for row in found), *({"measure": "speed", **row} for row in seconds)]  # fmt: skip


def held_out(name: str, tokenizer: Any, length: int) -> tuple[list[str], np.ndarray]:
    """Ten or nine held-out texts `[N, length]` and what each is."""
    if name == MODEL:
        rows = {f"documentation-{i}": row for i, row in enumerate(texts.same_kind(tokenizer, length, 2))}
        rows |= {kind: tokenizer.encode(read())[:length] for kind, read in texts.OTHER_KINDS.items()}
    else:
        windows = miniature_texts.windows(length - 1, 3)
        rows = {
            f"{kind}-{i}": row for kind in miniature_texts.held_out() for i, row in enumerate(windows[kind].tolist())
        }
    return list(rows), np.array(list(rows.values()))


def method_of(variant: str) -> str:
    """The line of the picture that a variant is a point of."""
    if variant.startswith(("int", "uniform")):
        return "uniform"
    settings = {**presets(), **references()}[variant]
    return str(type(settings).__module__).rpartition(".")[2].replace("_", "-")


def summarise(samples: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Means over texts of every model and variant, comparisons at equal bytes, pass keys and speeds."""
    by = {
        measure: [sample for sample in samples if sample["measure"] == measure]
        for measure in ("fidelity", "ablation", "passkey", "speed")
    }
    return {
        "fidelity": fidelity(by["fidelity"]),
        "paired": comparisons(by["fidelity"]),
        "ablation": ablated(
            by["ablation"], [s for s in by["fidelity"] if (s["model"], s["variant"]) == (MODEL, ABLATED)]
        ),
        "passkey": passkeys(by["passkey"]),
        "speed": speeds(by["speed"]),
    }


def fidelity(samples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over texts; of KL also the geometric mean, which is what the comparisons compare."""
    rows = []
    for model, variant in dict.fromkeys((sample["model"], sample["variant"]) for sample in samples):
        group = [s for s in samples if (s["model"], s["variant"]) == (model, variant)]
        keys = ("cache_bytes", "share_of_fp16", "kl", "top1_agreement", "perplexity_reference", "perplexity_delta")
        means = {key: round(fmean(sample[key] for sample in group), 6) for key in keys}
        typical = float(np.exp(np.mean(np.log([max(s["kl"], paired.LEAST_KL) for s in group]))))
        rows.append({"model": model, "variant": variant, "method": method_of(variant), "texts": len(group), **means, "kl_geometric": typical})  # fmt: skip
    return rows


def comparisons(samples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every preset against every curve that it is not on, at the preset's bytes, paired over texts."""
    rows = []
    for model in dict.fromkeys(sample["model"] for sample in samples):
        alike = [sample for sample in samples if sample["model"] == model]
        there = {sample["variant"] for sample in alike}
        for curve in [curve for curve in CURVES if curve in map(method_of, there)]:
            for variant in [name for name in presets() if name in there and method_of(name) not in (curve, "full")]:
                ours = [sample for sample in alike if sample["variant"] == variant]
                for read, at in READINGS.items():
                    theirs = [at(s["cache_bytes"], curve_of(alike, curve, s["text"])) for s in ours]
                    result = paired.compare([s["kl"] for s in ours], theirs)
                    rows.append({"model": model, "variant": variant, "against": curve, "read": read, **result})
    return rows


def curve_of(samples: Sequence[dict[str, Any]], method: str, text: str) -> list[tuple[float, float]]:
    """(bytes, KL) of a method's variants on a text, and of float16: the method with nothing made smaller."""
    return [
        (s["cache_bytes"], s["kl"])
        for s in samples
        if s["text"] == text and (s["variant"] == FLOAT16 or method_of(s["variant"]) == method)
    ]


def ablated(samples: Sequence[dict[str, Any]], originals: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every change against ABLATED on the same texts; where there are seeds, each text's geometric mean over them."""
    rows = []
    for change in dict.fromkeys(sample["variant"].split(", seed")[0] for sample in samples):
        alike = [sample for sample in samples if sample["variant"].split(", seed")[0] == change]
        logs = np.log([[max(s["kl"], paired.LEAST_KL) for s in alike if s["text"] == o["text"]] for o in originals])
        seeds = np.exp(logs.mean(axis=0))
        row = {
            "change": change,
            "share_of_fp16": fmean(s["share_of_fp16"] for s in alike),
            "kl_of_seeds": seeds.tolist(),
        }
        rows.append({**row, **paired.compare(np.exp(logs.mean(axis=1)).tolist(), [o["kl"] for o in originals])})
    return rows


def passkeys(samples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each variant the share of keys found whole, of digits put first, and the mean log-probability of digits."""
    rows = []
    for variant in dict.fromkeys(sample["variant"] for sample in samples):
        group = [sample for sample in samples if sample["variant"] == variant]
        rows.append(
            {
                "variant": variant,
                "found": fmean(s["digits_first"] == len(s["key"]) for s in group),
                "digits_first": fmean(s["digits_first"] / len(s["key"]) for s in group),
                "log_probability": fmean(s["log_probability"] for s in group),
            }
        )
    return rows


def speeds(samples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Tokens a second of each variant and relative to `full` in the same round, medians of the rounds; most peak bytes."""
    rows = []
    for variant in dict.fromkeys(sample["variant"] for sample in samples):
        row: dict[str, Any] = {"variant": variant}
        for step in ("prefill", "decode"):
            ours, full = (
                [s for s in samples if (s["variant"], s["step"]) == (name, step)] for name in (variant, "full")
            )
            row[f"{step}_tokens_per_second"] = round(median(s["tokens"] / s["seconds"] for s in ours), 2)
            row[f"{step}_relative"] = round(median(f["seconds"] / s["seconds"] for s, f in zip(ours, full)), 3)
        row["decode_peak_bytes"] = max(s["peak_bytes"] for s in ours)
        rows.append(row)
    return rows


def plot(rows: Sequence[dict[str, Any]]) -> Path:
    """Bytes against KL on each model, one line a method."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    models = list(dict.fromkeys(row["model"] for row in rows))
    figure, panes = plt.subplots(
        1, len(models), figsize=(1 + 3.6 * len(models), 4.4), layout="constrained", squeeze=False
    )
    colors = (
        "#000000",
        "#E69F00",
        "#56B4E9",
        "#009E73",
        "#0072B2",
        "#D55E00",
        "#CC79A7",
        "#8C8C8C",
        "#332288",
        "#999933",
    )
    methods = [method for method in dict.fromkeys(row["method"] for row in rows) if method != "full"]
    for axes, model in zip(panes[0], models):
        for method, color, marker in zip(methods, colors, "os^Dv<>PX*"):
            points = [
                row for row in rows if (row["model"], row["method"]) == (model, method) and row["share_of_fp16"] < 0.97
            ]
            points.sort(key=lambda row: row["share_of_fp16"])
            x, y = [row["share_of_fp16"] for row in points], [row["kl_geometric"] for row in points]
            axes.plot(x, y, color=color, marker=marker, ms=5, label=method)
        axes.set(xscale="log", yscale="log", xlabel="bytes, of fp16's")
        axes.set_xticks(ticks := [0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0], [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.set_title(model, loc="left", fontsize=10)
    panes[0, 0].set(ylabel="KL to the full cache (nats a token)")
    figure.legend(*panes[0, 0].get_legend_handles_labels(), loc="outside right upper", frameon=False)
    path = RESULTS / "live_methods.png"
    figure.savefig(path, dpi=160, metadata={"Software": None})
    return path


if __name__ == "__main__":
    main()
