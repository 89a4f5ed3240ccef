"""Live caches in a tenth to three tenths of the bytes: `klt` beside all others that hold every token, and what each of its ideas is worth.

A model reads texts of kinds that calibration did not see, exactly and once; each cache takes the first 1,024 or 4,096 tokens in
at once, then the next 64 in chunks of 16. KL is against the untouched cache, and bytes are all that stays resident. `klt` is measured
calibrated by `mlxkv calibrate`, and with the tables that it has without. Where a model has sliding windows, those layers
keep mlx-lm's own cache and are not counted. Other rows of the ablation change one part of `klt` at a time.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.progress import track

from benchmarks import held, klt_parts, paired, tables, texts
from benchmarks.experiments.one_command import command
from benchmarks.schema import MODEL, NAMED, Outcome, Result
from benchmarks.variants import (
    LloydCache,
    LloydConfig,
    UniformCache,
    UniformConfig,
    measure_while_growing,
    sizes_of_live,
)
from mlxkv import lm
from mlxkv.config import Config
from mlxkv.live import live_config
from mlxkv.live.base import LayerCache, cache_class_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PHASE = 1
CONTEXTS, PREDICT = (1024, 4096), 64
QUICK_CONTEXT = 1024
CALIBRATION_MINUTES = 3.0
BUDGETS = (0.1, 0.11, 0.125, 0.15, 0.165, 0.2, 0.22, 0.25, 0.3)
FEWER_BUDGETS = (0.11, 0.15, 0.2, 0.25, 0.3)  # without calibration
LONG_BUDGETS, FEWEST_BUDGETS = (
    (0.11, 0.15, 0.2, 0.25),
    (0.15, 0.25),
)  # of the longer context, the latter without calibration
ABLATED = 0.165
RIVALS = (
    "smartkv-0.2", "smartkv-0.25", "smartkv-0.3", "int4", "kivi-2", "kivi-4", "turbo-2", "turbo-3", "turbo-4", "uniform-3",
)  # fmt: skip
FEWER_RIVALS = ("smartkv-0.2", "smartkv-0.3", "int4", "kivi-2", "turbo-2", "turbo-3", "turbo-4")
QUICK_RIVALS = ("int4", "turbo-3")
UNCALIBRATED = "uncalibrated"
WITHOUT = "klt without "  # names of the ablation's rows begin so
CURVES = ("klt", f"klt {UNCALIBRATED}")
SCORES = ("cache_bytes", "share_of_fp16", "kl", "top1_agreement", "perplexity_reference", "perplexity_delta")
SURE = 0.05
Kind = tuple[type[LayerCache], Config]
Samples = list[dict[str, Any]]

CODE, REFERENCE = ("argparse", "inspect", "typing"), ("pathlib", "statistics")
PROSE = {"prose": ("legal", "story", "essay"), "chats": ("chat-travel", "chat-support", "chat-code")}


def run(quick: bool, model: str = MODEL) -> Outcome:
    """Quick: one text of a thousand tokens and two budgets, not calibrated.

    On another language model: no ablation.
    """
    contexts = (QUICK_CONTEXT,) if quick else CONTEXTS
    samples: Samples = []
    with nullcontext("none") if quick else calibrated(model) as calibration:
        loaded, tokenizer = lm.load(model)
        found = held_out(tokenizer, max(contexts) + PREDICT + 1)
        for text, tokens in track(list(found.items())[: 1 if quick else None], model):
            for context, exact in held.read(loaded, tokens[: max(contexts)], contexts):
                chosen = kinds(quick, context, ablation=model == MODEL and context == contexts[0] and not quick)
                variants = [held.replayed(name, *chosen[name], exact) for name in chosen]
                part = tokens[: context + PREDICT + 1]
                records = measure_while_growing(loaded, variants, part, context, sizes_of_live)
                samples += [{"model": model, "context": context, "text": text, **record} for record in records[1:]]
    config = {
        "model": model, "contexts": list(contexts), "predict": PREDICT, "texts": list(found)[: 1 if quick else None],
        "calibration": calibration, "ablated": ABLATED,
        "settings": {name: kind[1].to_dict() for name, kind in kinds(quick, contexts[0]).items()},
    }  # fmt: skip
    return Outcome(config, samples, summarise(samples))


def held_out(tokenizer: Any, length: int) -> dict[str, list[int]]:
    """Return ten texts of `length` tokens by name: documentation, code, reference, prose and chats; none is in the corpus of calibration."""
    pages = texts.same_kind(tokenizer, length, 3)
    found = {f"documentation-{i}": row for i, row in enumerate(pages)}
    written = {
        **{f"code-{name}": texts.code(name) for name in CODE},
        **{f"reference-{name}": texts.reference(name) for name in REFERENCE},
        **{name: "\n\n".join(texts.OTHER_KINDS[kind]() for kind in parts) for name, parts in PROSE.items()},
    }
    found |= {name: tokenizer.encode(text)[:length] for name, text in written.items()}
    if short := [name for name, row in found.items() if len(row) < length]:
        raise ValueError(f"{', '.join(short)}: fewer than {length} tokens")
    return found


@contextmanager
def calibrated(model: str) -> Iterator[str]:
    """Have artifacts of a model in the library: those of $MLXKV_ARTIFACTS, or made here. Yields which, for the result."""
    if os.environ.get("MLXKV_ARTIFACTS"):
        yield "artifacts of $MLXKV_ARTIFACTS"
        return
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        made, seconds = command(home, "calibrate", "--model", model, "--budget-minutes", str(CALIBRATION_MINUTES))
        os.environ["MLXKV_ARTIFACTS"] = str(home / "artifacts")
        try:
            yield f"mlxkv calibrate --budget-minutes {CALIBRATION_MINUTES:g}, {made['calibration_tokens']:,} tokens, {seconds:.0f} s"
        finally:
            del os.environ["MLXKV_ARTIFACTS"]


def kinds(quick: bool, context: int, ablation: bool = False) -> dict[str, Kind]:
    """Return method and settings of every variant by name; `full` comes first."""
    longer = context > CONTEXTS[0]
    own = FEWEST_BUDGETS if quick else LONG_BUDGETS if longer else BUDGETS
    found: dict[str, Kind] = {"full": _kind(live_config("full"))}
    for budget in () if quick else own:
        found[f"klt-{budget:g}"] = _kind(live_config("klt", budget=budget))
    for budget in FEWEST_BUDGETS if quick or longer else FEWER_BUDGETS:
        found[f"klt-{budget:g} {UNCALIBRATED}"] = klt_parts.Uncalibrated, live_config("klt", budget=budget)
    rivals = QUICK_RIVALS if quick else FEWER_RIVALS if longer else RIVALS
    found |= {name: _kind(_rival(name)) for name in rivals}
    if ablation:
        for part, changed in klt_parts.WITHOUT.items():
            found[f"{WITHOUT}{part}"] = changed, live_config("klt", budget=ABLATED)
    return found


def _kind(config: Config) -> Kind:
    own: dict[type[Config], type[LayerCache]] = {LloydConfig: LloydCache, UniformConfig: UniformCache}
    return own.get(type(config)) or cache_class_of(config), config


def _rival(name: str) -> Config:
    method, _, number = name.partition("-")
    if method == "turbo":
        return LloydConfig(bits=int(number))
    if method == "uniform":
        return UniformConfig(bits=int(number))
    return live_config("smartkv", budget=float(number)) if method == "smartkv" else live_config(name)


def summarise(samples: Samples) -> dict[str, list[dict[str, Any]]]:
    """Return means over texts, `klt` against every rival at the rival's bytes, and its parts against all of them."""
    return {"caches": means(samples), "paired": comparisons(samples), "ablation": ablation(samples)}


def means(samples: Samples) -> list[dict[str, Any]]:
    """Return means over texts; of KL also the geometric mean, which is what the comparisons compare."""
    rows = []
    for context, variant in dict.fromkeys((s["context"], s["variant"]) for s in samples):
        group = [s for s in samples if (s["context"], s["variant"]) == (context, variant)]
        found = {key: round(fmean(s[key] for s in group), 6) for key in SCORES}
        typical = float(np.exp(np.mean(np.log([max(s["kl"], paired.LEAST_KL) for s in group]))))
        row = {"context": context, "variant": variant, "method": method_of(variant), "texts": len(group)}
        rows.append({**row, **found, "kl_geometric": typical})
    return rows


def method_of(variant: str) -> str:
    """Return the line of the figure that a variant is a point of."""
    if variant.startswith(WITHOUT):
        return "ablation"
    method = variant.partition("-")[0]
    return f"{method} {UNCALIBRATED}" if variant.endswith(UNCALIBRATED) else method.removesuffix("4")


def comparisons(samples: Samples) -> list[dict[str, Any]]:
    """Compare each rival with both curves of `klt`, text by text: KL at the rival's bytes, and bytes at its typical KL.

    Between budgets a curve is a straight line in the logarithms; `beyond` says that it has no point of so few or so many bytes.
    """
    rows = []
    for context in dict.fromkeys(s["context"] for s in samples):
        alike = [s for s in samples if s["context"] == context]
        typical = {row["variant"]: row for row in means(alike)}
        rivals = [name for name, row in typical.items() if row["method"] not in (*CURVES, "ablation")]
        for curve in CURVES:
            known = [row for row in typical.values() if row["method"] == curve]
            for rival in rivals if known else []:
                theirs = {s["text"]: s for s in alike if s["variant"] == rival}
                ours = [
                    paired.at_bytes(s["cache_bytes"], [(o["cache_bytes"], o["kl"]) for o in alike
                                    if o["text"] == text and method_of(o["variant"]) == curve])
                    for text, s in theirs.items()
                ]  # fmt: skip
                size, sizes = typical[rival]["share_of_fp16"], [row["share_of_fp16"] for row in known]
                rows.append({
                    "context": context, "curve": curve, "variant": rival, "share_of_fp16": size,
                    **paired.compare(ours, [s["kl"] for s in theirs.values()]),
                    "beyond": not min(sizes) <= size <= max(sizes),
                    "share_at_equal_kl": share_at(typical[rival]["kl_geometric"], known),
                })  # fmt: skip
    return rows


def share_at(kl: float, rows: Sequence[Mapping[str, Any]]) -> float | None:
    """Return the share of bytes at which a curve has a KL, None where it does not reach from below to above it."""
    points = sorted((row["kl_geometric"], row["share_of_fp16"]) for row in rows)
    if not points[0][0] <= kl <= points[-1][0]:
        return None
    kls, shares = np.log(points).T
    return float(np.exp(np.interp(np.log(kl), kls, shares)))


def ablation(samples: Samples) -> list[dict[str, Any]]:
    """Compare `klt` without each part with all of it, text by text, at the same budget."""
    whole = {s["text"]: s for s in samples if s["variant"] == f"klt-{ABLATED:g}"}
    rows = []
    for variant in dict.fromkeys(s["variant"] for s in samples if s["variant"].startswith(WITHOUT)):
        own = {s["text"]: s for s in samples if s["variant"] == variant}
        result = paired.compare([s["kl"] for s in own.values()], [whole[text]["kl"] for text in own])
        found = {key: round(fmean(s[key] for s in own.values()), 6) for key in ("share_of_fp16", "kl")}
        rows.append({"variant": variant, **found, **result})
    return rows


def brief(result: Result) -> str:
    """Say what a README shows: the shorter context's table."""
    context = result["config"]["contexts"][0]
    return f"{setting(result, context)}\n\n{scores(result, context)}\n\n{verdict(result, context)}"


def setting(result: Result, context: int) -> str:
    config = result["config"]
    return (
        f"{NAMED[config['model']]} after {context:,} tokens of {len(config['texts'])} held-out texts, the next {config['predict']}"
        " read through each cache."
    )


def scores(result: Result, context: int) -> str:
    rows = [row for row in result["summary"]["caches"] if row["context"] == context and row["method"] != "ablation"]
    cells = [
        (f"`{row['variant']}`" if UNCALIBRATED not in row["variant"] else f"`{row['variant'].split()[0]}` {UNCALIBRATED}",
         f"{row['share_of_fp16']:.3f}", f"{row['kl']:.2g}", tables.percent(row["top1_agreement"]),
         f"{row['perplexity_reference']:.1f} {row['perplexity_delta']:+.2f}")
        for row in sorted(rows, key=lambda row: -row["share_of_fp16"])
    ]  # fmt: skip
    return tables.table(["cache", "bytes", "KL", "top-1", "perplexity"], cells)


def verdict(result: Result, context: int) -> str:
    """Say against which rivals KL at equal bytes is lower, and higher, beyond chance."""
    said = []
    for curve in CURVES:
        rows = [row for row in judged(result, context) if row["curve"] == curve]
        sides = {"lower": [], "higher": []}  # type: dict[str, list[str]]
        for row in rows:
            if row["p_holm"] < SURE:
                sides["lower" if row["kl_ratio"] < 1 else "higher"].append(f"`{row['variant']}`")
        if rows:
            said.append(
                "; ".join(f"{side} than that of {', '.join(names)}" for side, names in sides.items() if names)
                or "not surely different from any"
            )
            said[-1] = f"of `{curve}` {said[-1]}"
    return f"At equal bytes, beyond chance, KL is {', and '.join(said)}."


def judged(result: Result, context: int) -> list[dict[str, Any]]:
    """Return the comparisons of a context, p corrected over both curves."""
    rows = [row for row in result["summary"]["paired"] if row["context"] == context]
    return [{**row, "p_holm": p} for row, p in zip(rows, paired.holm([row["p"] for row in rows]))]


def section(result: Result) -> str:
    config = result["config"]
    parts = [
        f"`klt` calibrated: {config['calibration']}; {UNCALIBRATED}: with the tables that it has without. `turbo-N` is a baseline of"
        " this benchmark in the manner of [TurboQuant](https://arxiv.org/abs/2504.19874): rotated tokens, a norm each, Lloyd-Max"
        " codes of N bits, sinks and newest tokens exact. Bytes are shares of float16's, of the layers that attend to all tokens.",
    ]
    for context in config["contexts"]:
        parts += [setting(result, context), scores(result, context), verdict(result, context), against(result, context)]
    if result["summary"]["ablation"]:
        parts += [
            f"`klt-{config['ablated']:g}` after {config['contexts'][0]:,} tokens with one part changed; bytes differ where the part takes some:",
            without(result),
        ]
    return "\n\n".join(parts)


def against(result: Result, context: int) -> str:
    """Return a table of both curves against each rival."""
    rows = judged(result, context)
    curves = [curve for curve in CURVES if any(row["curve"] == curve for row in rows)]
    found = {(row["curve"], row["variant"]): row for row in rows}
    lines = []
    for variant in dict.fromkeys(row["variant"] for row in rows):
        first = found[curves[0], variant]
        cells = [f"`{variant}`", f"{first['share_of_fp16']:.3f}"]
        for curve in curves:
            row = found[curve, variant]
            share = row["share_at_equal_kl"]
            cells += [_ratio(row), "" if share is None else f"{share:.3f}"]
        lines.append(cells)
    heads = [head for curve in curves for head in (f"{curve}: KL, times its", "bytes at its KL")]
    note = f"KL in geometric means with 95 % intervals; bold: p < {SURE} after Holm; †: `klt` has no budget of so few or so many bytes here."
    return f"{tables.table(['beside', 'bytes', *heads], lines)}\n\n{note}"


def without(result: Result) -> str:
    rows = result["summary"]["ablation"]
    ps = paired.holm([row["p"] for row in rows])
    cells = [
        (row["variant"], f"{row['share_of_fp16']:.3f}", f"{row['kl']:.2g}", _ratio({**row, "p_holm": p, "beyond": False}))
        for row, p in zip(rows, ps)
    ]  # fmt: skip
    return tables.table(["cache", "bytes", "KL", "times that of all of it"], cells)


def _ratio(row: Mapping[str, Any]) -> str:
    ratio = f"{row['kl_ratio']:.2g} ({tables.interval(*row['kl_ratio_interval'])})"
    return f"{f'**{ratio}**' if row['p_holm'] < SURE else ratio}, {row['better_on']} of {row['texts']}{' †' * row['beyond']}"


def figure(result: Result) -> Figure:
    """Draw bytes against KL at each length, one line a method."""
    from benchmarks import figures

    rows = [row for row in result["summary"]["caches"] if row["method"] != "ablation"]
    contexts = result["config"]["contexts"]
    drawn, panes = figures.panes(len(contexts), 1, width=4.4)
    for axes, context in zip(panes.flat, contexts):
        for method in dict.fromkeys(row["method"] for row in rows):
            alike = [row for row in rows if (row["context"], row["method"]) == (context, method)]
            points = sorted((row["share_of_fp16"], row["kl_geometric"]) for row in alike)
            if points:
                dashed = {"ls": "--"} if method.endswith(UNCALIBRATED) else {}
                axes.plot(*zip(*points), ms=5, label=method, **figures.look(method), **dashed)
        axes.set(xscale="log", yscale="log", xlabel="bytes, of fp16's")
        axes.set_xticks(ticks := [0.1, 0.15, 0.2, 0.25, 0.3], [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        axes.set_title(f"{context:,} tokens", loc="left", fontsize=10)
    panes[0, 0].set(ylabel="KL to the full cache (nats a token)")
    panes[0, -1].legend(*panes[0, 0].get_legend_handles_labels(), fontsize=7)
    return drawn
