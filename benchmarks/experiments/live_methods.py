"""Every method at how many bytes: what the model notices, live methods and the codec on the same held-out texts.

SmolLM2 and the trained miniatures read 1,024 tokens in one chunk, then the next 64 in chunks of 16 through each
method's cache: KL, top-1 agreement and perplexity against `full`, and measured bytes against 2 an element. On SmolLM2
the codecs kvtc and kvtc-rd are calibrated on other text, file each text's cache after the context, and restore it. Uniform
quantization and KIVI at all their bits, kvtc at all its ratios, and methods that evict tokens at all their sizes, are
curves that others are compared with at equal bytes, text by text. Another language model is measured alone, on fewer variants.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.progress import track

from benchmarks import calibration, paired, tables, texts
from benchmarks.schema import MODEL, NAMED, Outcome, Result
from benchmarks.variants import (
    CONTEXT,
    PREDICT,
    cached_at_once,
    measure_while_growing,
    method_of,
    presets,
    references,
    supported,
)
from mlxkv import lm
from mlxkv.bundled import miniatures
from mlxkv.codec.session import CacheCodec
from mlxkv.evaluate.variants import codec_variant

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Found = dict[tuple[str, ...], dict[str, Any]]  # comparisons by model, variant, curve and reading
Picks = dict[str, list[tuple[str, ...]]]

PHASE = 1
RATIOS, QUALITIES = (2, 4, 8, 16), (15, 22, 30, 38, 46)
QUICK = (
    "full", "int8", "int4", "kivi-2", "kivi-4", "smartkv-0.3", "smartkv-0.5", "h2o-96", "h2o-256", "streaming-llm-96",
    "random-96", "mp-kvm-96", "uniform-3", "uniform-16",
)  # fmt: skip
ON_OTHERS = (*QUICK, "uniform-2", "uniform-4", "kivi-3")
FLOAT16 = "uniform-16"  # the end of all curves
CURVES = ("uniform", "kivi", "kvtc", "h2o", "streaming-llm", "random")
READINGS = {"between points": paired.at_bytes, "largest that fits": paired.within_bytes}
LINE, FITS = READINGS
OURS = ("smartkv", "kvtc", "kvtc-rd", "mp-kvm", "sketch-aggregate", "sketch-topk")
QUANTIZED = (("uniform", LINE), ("uniform", FITS), ("kivi", LINE), ("kivi", FITS), ("kvtc", LINE))
EVICTED = (("h2o", LINE), ("streaming-llm", LINE), ("random", LINE), ("kvtc", LINE))
COLUMNS = dict(zip(OURS, (*[QUANTIZED] * 3, *[EVICTED] * 3)))  # of the section's tables, by method
ON_MINIATURES = (
    ("smartkv-0.3", "uniform", LINE), ("smartkv-0.5", "uniform", LINE), ("smartkv-0.5", "uniform", FITS),
    ("smartkv-0.5", "kivi", LINE), ("mp-kvm-96", "h2o", LINE), ("mp-kvm-96", "random", LINE),
)  # fmt: skip
SHARES = (0.1, 0.2, 0.3, 0.5)  # of float16's bytes, within which the section names the best
THIRD = 0.333
NEAR = 0.97  # of the least bytes of a curve: from there on it is read as if at its end
SURE = 0.05
ABOUT_BYTES = "Bytes are shares of float16's (on a CPU `full` holds float32, so more than 1). Live methods compute with what they hold."


def run(quick: bool, model: str = MODEL) -> Outcome:
    """Quick: two texts, half the context, half a chunk after it, some presets, one miniature, a small calibration.

    On another language model: every third text, and no codecs.
    """
    context, predict = (CONTEXT // 2, 8) if quick else (CONTEXT, PREDICT)
    size = calibration.QUICK if quick else calibration.FULL
    every = {**presets(), **references()}
    chosen = QUICK if quick else every if model == MODEL else ON_OTHERS
    live = [cached_at_once(name, every[name]) for name in every if name in chosen]
    ratios, qualities = (RATIOS[1::2], QUALITIES[1::2]) if quick else (RATIOS, QUALITIES)
    samples: list[dict[str, Any]] = []
    codecs: dict[str, Any] = {}
    beside = miniatures.names()[: 1 if quick else None] if model == MODEL else []
    for name in [model, *beside]:
        loaded, tokenizer = lm.load(name)
        variants = supported(loaded, live)
        if name == model == MODEL:
            codecs = calibration.codecs(loaded, tokenizer, size, ratios, qualities)
            variants += [codec_variant(codec, label, "float16") for label, codec in codecs.items()]
        held = texts.held_out(name, tokenizer, context + predict + 1)
        for text, tokens in track(list(held.items())[:: 6 if quick else 1 if model == MODEL else 3], name):
            records = measure_while_growing(loaded, variants, tokens, context)
            samples += [{"model": name, "text": text, **record} for record in records]
    config = {
        "model": model,
        "context": context,
        "predict": predict,
        "calibration": size,
        "codecs": {label: facts_of(codec) for label, codec in codecs.items()},
        "settings": {variant.name: dict(variant.settings) for variant in live},
    }
    return Outcome(config, samples, {"fidelity": fidelity(samples), "paired": comparisons(samples)})


def facts_of(codec: CacheCodec) -> dict[str, Any]:
    """Return what a result says of a codec."""
    facts = {"recent": codec.recent, "quality": codec.quality, "artifact_bytes": codec.artifacts.nbytes}
    return {**codec.artifacts.meta, **facts}


def fidelity(samples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return means over texts; of KL also the geometric mean, which is what the comparisons compare."""
    rows = []
    for model, variant in dict.fromkeys((sample["model"], sample["variant"]) for sample in samples):
        group = [s for s in samples if (s["model"], s["variant"]) == (model, variant)]
        keys = ("cache_bytes", "share_of_fp16", "kl", "top1_agreement", "perplexity_reference", "perplexity_delta")
        means = {key: round(fmean(sample[key] for sample in group), 6) for key in keys}
        typical = float(np.exp(np.mean(np.log([max(s["kl"], paired.LEAST_KL) for s in group]))))
        row = {"model": model, "variant": variant, "method": method_of(variant), "texts": len(group)}
        rows.append({**row, **means, "kl_geometric": typical})
    return rows


def comparisons(samples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Compare all but the references with every curve that they are not on, at their bytes, text by text."""
    rows = []
    for model in dict.fromkeys(sample["model"] for sample in samples):
        alike = [sample for sample in samples if sample["model"] == model]
        there = {name: method_of(name) for name in dict.fromkeys(sample["variant"] for sample in alike)}
        for curve in [curve for curve in CURVES if curve in there.values()]:
            for variant in [name for name in there if name not in references() and there[name] not in (curve, "full")]:
                ours = [sample for sample in alike if sample["variant"] == variant]
                for read, at in READINGS.items():
                    theirs = [at(s["cache_bytes"], curve_of(alike, curve, s["text"])) for s in ours]
                    result = paired.compare([s["kl"] for s in ours], theirs)
                    rows.append({"model": model, "variant": variant, "against": curve, "read": read, **result})
    return rows


def curve_of(samples: Sequence[dict[str, Any]], method: str, text: str) -> list[tuple[float, float]]:
    """Return (bytes, KL) of a method's variants on a text, and of float16: the method with nothing made smaller."""
    return [
        (s["cache_bytes"], s["kl"])
        for s in samples
        if s["text"] == text and (s["variant"] == FLOAT16 or method_of(s["variant"]) == method)
    ]


def brief(result: Result) -> str:
    """Say what a README shows: each method's closest preset of a third of float16's bytes or fewer, and what holds more."""
    ours = on_model(result)
    small = [row for row in ours if row["share_of_fp16"] <= THIRD and row["variant"] not in references()]
    best = {row["method"]: row for row in sorted(small, key=lambda row: -row["kl_geometric"])}
    chosen = sorted(best.values(), key=lambda row: row["kl_geometric"])
    more = [row for row in ours if row["variant"] in ("full", "int8", "smartkv-0.5")]
    return (
        f"{setting(result)} Of each method the preset with the least KL in a third of float16's bytes or fewer, and three"
        f" that hold more:\n\n{scores([*more, *chosen])}\n\n{ABOUT_BYTES}{about_files(result['config'])}"
    )


def on_model(result: Result) -> list[dict[str, Any]]:
    """Return the rows of the language model, most bytes first."""
    rows = [row for row in result["summary"]["fidelity"] if row["model"] == language_model(result)]
    return sorted(rows, key=lambda row: -row["share_of_fp16"])


def language_model(result: Result) -> str:
    """Return the name of the model that is no miniature."""
    return result["config"].get("model", MODEL)


def setting(result: Result) -> str:
    config, texts = result["config"], on_model(result)[0]["texts"]
    return (
        f"{NAMED[language_model(result)]} after {config['context']:,} tokens of {texts} held-out texts, the next {config['predict']} read through each"
        " cache."
    )


def scores(rows: Sequence[dict[str, Any]]) -> str:
    cells = [
        (f"`{row['variant']}`", f"{row['share_of_fp16']:.2f}", f"{row['kl']:.2g}",
         tables.percent(row["top1_agreement"]), f"{row['perplexity_reference']:.1f} {row['perplexity_delta']:+.2f}")
        for row in rows
    ]  # fmt: skip
    return tables.table(["method", "bytes", "KL", "top-1", "perplexity"], cells)


def section(result: Result) -> str:
    rows, config, main = result["summary"]["fidelity"], result["config"], language_model(result)
    ours = on_model(result)
    found = judged(result["summary"], main)
    parts = [
        f"{best_within(ours)} {counted(found, OURS)}",
        setting(result),
        scores(ours),
        f"{ABOUT_BYTES} `uniform-N`, `kivi-3` and `kivi-8` are no presets but points of curves.{about_files(config)}",
        "At equal bytes, text by text: KL in geometric means, 95 % intervals, and on how many texts it is lower."
        " Between its settings a method's KL is read off a straight line in the logarithms of bytes and KL, up to"
        " float16, which loses nothing; †: it has no setting of so few bytes, and its smallest counts, with more."
        f" Bold: p < {SURE}, Holm-corrected over the comparisons of a method, or of a miniature.",
    ]
    for columns in (QUANTIZED, EVICTED):
        lines = sorted(row["variant"] for row in ours if COLUMNS.get(row["method"]) == columns)
        picks: Picks = {name: [(main, name, *column) for column in columns] for name in lines}
        parts.append(compared([_curve(*column) for column in columns], picks, found))
    models = [model for model in dict.fromkeys(row["model"] for row in rows) if model != main]
    if not models:
        return "\n\n".join(parts)
    heads = [f"`{variant}`: {_curve(*column)}" for variant, *column in ON_MINIATURES]
    picks = {model: [(model, *pick) for pick in ON_MINIATURES] for model in models}
    parts.append(f"The same on miniatures, none of which was shown to look far back. {counted(found, models)}")
    return "\n\n".join([*parts, compared(heads, picks, found)])


def about_files(config: dict[str, Any]) -> str:
    """Say what the codecs' rows in the table mean; nothing where none was run."""
    artifacts = [codec["artifact_bytes"] for codec in config.get("codecs", {}).values()]
    if not artifacts:
        return ""
    return (
        " kvtc and kvtc-rd are files, counted whole, that are restored to full size to be used; tokens after them count 2 bytes an"
        f" element. They were calibrated on {config['calibration']['texts']} other texts; not counted are their artifacts,"
        f" which all caches of the model share: {tables.megabytes(min(artifacts))} to {tables.megabytes(max(artifacts))}."
    )


def judged(summary: dict[str, Any], main: str = MODEL) -> Found:
    """Return the comparisons that the section shows: each with its group, which is a method or a miniature, p corrected within it,
    and whether the other method has no setting of so few bytes."""
    methods = {row["variant"]: row["method"] for row in summary["fidelity"]}
    sizes = {(row["model"], row["variant"]): row["share_of_fp16"] for row in summary["fidelity"]}
    least: dict[tuple[str, str], float] = {}
    for (model, variant), size in sizes.items():
        least[model, methods[variant]] = min(size, least.get((model, methods[variant]), size))
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in summary["paired"]:
        column, method = (row["against"], row["read"]), methods[row["variant"]]
        if row["model"] == main and column in COLUMNS.get(method, ()):
            groups.setdefault(method, []).append(row)
        elif row["model"] != main and (row["variant"], *column) in ON_MINIATURES:
            groups.setdefault(row["model"], []).append(row)
    return {
        (row["model"], row["variant"], row["against"], row["read"]): {
            **row,
            "group": group,
            "p_holm": p,
            "beyond": sizes[row["model"], row["variant"]] < NEAR * least[row["model"], row["against"]],
        }
        for group, rows in groups.items()
        for row, p in zip(rows, paired.holm([row["p"] for row in rows]))
    }


def best_within(rows: Sequence[dict[str, Any]]) -> str:
    """Say which live cache, and which file, has the least KL within each of SHARES."""
    said = {"live caches": "", "files": ""}
    for kind in said:
        alike = [row for row in rows if row["method"].startswith("kvtc") == (kind == "files")]
        best = []
        for share in SHARES:
            fitting = [row for row in alike if row["share_of_fp16"] <= share]
            if fitting:
                best.append(f"`{min(fitting, key=lambda row: row['kl_geometric'])['variant']}` within {share:g}")
        said[kind] = ", ".join(best)
    return f"Least KL by share of float16's bytes: {'; '.join(f'of {kind} {best}' for kind, best in said.items() if best)}."


def counted(found: Found, groups: Iterable[str]) -> str:
    """Say how many comparisons of each group are beyond chance, in which direction."""
    said = []
    for group in groups:
        rows = [row for row in found.values() if row["group"] == group]
        sure = [row["kl_ratio"] < 1 for row in rows if row["p_holm"] < SURE]
        if rows:
            said.append(f"lower in {sum(sure)} and higher in {len(sure) - sum(sure)} of {len(rows)} for `{group}`")
    return f"Comparisons at equal bytes in which KL differs beyond chance: {', '.join(said)}."


def compared(
    heads: list[str], picks: dict[str, list[tuple[str, ...]]], found: dict[tuple[str, ...], dict[str, Any]]
) -> str:
    """Return a table of comparisons, with a column only where there are any."""
    there = [i for i in range(len(heads)) if any(keys[i] in found for keys in picks.values())]
    rows = [
        [f"`{name}`", *(_ratio(found[keys[i]]) if keys[i] in found else "" for i in there)]
        for name, keys in picks.items()
    ]
    return tables.table(["KL, times that of", *(heads[i] for i in there)], rows)


def _ratio(row: dict[str, Any]) -> str:
    low, high = row["kl_ratio_interval"]
    ratio = f"{row['kl_ratio']:.2g} ({tables.interval(low, high)})"
    return f"{f'**{ratio}**' if row['p_holm'] < SURE else ratio}, {row['better_on']} of {row['texts']}{' †' * row['beyond']}"


def _curve(against: str, read: str) -> str:
    return f"{against}, {'on a line' if read == LINE else read}"


def figure(result: Result) -> Figure:
    """Draw bytes against KL on each model, one line a method."""
    from benchmarks import figures

    rows = result["summary"]["fidelity"]
    models = list(dict.fromkeys(row["model"] for row in rows))
    methods = [method for method in dict.fromkeys(row["method"] for row in rows) if method != "full"]
    columns = min(3, len(models) + 1)
    drawn, panes = figures.panes(columns, len(models) // columns + 1, width=3.6)
    for axes, model in zip(panes.flat, models):
        for method in methods:
            alike = [row for row in rows if (row["model"], row["method"]) == (model, method)]
            points = sorted((row["share_of_fp16"], row["kl_geometric"]) for row in alike if row["share_of_fp16"] < 0.97)
            axes.plot(*zip(*points), ms=5, label=figures.named(method), **figures.look(method))
        axes.set(xscale="log", yscale="log", xlabel="bytes, of fp16's")
        axes.set_xticks(ticks := [0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0], [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        axes.set_title(model, loc="left", fontsize=10)
    for axes in panes[:, 0]:
        axes.set(ylabel="KL to the full cache (nats a token)")
    for axes in panes.flat[len(models) :]:
        axes.axis("off")
    panes.flat[len(models)].legend(*panes[0, 0].get_legend_handles_labels(), loc="upper left")
    return drawn
