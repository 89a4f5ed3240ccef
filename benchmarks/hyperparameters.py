"""Do better settings than the presets' exist, and are they better on other text too?

One setting at a time of smartkv-0.3 and mp-kvm-96 is changed, on half of sixteen held-out texts: SmolLM2 reads 1,024 tokens in
one chunk and the next 64 in chunks of 16. The single change with the lowest KL, and all settings each at its best,
then run against the preset on the other half. SmartKV's budget is swept but never chosen, as it buys quality with
bytes; where MP-KVM's window or flush takes room, centroids make it.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks import paired, texts
from benchmarks.held_out import CONTEXT, MODEL, PREDICT
from benchmarks.live_runs import Variants, continued
from benchmarks.schema import Outcome, Result
from benchmarks.tables import interval, percent, table
from mlxkv import lm
from mlxkv.live import live_config

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PHASE = 6

Configurations = dict[str, dict[str, dict[str, Any]]]  # settings that differ, by preset and by name
AXES: dict[str, dict[str, Sequence[Any]]] = {
    "smartkv-0.3": {
        "budget": (0.4, 0.5, 0.6, 0.7),
        "decay": (0.85, 0.95),
        "interval": (8, 32, 64),
        "allocator": ("greedy", "uniform"),
        "layers": ("linear", "exponential"),
    },
    "mp-kvm-96": {
        "window": (8, 32),
        "flush": (16, 64),
        "decay": (0.95, 0.99, 1.0),
        "value_weight": (0.0, 0.5, 2.0),
        "metric": ("cosine",),
        "similarity": (-40.0, -10.0),  # minus squared distances; neighbours lie 5 to 100 apart, farther in late layers
        "quantile": (0.9, 0.5),
        "merge_similarity": (-400.0, -100.0),
        "ema": (0.9,),
        "persistence": (0.99,),
    },
}
NEVER_CHOSEN = "budget"
# Two ways to say the same, and numbers that are squared distances.
EXCLUSIVE = ({"similarity", "quantile"}, {"metric", "similarity"}, {"metric", "merge_similarity"})
DOCUMENTATION = 8  # stretches of it, beside the eight other kinds
SURE = 0.05
DEFAULT, SINGLE, TOGETHER = "default", "best change", "best of each"


def run(quick: bool) -> Outcome:
    context, predict = (CONTEXT // 3, PREDICT // 4) if quick else (CONTEXT, PREDICT)
    model, tokenizer = lm.load(MODEL)
    kinds, rows = held_out(tokenizer, context + predict + 1)
    if quick:
        kinds, rows = kinds[::4], rows[::4]
    axes = {preset: dict(list(of_preset.items())[: 3 if quick else None]) for preset, of_preset in AXES.items()}
    changes = {preset: single_changes(of_preset, 1 if quick else None) for preset, of_preset in axes.items()}
    first = measured(model, kinds[::2], rows[::2], context, "tuning", {
        preset: {DEFAULT: {}} | found for preset, found in changes.items()
    })  # fmt: skip
    swept = sweep(first)
    chosen: Configurations = {preset: {DEFAULT: {}} | choice(preset, changes[preset], swept) for preset in AXES}
    second = measured(model, kinds[1::2], rows[1::2], context, "other", chosen)
    config = {
        "model": MODEL, "context": context, "predict": predict, "tuning": kinds[::2], "other": kinds[1::2],
        "chosen": chosen, "settings": {preset: str(live_config(preset)) for preset in AXES},
    }  # fmt: skip
    return Outcome(config, first + second, {"sweep": swept, "other": confirmed(second, swept)})


def held_out(tokenizer: Any, length: int) -> tuple[list[str], np.ndarray]:
    """Sixteen texts `[16, length]` and what each is; each half, every second one, has as many of every sort."""
    kinds = {kind: tokenizer.encode(read())[:length] for kind, read in texts.OTHER_KINDS.items()}
    rows = {f"documentation-{i}": row for i, row in enumerate(texts.same_kind(tokenizer, length, DOCUMENTATION))}
    return [*kinds, *rows], np.array([*kinds.values(), *rows.values()])


def single_changes(axes: dict[str, Sequence[Any]], most: int | None) -> dict[str, dict[str, Any]]:
    """By name the settings that differ from the preset's; at most so many values of each axis."""
    return {f"{axis} {value}": {axis: value} for axis, values in axes.items() for value in values[:most]}


def configured(preset: str, overrides: dict[str, Any]) -> Any:
    """The preset with settings replaced, and as many more or fewer centroids as its tail got shorter or longer."""
    settings = live_config(preset, **overrides)
    if not hasattr(settings, "centroids"):
        return settings
    base = live_config(preset)
    room = round(tail(base) - tail(settings))
    return live_config(preset, **overrides, centroids=base.centroids + room)


def tail(settings: Any) -> float:
    """Tokens that MP-KVM keeps as they are, on average."""
    return settings.window + (settings.flush - 1) / 2


def measured(
    model: Any, kinds: Sequence[str], rows: np.ndarray, context: int, half: str,
    configurations: Configurations,
) -> list[dict[str, Any]]:  # fmt: skip
    """Records of all configurations of all presets on one half of the texts."""
    named = {
        f"{preset}, {name}": (preset, name, configured(preset, overrides))
        for preset, of_preset in configurations.items()
        for name, overrides in of_preset.items()
    }
    variants: Variants = {"full": live_config("full"), **{name: settings for name, (_, _, settings) in named.items()}}
    return [
        {"half": half, "preset": named[r["variant"]][0], "configuration": named[r["variant"]][1], **r, "text": kinds[r["text"]]}
        for r in continued(model, rows, context, variants, half)
        if r["variant"] != "full"
    ]  # fmt: skip


def sweep(samples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each configuration: bytes and KL, and that against the preset's own on the same texts."""
    rows = []
    for preset, name in dict.fromkeys((s["preset"], s["configuration"]) for s in samples):
        ours, theirs = (
            [s for s in samples if (s["preset"], s["configuration"]) == (preset, which)] for which in (name, DEFAULT)
        )
        kls = [s["kl"] for s in ours]
        rows.append({
            "preset": preset, "configuration": name,
            "share_of_fp16": fmean(s["share_of_fp16"] for s in ours),
            "kl_geometric": float(np.exp(np.log(np.maximum(kls, paired.LEAST_KL)).mean())),
            "top1_agreement": fmean(s["top1_agreement"] for s in ours),
            **paired.compare(kls, [s["kl"] for s in theirs]),
        })  # fmt: skip
    return rows


def choice(
    preset: str, changes: dict[str, dict[str, Any]], rows: Sequence[dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """The best single change and the best value of each setting together, by KL and then by bytes; only what is better than
    the preset, and the two only once where they are the same."""
    order = {
        r["configuration"]: (r["kl_geometric"], r["share_of_fp16"])
        for r in rows
        if r["preset"] == preset and not r["configuration"].startswith(NEVER_CHOSEN)
    }
    better = sorted((name for name in order if order[name] < order[DEFAULT]), key=lambda name: order[name])
    together: dict[str, Any] = {}
    for name in better:
        for axis, value in changes[name].items():
            if compatible(axis, together):
                together.setdefault(axis, value)
    chosen = {f"{SINGLE} ({name})": changes[name] for name in better[:1]}
    if len(together) > 1:
        chosen[f"{TOGETHER} ({described(together)})"] = together
    return chosen


def compatible(axis: str, settings: dict[str, Any]) -> bool:
    """Whether a setting may stand beside others."""
    return not any(axis in pair and pair & settings.keys() for pair in EXCLUSIVE)


def described(overrides: dict[str, Any]) -> str:
    return ", ".join(f"{axis} {value}" for axis, value in overrides.items())


def confirmed(samples: Sequence[dict[str, Any]], swept: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of what was chosen on the other half, with the ratio that it was chosen for, and p corrected for all."""
    tuned = {(row["preset"], f"{SINGLE} ({row['configuration']})"): row["kl_ratio"] for row in swept}
    rows = [row for row in sweep(samples) if row["configuration"] != DEFAULT]
    for row, p in zip(rows, paired.holm([row["p"] for row in rows])):
        row |= {"tuning_ratio": tuned.get((row["preset"], row["configuration"])), "p_holm": p}
    return rows


def section(result: Result) -> str:
    swept, other, config = result["summary"]["sweep"], result["summary"]["other"], result["config"]
    sentences = [verdict(row) for row in other]
    for preset in AXES:
        if preset not in [row["preset"] for row in other]:
            sentences.append(f"No change of {preset} has a lower KL than the preset on the tuning half.")
    texts_each, comparisons = len(config["other"]), len(other)
    sentences.append(
        f"Each half has {texts_each} texts; p is corrected by Holm for {comparisons} comparisons and cannot be below "
        f"{2 / 2**texts_each:.2g} for one alone."
    )
    chosen = [
        (
            f"{row['preset']}, {row['configuration']}", f"{row['tuning_ratio']:.3f}" if row["tuning_ratio"] else "",
            f"{row['kl_ratio']:.3f}", interval(*row["kl_ratio_interval"]), f"{row['p_holm']:.3f}",
            percent(row["share_of_fp16"]),
        )
        for row in other
    ]  # fmt: skip
    changes = [
        (
            f"{row['preset']}, {row['configuration']}", percent(row["share_of_fp16"]), f"{row['kl_geometric']:.3g}",
            f"{row['kl_ratio']:.3f}", interval(*row["kl_ratio_interval"]), percent(row["top1_agreement"]),
        )
        for row in swept
    ]  # fmt: skip
    return "\n\n".join([
        " ".join(sentences),
        table(("on the other half", "KL ratio when chosen", "KL ratio", "95 % interval", "p", "bytes of fp16's"), chosen),
        table(("on the tuning half", "bytes of fp16's", "KL", "KL ratio", "95 % interval", "top-1 agreement"), changes),
    ])  # fmt: skip


def verdict(row: dict[str, Any]) -> str:
    """What became of a choice on the other half."""
    ratio = f"{row['kl_ratio']:.2f} times the KL of the preset"
    if row["p_holm"] < SURE:
        outcome = "the gain survives" if row["kl_ratio"] < 1 else "the gain turns into a loss"
    else:
        outcome = "no difference from the preset is certain"
    was = f", chosen at {row['tuning_ratio']:.2f} times," if row["tuning_ratio"] else ""
    return f"{row['preset']} with {row['configuration']}{was} has {ratio} on the other half: {outcome}."


def figure(result: Result) -> Figure:
    """KL against the preset's for every change, with intervals, and for what was chosen on the other half."""
    from benchmarks import figures

    summary = result["summary"]
    drawn, axes = figures.panes(columns=len(AXES), width=5.6, height=6.4)
    for pane, preset in zip(axes[0], AXES):
        labels: list[str] = []
        for rows, color, marker, label in (
            (summary["sweep"], figures.COLORS[0], "o", "tuning half"),
            (summary["other"], figures.COLORS[1], "s", "other half"),
        ):
            points = [row for row in rows if row["preset"] == preset and row["configuration"] != DEFAULT]
            ratio = np.array([row["kl_ratio"] for row in points])
            ends = np.array([row["kl_ratio_interval"] for row in points]).reshape(-1, 2).T
            places = len(labels) + np.arange(len(points))
            pane.errorbar(ratio, places, xerr=np.abs(ends - ratio), ls="", color=color, marker=marker, ms=4, lw=0.8, label=label)  # fmt: skip
            labels += [row["configuration"].replace(" (", "\n(") for row in points]
        pane.axvline(1, color="#000000", lw=0.8)
        pane.set(xscale="log", xlabel="KL, of the preset's on the same texts")
        pane.set_yticks(range(len(labels)), labels, fontsize=7)
        pane.invert_yaxis()
        pane.set_title(preset, loc="left", fontsize=10)
    axes[0, 0].legend()
    return drawn
