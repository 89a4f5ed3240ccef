"""What each part of SmartKV is worth on SmolLM2: the plan's five ablations, at two budgets.

Each held-out text is read for 768 tokens in one chunk and then for 256 in chunks of 16, so that precisions are given
out many times over while KL to the full cache is measured. One part is replaced at a time: attention tracking by chance
(three seeds), dynamic by fixed orders, the moving average of importance by other decays, by sums and by importance that
never changes once a token is read, the exact allocator by others, equal shares of the layers by unequal ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from benchmarks import held_out, paired, tables
from benchmarks.held_out import MODEL
from benchmarks.live_runs import Variants, continued
from benchmarks.schema import Outcome, Result
from mlxkv import lm
from mlxkv.evaluate.statistics import sign_flip_test
from mlxkv.live import live_config
from mlxkv.live.methods import smartkv

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PHASE = 4
BASES = ("smartkv-0.3", "smartkv-0.5")
CONTEXT, PREDICT = 768, 256
SEEDS = 3
SEED = ", seed "  # before its number in the names of variants drawn by chance
PARTS: dict[str, dict[str, dict[str, Any]]] = {
    "attention tracking": {"random order": {"order": "random"}},
    "dynamic allocation": {"early tokens first": {"order": "early"}, "late tokens first": {"order": "late"}},
    "moving average": {
        "static importance": {"static": True},
        "sums (decay 1)": {"decay": 1.0},
        "decay 0.99": {"decay": 0.99},
        "decay 0.5": {"decay": 0.5},
    },
    "exact allocator": {"greedy allocator": {"allocator": "greedy"}, "one precision for all": {"allocator": "uniform"}},
    "equal layers": {"falling linearly": {"layers": "linear"}, "falling exponentially": {"layers": "exponential"}},
}
WORTH = 0.01  # the plan's question: more than 1 %
SURE = 0.05


@dataclass(frozen=True)
class Settings(smartkv.SmartKVConfig):
    """static: whether a token keeps the importance that it had after the chunk it came with."""

    static: bool = False


class Cache(smartkv.SmartKVCache):
    """SmartKV but for that."""

    settings: Settings

    def _weigh(self, mass: mx.array, count: int) -> None:
        before = self.importance
        super()._weigh(mass, count)
        if self.settings.static and before is not None:
            assert self.importance is not None
            self.importance[..., : before.shape[-1]] = before


def run(quick: bool) -> Outcome:
    """Quick: two texts, half the context, 32 tokens after it, one budget, one change of each part and one seed."""
    context, predict = (CONTEXT // 2, 32) if quick else (CONTEXT, PREDICT)
    model, tokenizer = lm.load(MODEL)
    kinds, rows = held_out.rows(MODEL, tokenizer, context + predict + 1)
    if quick:
        kinds, rows = kinds[::6], rows[::6]
    samples = []
    for base in BASES[: 1 if quick else None]:
        variants = {"full": live_config("full"), **changed(base, quick)}
        for record in continued(model, rows, context, variants, base):
            if record["variant"] != "full":
                samples.append({"base": base, **record, "text": kinds[record["text"]]})
    config = {
        "model": MODEL, "context": context, "predict": predict, "seeds": 1 if quick else SEEDS,
        "settings": {base: str(live_config(base)) for base in BASES}, "parts": PARTS,
    }  # fmt: skip
    return Outcome(config, samples, summarise(samples))


def changed(base: str, quick: bool) -> Variants:
    """The preset by its own name, and with one thing changed; where chance decides, once for each seed."""
    original = asdict(live_config(base))
    variants: dict[str, Any] = {base: live_config(base)}
    for changes in PARTS.values():
        for change, fields in list(changes.items())[: 1 if quick else None]:
            if fields.get("order") == "random":
                for seed in range(1 if quick else SEEDS):
                    variants[f"{change}{SEED}{seed}"] = Settings(**{**original, **fields, "seed": seed})
            else:
                variants[change] = Settings(**{**original, **fields})
    return variants


def summarise(samples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of every base and change: means over texts, the deviation over seeds, and the comparison with the base, text by
    text. Where there are seeds, a text counts with its mean over them, of KL with the geometric mean."""
    rows = []
    for base in dict.fromkeys(sample["base"] for sample in samples):
        alike = [sample for sample in samples if sample["base"] == base]
        original = merged(alike, base)
        for part, change in [("", base), *((part, change) for part, changes in PARTS.items() for change in changes)]:
            group = [sample for sample in alike if sample["variant"].split(SEED)[0] == change]
            if not group:
                continue
            scores = merged(alike, change)
            seeds = [
                fmean(s["kl"] for s in group if s["variant"] == name)
                for name in dict.fromkeys(s["variant"] for s in group)
            ]
            rows.append(
                {
                    "base": base,
                    "part": part,
                    "change": change,
                    "share_of_fp16": fmean(s["share_of_fp16"] for s in group),
                    **{key: fmean(values) for key, values in scores.items() if key != "kl"},
                    "kl": fmean(seeds),
                    "kl_of_seeds": seeds,
                    "kl_deviation": float(np.std(seeds, ddof=1)) if len(seeds) > 1 else None,
                    **paired.compare(scores["kl"], original["kl"]),
                    "top1_loss": float(np.mean(np.subtract(original["top1_agreement"], scores["top1_agreement"]))),
                    "top1_p": sign_flip_test(np.subtract(original["top1_agreement"], scores["top1_agreement"])),
                }
            )
    return rows


def merged(samples: Sequence[dict[str, Any]], change: str) -> dict[str, list[float]]:
    """Scores of each text, over seeds."""
    texts = dict.fromkeys(sample["text"] for sample in samples)
    group = [sample for sample in samples if sample["variant"].split(SEED)[0] == change]
    of_text = [[sample for sample in group if sample["text"] == text] for text in texts]
    return {
        "kl": [float(np.exp(np.mean([np.log(max(s["kl"], paired.LEAST_KL)) for s in own]))) for own in of_text],
        **{key: [fmean(s[key] for s in own) for own in of_text] for key in ("top1_agreement", "perplexity_delta")},
    }


def section(result: Result) -> str:
    config = result["config"]
    parts = []
    for base in dict.fromkeys(row["base"] for row in result["summary"]):
        original, *rows = corrected([row for row in result["summary"] if row["base"] == base])
        cells = [
            (row["part"], row["change"], f"{row['share_of_fp16']:.3f}", kl(row), ratio(row), f"{row['p_holm']:.2g}",
             f"{100 * row['top1_loss']:.2f} ({row['top1_p_holm']:.2g})", f"{row['perplexity_delta']:+.3f}")
            for row in rows
        ]  # fmt: skip
        heads = [
            "part",
            "replaced by",
            "bytes",
            "KL",
            "times the preset's",
            "p",
            "top-1 lost, points (p)",
            "perplexity",
        ]
        parts += [
            verdict(base, rows),
            f"`{base}` itself: {original['share_of_fp16']:.3f} of float16's bytes, KL {kl(original)},"
            f" top-1 {tables.percent(original['top1_agreement'])}, perplexity {original['perplexity_delta']:+.3f}.",
            tables.table(heads, cells),
        ]
    parts.append(
        f"{original['texts']} held-out texts, {config['context']:,} tokens in one chunk, {config['predict']} after it."
        " Ratios are geometric means over texts with 95 % intervals; p is exact, two-sided, and Holm-corrected over"
        f" the changes at one budget. Seeds of chance: {config['seeds']}; of several, mean and deviation."
    )
    return "\n\n".join(parts)


def corrected(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of one base, the changed ones with p corrected for their number."""
    original, *changes = rows
    ps = zip(*(paired.holm([row[key] for row in changes]) for key in ("p", "top1_p")))
    return [original, *({**row, "p_holm": p, "top1_p_holm": top1} for row, (p, top1) in zip(changes, ps))]


def verdict(base: str, rows: Sequence[dict[str, Any]]) -> str:
    """Whether each part is worth more than WORTH: whatever replaces it, KL or top-1 is worse by that, beyond chance."""
    worth: dict[str, list[str]] = {"KL rises": [], "top-1 agreement falls": []}
    parts = list(dict.fromkeys(row["part"] for row in rows))
    for part in parts:
        own = [row for row in rows if row["part"] == part]
        if all(row["kl_ratio"] > 1 + WORTH and row["p_holm"] < SURE for row in own):
            worth["KL rises"].append(part)
        if all(row["top1_loss"] > WORTH and row["top1_p_holm"] < SURE for row in own):
            worth["top-1 agreement falls"].append(part)
    said = []
    for (what, found), unit in zip(worth.items(), ("%", "point")):
        change = f"{what} by more than {100 * WORTH:g} {unit} beyond chance"
        said.append(f"{change} without {', '.join(found)}" if found else f"in no case {change}")
    holds = [what for what, found in worth.items() if found == parts]
    conclusion = f"holds where {' and '.join(holds)}" if holds else "does not hold"
    return (
        f"At `{base}`, whatever takes the part's place, {'; '.join(said)}. That each of the {len(parts)} parts is worth"
        f" more than {100 * WORTH:g} % {conclusion}."
    )


def kl(row: Mapping[str, Any]) -> str:
    return f"{row['kl']:.2g}" + (f" ± {row['kl_deviation']:.1g}" if row["kl_deviation"] is not None else "")


def ratio(row: Mapping[str, Any]) -> str:
    return f"{row['kl_ratio']:.3g} ({tables.interval(*row['kl_ratio_interval'])}), lower on {row['better_on']}"


def figure(result: Result) -> Figure:
    """KL of every change over the preset's, with 95 % intervals, a pane for each budget."""
    from benchmarks import figures

    bases = list(dict.fromkeys(row["base"] for row in result["summary"]))
    drawn, panes = figures.panes(len(bases), width=4.2, sharey=True)
    for axes, base in zip(panes[0], bases):
        rows = [row for row in result["summary"] if row["base"] == base and row["part"]]
        ratios = np.array([row["kl_ratio"] for row in rows])
        ends = np.array([row["kl_ratio_interval"] for row in rows]).T
        colors = [figures.COLORS[list(PARTS).index(row["part"])] for row in rows]
        errors = np.maximum([ratios - ends[0], ends[1] - ratios], 0)
        names = [f"{row['part']}: {row['change']}" for row in rows]
        axes.barh(names, ratios - 1, left=1, color=colors, xerr=errors, capsize=3)
        axes.axvline(1, color="black", linewidth=1)
        axes.set(xscale="log", xlabel=f"KL, times that of {base}")
        axes.set_xticks(ticks := [0.5, 1, 2, 4], [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        axes.grid(axis="y", visible=False)
    panes[0, 0].invert_yaxis()
    return drawn
