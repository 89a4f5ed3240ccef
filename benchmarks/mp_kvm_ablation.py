"""What each part of MP-KVM is worth on SmolLM2 at a tenth of the bytes, beside H2O, StreamingLLM and chance.

1,024 held-out tokens in one chunk, then the next 64 in chunks of 16, as in benchmarks.live_methods: KL to the full cache
and measured bytes, text by text. Every change is compared with MP-KVM as its preset has it, all in the same bytes but
for a few per cent. Energy loss is the attention mass of the last 64 queries that centroids misplace among the tokens
that have left the window, each token counted to its nearest centroid, and with the diversity term.

    python -m benchmarks.mp_kvm_ablation [--quick]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from benchmarks import mp_kvm_variants, paired
from benchmarks.live_methods import CONTEXT, MODEL, PREDICT, held_out
from benchmarks.live_runs import Variants, continued
from benchmarks.schema import RESULTS, write_result
from mlxkv import live, lm
from mlxkv.cache import CacheSpec
from mlxkv.clustering import energy_loss
from mlxkv.kernels.centroids import assign
from mlxkv.models import cache_spec
from mlxkv.presets import live_settings

BASE = "mp-kvm-96"
OTHERS = ("h2o-96", "random-96", "streaming-llm-96")
CHANGES: dict[str, dict[str, Any]] = {
    "weights: 1 for each token": {"weights": "count"},
    "weights: 1, and no counts in the scores": {"weights": "count", "counted": False},
    "weights: 1, and merged by chance": {"weights": "count", "chance": True},
    "no counts in the scores": {"counted": False},
    "merged by chance": {"chance": True},
    "rotation: place of the slot": {"rotation": "slot"},
    "rotation: clustered as rotated": {"rotation": "kept"},
    "partition: shared by heads": {"partition": "shared"},
    "metric: cosine": {"metric": "cosine"},
    "values not compared": {"value_weight": 0.0},
}
TEXTS = 5
ASKED = 64  # last queries, whose attention the energy loss is about
DIVERSITY = 1.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one text, three variants; writes nothing")
    quick = parser.parse_args().quick
    model, tokenizer = lm.load(MODEL)
    kinds, rows = held_out(MODEL, tokenizer, CONTEXT + PREDICT + 1)
    every = len(kinds) if quick else -(-len(kinds) // TEXTS)
    kinds, rows = kinds[::every], rows[::every]
    variants = dict(list(ours().items())[: 2 if quick else None])
    others = {name: live_settings(name) for name in OTHERS[: 1 if quick else None]}
    records = continued(model, rows, CONTEXT, {"full": live_settings("full"), **others, **variants}, MODEL)
    samples = [{"measure": "fidelity", **record, "text": kinds[record["text"]]} for record in records]
    samples += [{"measure": "energy", **record} for record in energies(model, rows[0, :CONTEXT], variants)]
    summary = summarise(samples)
    for row in summary:
        print(row)
    if not quick:
        config = {
            "context": CONTEXT, "predict": PREDICT, "queries": ASKED, "diversity": DIVERSITY,
            "settings": {name: str(settings) for name, settings in {**others, **variants}.items()},
        }  # fmt: skip
        print(write_result("mp_kvm_ablation", config, samples, summary), plot(summary))


def ours() -> Variants:
    """The preset, and the preset with one thing changed."""
    base = asdict(live_settings(BASE))
    return {BASE: live_settings(BASE)} | {
        change: mp_kvm_variants.Settings(**{**base, **changed}) for change, changed in CHANGES.items()
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
            cache = live.cache_of(settings)(settings, spec, layer)
            keys, values, queries, mass = caches[layer].seen
            cache.offset = len(tokens)
            cache.absorb(keys, values, mass if cache.mass_queries else None)
            records.append({"variant": name, "layer": layer, **energy(cache, keys, values, queries)})
    return records


def energy(cache: Any, keys: mx.array, values: mx.array, queries: mx.array) -> dict[str, float]:
    """Misplaced mass, and the diversity term, of one layer's centroids among the tokens `[1, H, T, D]` they stand for."""
    clusters, gone = cache.clusters(), keys.shape[2] - cache.tail[0].shape[2]
    rope, weight = cache.slots[0].rope, cache.settings.value_weight
    plain = keys if cache.settings.rotation == "kept" else rope.unrotate(keys.astype(mx.float32))
    tokens = mx.concatenate([plain[0, :, :gone], weight * values[0, :, :gone]], axis=-1)
    means = mx.concatenate([clusters.keys, weight * clusters.values], axis=-1)
    owner, _ = assign(tokens, means, clusters.counts, cache.settings.metric)
    H = keys.shape[1]
    arguments = (
        queries[0].reshape(H, -1, queries.shape[-1]), keys[0, :, :gone], owner, cache.centroids[0][0],
        cache.bias()[0, :, : means.shape[1]],
    )  # fmt: skip
    loss, with_diversity = energy_loss(*arguments), energy_loss(*arguments, diversity=DIVERSITY)
    return {"misplaced": float(loss.mean()), "diversity": float((with_diversity - loss).mean())}


def summarise(samples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of every variant bytes, KL, what it is of the preset's, and energy loss."""
    fidelity = [s for s in samples if s["measure"] == "fidelity"]
    base = {s["text"]: s["kl"] for s in fidelity if s["variant"] == BASE}
    rows = []
    for variant in dict.fromkeys(s["variant"] for s in fidelity if s["variant"] != "full"):
        group = [s for s in fidelity if s["variant"] == variant]
        energy = [s for s in samples if s["measure"] == "energy" and s["variant"] == variant]
        row: dict[str, Any] = {
            "variant": variant,
            "share_of_fp16": round(fmean(s["share_of_fp16"] for s in group), 5),
            "kl": round(fmean(s["kl"] for s in group), 5),
            "kl_geometric": float(np.exp(np.mean(np.log([max(s["kl"], paired.LEAST_KL) for s in group])))),
            "top1_agreement": round(fmean(s["top1_agreement"] for s in group), 4),
            "perplexity_delta": round(fmean(s["perplexity_delta"] for s in group), 4),
        }
        row |= {key: round(fmean(s[key] for s in energy), 4) for key in ("misplaced", "diversity") if energy}
        rows.append({**row, **paired.compare([s["kl"] for s in group], [base[s["text"]] for s in group])})
    return rows


def plot(rows: Sequence[dict[str, Any]]) -> Path:
    """KL of every variant as bars, the preset's as a line through all."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    rows = sorted(rows, key=lambda row: -row["kl_geometric"])
    colors = [
        "#0072B2" if row["variant"] == BASE else "#E69F00" if row["variant"] in OTHERS else "#8C8C8C" for row in rows
    ]
    figure, axes = plt.subplots(figsize=(8, 4.6), layout="constrained")
    bars = axes.barh([row["variant"] for row in rows], [row["kl_geometric"] for row in rows], color=colors)
    axes.bar_label(
        bars, [f"{row['kl_geometric']:.3f}, {100 * row['share_of_fp16']:.1f} % of bytes" for row in rows], padding=3
    )
    axes.axvline(next(row["kl_geometric"] for row in rows if row["variant"] == BASE), color="#0072B2", lw=0.8, ls=":")
    axes.set(xlabel="KL to the full cache (nats a token, geometric mean over texts)")
    axes.set_xlim(0, 1.4 * rows[0]["kl_geometric"])
    axes.spines[["top", "right"]].set_visible(False)
    path = RESULTS / "mp_kvm_ablation.png"
    figure.savefig(path, dpi=160, metadata={"Software": None})
    return path


if __name__ == "__main__":
    main()
