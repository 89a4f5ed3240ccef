"""What each part of MP-KVM is worth on SmolLM2 at a tenth of the bytes, beside H2O, StreamingLLM and chance.

1,024 tokens of ten held-out texts in one chunk, then the next 64 in chunks of 16, as in benchmarks.live_methods: KL to
the full cache and measured bytes, text by text. The plan's four ablations change one thing at a time, or two: the
rotation of what is clustered, the weights, what is merged with what, and what attention is told of counts and
positions. All take the same bytes but for a few per cent. Energy loss is the attention mass of the last 64 queries that
centroids misplace among the tokens that have left the window, each token counted to its nearest centroid, and with the
diversity term.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from statistics import fmean
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from benchmarks import held_out, mp_kvm_variants, paired
from benchmarks.held_out import CONTEXT, MODEL, PREDICT
from benchmarks.live_runs import Variants, continued
from benchmarks.schema import Outcome, Result
from benchmarks.tables import interval, percent, table
from mlxkv import live, lm
from mlxkv.kernels.centroids import assign
from mlxkv.live import live_config
from mlxkv.live.clustering import energy_loss
from mlxkv.models import cache_spec
from mlxkv.spec import CacheSpec

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PHASE = 4
BASE = "mp-kvm-96"
SEEDS = 3  # of what is kept or merged by chance
OTHERS: dict[str, dict[str, Any]] = {
    "h2o-96": {},
    "streaming-llm-96": {},
    **{f"random-96, seed {seed}": {"seed": seed} for seed in range(SEEDS)},
}
ABLATIONS: dict[str, dict[str, dict[str, Any]]] = {
    "pre- or post-RoPE": {"rotation: clustered as rotated": {"rotation": "kept"}},
    "weights": {"weights: 1 for each token": {"weights": "count"}},
    "clustering": {
        **{f"merged by chance, seed {seed}": {"chance": seed} for seed in range(SEEDS)},
        **{f"weights: 1, and merged by chance, seed {seed}": {"weights": "count", "chance": seed} for seed in range(SEEDS)},
        "partition: shared by heads": {"partition": "shared"},
        "metric: cosine": {"metric": "cosine"},
        "values not compared": {"value_weight": 0.0},
    },
    "counts and positions": {
        "no counts in the scores": {"counted": False},
        "weights: 1, and no counts in the scores": {"weights": "count", "counted": False},
        "rotation: place of the slot": {"rotation": "slot"},
    },
}  # fmt: skip
PARTS = (BASE, *ABLATIONS, "another method")
CHANGES = {change: settings for changes in ABLATIONS.values() for change, settings in changes.items()}
QUICK = ("weights: 1 for each token", "no counts in the scores")
ASKED = 64  # last queries, whose attention the energy loss is about
DIVERSITY = 1.0
SURE = 0.05  # corrected p below which a difference is called sure


def run(quick: bool) -> Outcome:
    model, tokenizer = lm.load(MODEL)
    context, predict = (CONTEXT // 2, PREDICT // 2) if quick else (CONTEXT, PREDICT)
    kinds, rows = held_out.rows(MODEL, tokenizer, context + predict + 1)
    if quick:
        kinds, rows = kinds[::5], rows[::5]
    variants = ours(QUICK if quick else CHANGES)
    others = {
        name: live_config(_unseeded(name), **settings)
        for name, settings in list(OTHERS.items())[: 2 if quick else None]
    }
    records = continued(model, rows, context, {"full": live_config("full"), **others, **variants}, MODEL)
    samples = [{"measure": "fidelity", **record, "text": kinds[record["text"]]} for record in records]
    samples += [{"measure": "energy", **record} for record in energies(model, rows[0, :context], variants)]
    config = {
        "context": context, "predict": predict, "queries": ASKED, "diversity": DIVERSITY, "base": BASE,
        "settings": {name: str(settings) for name, settings in {**others, **variants}.items()},
    }  # fmt: skip
    return Outcome(config, samples, summarise(samples))


def ours(changes: Iterable[str]) -> Variants:
    """The preset, and the preset with one thing changed."""
    base = asdict(live_config(BASE))
    return {BASE: live_config(BASE)} | {
        change: mp_kvm_variants.Settings(**{**base, **CHANGES[change]}) for change in changes
    }


class Recorder(live.LayerCache):
    """Keeps a prompt's keys, values and last queries, scaled as attention scales them."""

    def __init__(self, spec: CacheSpec, layer: int) -> None:
        super().__init__(None, spec, layer)
        self.seen: tuple[mx.array, mx.array, mx.array, mx.array] | None = None

    def buckets(self) -> list[Any]:
        return []

    def absorb(self, keys: mx.array, values: mx.array, mass: mx.array | None) -> None:
        """Nothing: `attend` has it all."""

    def attend(
        self, queries: mx.array, keys: mx.array, values: mx.array, scale: float, mask: mx.array | str | None = None
    ) -> mx.array:
        mass = live.attention_mass(queries, keys, scale, mask, ASKED, keys.shape[1])
        self.seen = keys, values, queries[:, :, -ASKED:] * scale, mass
        return super().attend(queries, keys, values, scale, mask)


def energies(model: Any, tokens: np.ndarray, variants: Variants) -> list[dict[str, Any]]:
    """Energy loss of each variant in each layer of one text, a mean over kv heads."""
    spec, caches = cache_spec(model), make_prompt_cache(model)
    for layer in spec.attention_layers:
        caches[layer] = Recorder(spec, layer)
    live.attach(model)
    mx.eval(model(mx.array(tokens[None]), cache=caches)[:, -1], [caches[i].seen for i in spec.attention_layers])
    records = []
    for name, settings in variants.items():
        if settings.partition == "shared":  # its clusters are of all heads' keys together
            continue
        for layer in spec.attention_layers:
            cache = live.cache_class_of(settings)(settings, spec, layer)
            keys, values, queries, mass = caches[layer].seen
            cache.offset = len(tokens)
            cache.absorb(keys, values, mass if cache.observation_window else None)
            records.append({"variant": name, "layer": layer, **energy(cache, keys, values, queries)})
    return records


def energy(cache: Any, keys: mx.array, values: mx.array, queries: mx.array) -> dict[str, float]:
    """Misplaced mass, and the diversity term, of one layer's centroids among the tokens `[1, H, T, D]` they stand for."""
    owner = owners(cache, keys, values)
    H, gone = owner.shape
    arguments = (
        queries[0].reshape(H, -1, queries.shape[-1]), keys[0, :, :gone], owner, cache.centroids[0][0],
        cache.bias()[0, :, : cache.centroids[0].shape[2]],
    )  # fmt: skip
    loss, with_diversity = energy_loss(*arguments), energy_loss(*arguments, diversity=DIVERSITY)
    return {"misplaced": float(loss.mean()), "diversity": float((with_diversity - loss).mean())}


def owners(cache: Any, keys: mx.array, values: mx.array) -> mx.array:
    """The nearest centroid of each token that has left the window, `[B * H, T - window]`, of keys, rotated, and values
    `[B, H, T, D]`; compared as the cache, whose heads are clustered each by itself, compares them."""
    clusters, gone = cache.clusters(), keys.shape[2] - cache.tail[0].shape[2]
    weight = cache.settings.value_weight
    plain = keys if cache.settings.rotation == "kept" else cache.slots[0].rope.unrotate(keys.astype(mx.float32))
    tokens = mx.concatenate([plain[:, :, :gone], weight * values[:, :, :gone]], axis=-1).flatten(0, 1)
    means = mx.concatenate([clusters.keys, weight * clusters.values], axis=-1)
    return assign(tokens, means, clusters.counts, cache.settings.metric)[0]


def summarise(samples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of every variant bytes, KL, what it is of the preset's, and energy loss; where there are seeds, each text's geometric
    mean of KL over them is compared, and each seed's own over texts is given."""
    fidelity, energy = ([s for s in samples if s["measure"] == measure] for measure in ("fidelity", "energy"))
    base = {s["text"]: s["kl"] for s in fidelity if s["variant"] == BASE}
    rows = []
    for variant in dict.fromkeys(_unseeded(s["variant"]) for s in fidelity if s["variant"] != "full"):
        group = [s for s in fidelity if _unseeded(s["variant"]) == variant]
        logs = np.log([[max(s["kl"], paired.LEAST_KL) for s in group if s["text"] == text] for text in base])
        row: dict[str, Any] = {
            "variant": variant,
            "share_of_fp16": round(fmean(s["share_of_fp16"] for s in group), 5),
            "kl": round(fmean(s["kl"] for s in group), 5),
            "kl_geometric": float(np.exp(logs.mean())),
            "kl_of_seeds": np.exp(logs.mean(axis=0)).tolist(),
            "top1_agreement": round(fmean(s["top1_agreement"] for s in group), 4),
            "perplexity_delta": round(fmean(s["perplexity_delta"] for s in group), 4),
        }
        lost = [s for s in energy if _unseeded(s["variant"]) == variant]
        row |= {key: round(fmean(s[key] for s in lost), 4) for key in ("misplaced", "diversity") if lost}
        rows.append({**row, **paired.compare(np.exp(logs.mean(axis=1)).tolist(), list(base.values()))})
    return rows


def _unseeded(variant: str) -> str:
    return variant.split(", seed")[0]


def section(result: Result) -> str:
    rows = sorted(summarise(result["samples"]), key=lambda row: PARTS.index(_part(row)))
    base, rows = rows[0], rows[1:]
    corrected = paired.holm([row["p"] for row in rows])
    lows, highs = zip(*(row["kl_ratio_interval"] for row in rows))
    verdicts = {
        "raise": [row["variant"] for row, low in zip(rows, lows) if low > 1],
        "lower": [row["variant"] for row, high in zip(rows, highs) if high < 1],
        "do neither for sure": [row["variant"] for row, low, high in zip(rows, lows, highs) if low <= 1 <= high],
    }
    said = "; ".join(
        f"{verdict}: {', '.join(f'`{name}`' for name in names) or 'none'}" for verdict, names in verdicts.items()
    )
    cells = [
        [
            f"{_part(row)}: {row['variant']}", percent(row["share_of_fp16"]), _kl(row), f"{row['kl_ratio']:.2f}",
            interval(*row["kl_ratio_interval"]), f"{row['better_on']} of {row['texts']}", f"{row['p']:.2g}", f"{p:.2g}",
            f"{row['misplaced']:.3f}" if "misplaced" in row else "",
        ]
        for row, p in zip(rows, corrected)
    ]  # fmt: skip
    heads = ["", "bytes", "KL", "times", "95 % of it", "better on", "p", "p, Holm", "misplaced"]
    return "\n\n".join(
        [
            f"`{BASE}` has a KL of {_kl(base)} nats a token in {percent(base['share_of_fp16'])} of float16's bytes and misplaces"
            f" {base['misplaced']:.3f} of the attention mass. By the 95 % intervals of the ratio of KL, these {said}.",
            f"Corrected for {len(rows)} comparisons as Holm does, p is below {SURE} for {sum(p < SURE for p in corrected)} of"
            f" them; the least that it can be with {base['texts']} texts is {min(1, len(rows) * 2 / 2 ** base['texts']):.2g}.",
            table(heads, cells),
        ]
    )


def _part(row: dict[str, Any]) -> str:
    """Of PARTS the one that a variant is about."""
    named = {_unseeded(change): name for name, changes in ABLATIONS.items() for change in changes}
    return BASE if row["variant"] == BASE else named.get(row["variant"], "another method")


def _kl(row: dict[str, Any]) -> str:
    seeds = row["kl_of_seeds"]
    return f"{row['kl_geometric']:.4f}" + (f" ± {np.std(seeds, ddof=1):.4f}" if len(seeds) > 1 else "")


def figure(result: Result) -> Figure:
    """KL of every variant as bars, the preset's as a line through all."""
    from benchmarks import figures

    rows = sorted(result["summary"], key=lambda row: -row["kl_geometric"])
    drawn, panes = figures.panes(width=8, height=4.6)
    axes = panes[0, 0]
    for part, color in zip(PARTS, figures.COLORS):
        of_it = [row for row in rows if _part(row) == part]
        places = [rows.index(row) for row in of_it]
        bars = axes.barh(places, [row["kl_geometric"] for row in of_it], color=color, label=part)
        axes.bar_label(
            bars, [f"{row['kl_geometric']:.3f}, {percent(row['share_of_fp16'])} of bytes" for row in of_it], padding=3
        )
    axes.set_yticks(range(len(rows)), [row["variant"] for row in rows])
    axes.axvline(
        next(row["kl_geometric"] for row in rows if row["variant"] == BASE), color=figures.COLORS[0], lw=0.8, ls=":"
    )
    axes.set(xlabel="KL to the full cache (nats a token, geometric mean over texts)")
    axes.set_xlim(0, 1.4 * rows[0]["kl_geometric"])
    axes.grid(visible=False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper right")
    return drawn
