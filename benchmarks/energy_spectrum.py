"""Where attention's energy goes when SmolLM2's cache is small: do counts in the scores bring back the middle's share?

Stretches of an essay are held whole and by each method; of the next tokens' attention, all layers and heads together, how
much goes to the first 4 tokens, to the middle, to the newest sixteenth of the text and to those next tokens themselves, and
how far attention is from the whole cache's (mlxkv.evaluate.attention). A centroid of MP-KVM adds the logarithm of its count
to its scores, as it stands for so many tokens; the same without that is beside it. Then the spectrum of what is cached:
eigenvalues of the covariance of each head's keys, as rotated and as they were before, and of its values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from benchmarks import mp_kvm_variants
from benchmarks.live_runs import caches_of
from benchmarks.schema import Outcome, Result
from benchmarks.tables import percent, table
from mlxkv import lm
from mlxkv.evaluate import texts
from mlxkv.evaluate.runner import run as evaluate
from mlxkv.evaluate.statistics import sign_flip_test
from mlxkv.evaluate.tasks import attention
from mlxkv.evaluate.variants import CachedContext, Variant, baseline, cache_sizes, live_variant
from mlxkv.live import live_config
from mlxkv.models import cache_spec
from mlxkv.spec import CacheSpec

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PHASE = 5
MODEL = "smollm2-135m"
COUNTED = "mp-kvm-96"
UNCOUNTED = "mp-kvm-96 without counts"
OTHERS = ("h2o-96", "streaming-llm-96", "int4", "smartkv-0.3")
DIMS = (8, 16, 32)
REGIONS = {  # of `attention.mass_by_position`
    "first 4": slice(0, 1),
    "middle": slice(1, -2),
    "newest": slice(-2, -1),
    "next tokens": slice(-1, None),
}


def run(quick: bool) -> Outcome:
    model, tokenizer = lm.load(MODEL)
    options = attention.AttentionOptions(at=256, samples=1) if quick else attention.AttentionOptions(samples=2)
    seeds = 1 if quick else 3
    variants = [live_variant(COUNTED), uncounted(), *(live_variant(name) for name in OTHERS)]
    looked = evaluate("attention", model, tokenizer, variants, options, seeds=seeds)
    samples = [{"part": "attention", **record} for record in looked["samples"]]
    for seed in range(seeds):
        stretches = texts.draw_stretches(tokenizer, None, options.at + options.queries, options.samples, seed)
        for start, tokens in stretches.items():
            shares = spectrum(model, tokens[: options.at])
            samples.append({"part": "spectrum", "text": texts.text_name(None), "start": start, "seed": seed, **shares})
    config = {
        "model": MODEL,
        "at": options.at,
        "queries": options.queries,
        "seeds": seeds,
        "dims": DIMS,
        "head_dim": cache_spec(model).stream("k").dim,
    }
    return Outcome(config, samples, summarise(samples))


def uncounted() -> Variant:
    """COUNTED with nothing added to the scores of its centroids."""
    settings = mp_kvm_variants.Settings(**asdict(live_config(COUNTED)), counted=False)

    def hold(model: Any, tokens: Sequence[int], exact: CachedContext | None = None) -> CachedContext:
        cache = caches_of(model, settings)
        lm.prefill(model, tokens, cache)
        return CachedContext(cache, cache_sizes(model, cache))

    return Variant(UNCOUNTED, asdict(settings), hold)


def spectrum(model: Any, tokens: Sequence[int]) -> dict[str, list[list[float]]]:
    """By layer, means over heads: the shares of variance in the first DIMS of all principal components, `[L, dims]`."""
    spec = cache_spec(model)
    held = baseline().build(model, tokens)
    entries = [attention.stored_entries(held.cache[layer]) for layer in spec.attention_layers]
    parts = {
        "keys": [_unrotated(entry.keys, spec, layer) for layer, entry in zip(spec.attention_layers, entries)],
        "rotated keys": [entry.keys for entry in entries],
        "values": [entry.values for entry in entries],
    }
    return {name: [energy(x).round(4).tolist() for x in layers] for name, layers in parts.items()}


def _unrotated(keys: np.ndarray, spec: CacheSpec, layer: int) -> np.ndarray:
    slots = spec.layers[layer]
    assert slots is not None
    assert slots[0].rope is not None
    return np.array(slots[0].rope.unrotate(mx.array(keys)[None])[0])


def energy(x: np.ndarray) -> np.ndarray:
    """The share of the variance of x `[H, T, D]` in the first DIMS principal components of each head, the mean over heads."""
    centered = x - x.mean(axis=1, keepdims=True)
    values = np.linalg.eigvalsh(centered.swapaxes(1, 2) @ centered)[:, ::-1]
    shares = values.cumsum(axis=-1) / values.sum(axis=-1, keepdims=True)
    return shares[:, [n - 1 for n in DIMS]].mean(axis=0)


def summarise(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """rows: of each variant means over samples. middle: what counts change there. spectrum: means over layers too."""
    looked = by_variant(samples)
    rows = []
    for variant, records in looked.items():
        masses = np.array([[mass.sum() for mass in regions(record).values()] for record in records])
        by_seed = [masses[[r["seed"] == seed for r in records]].mean(axis=0) for seed in {r["seed"] for r in records}]
        deviation = np.std(by_seed, axis=0, ddof=len(by_seed) > 1)
        scores = {score: float(np.mean([record[score] for record in records])) for score in attention.SCORES}
        row = {"variant": variant, "ratio": float(np.mean([record["ratio"] for record in records])), **scores}
        row["mass"] = dict(zip(REGIONS, masses.mean(axis=0).tolist()))
        row["mass_deviation"] = dict(zip(REGIONS, deviation.tolist()))
        rows.append(row)
    of_spectrum = [sample for sample in samples if sample["part"] == "spectrum"]
    kinds = ("keys", "rotated keys", "values")
    shares = {kind: np.mean([sample[kind] for sample in of_spectrum], axis=(0, 1)).tolist() for kind in kinds}
    return {"rows": rows, "middle": middle(looked), "spectrum": shares}


def by_variant(samples: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    looked = [sample for sample in samples if sample["part"] == "attention"]
    return {name: [s for s in looked if s["variant"] == name] for name in dict.fromkeys(s["variant"] for s in looked)}


def regions(record: dict[str, Any]) -> dict[str, np.ndarray]:
    """Mass by position, means over layers, cut into REGIONS."""
    mass = np.mean(record["mass_by_position"], axis=0)
    return {name: mass[part] for name, part in REGIONS.items()}


def middle(looked: dict[str, list[dict[str, Any]]]) -> dict[str, float]:
    """The middle's mass from the whole cache and with and without counts; p: of how much nearer to the first one of the
    others is, paired over samples."""
    exact, counted, without = (
        np.array([regions(record)["middle"].sum() for record in looked[name]])
        for name in (baseline().name, COUNTED, UNCOUNTED)
    )
    return {
        "whole": float(exact.mean()),
        "counted": float(counted.mean()),
        "uncounted": float(without.mean()),
        "samples": len(exact),
        "p": sign_flip_test(np.abs(counted - exact) - np.abs(without - exact)),
    }


def section(result: Result) -> str:
    summary, config = result["summary"], result["config"]
    rows, spectra = summary["rows"], summary["spectrum"]
    heads = ["cache", "ratio", *REGIONS, "lost", "KL", "cosine"]
    cells = [
        [
            row["variant"],
            f"{row['ratio']:.1f}",
            *(f"{percent(row['mass'][name])} ± {100 * row['mass_deviation'][name]:.1f}" for name in REGIONS),
            *(["", "", ""] if row["variant"] == UNCOUNTED else [percent(row["lost_mass"]), f"{row['kl']:.3g}", f"{row['cosine']:.3f}"]),
        ]
        for row in rows
    ]  # fmt: skip
    return "\n\n".join(
        [
            verdict(summary["middle"]),
            f"Attention of {config['queries']} tokens after {config['at']} held ones, means of {config['seeds']} seed(s) ± the"
            " deviation of their means. lost: what the whole cache's attention gives to tokens that are gone. KL (of the"
            " method's attention to the whole cache's, in nats) and cosine: means over layers, heads and tokens. These three"
            " are left out without counts: such centroids do not say for how many tokens they stand.",
            table(heads, cells),
            f"Share of each head's variance in its first principal components of {config['head_dim']}, mean over layers:",
            table(
                ["", *(f"{n} of them" for n in config["dims"])],
                [[kind, *(percent(share) for share in shares)] for kind, shares in spectra.items()],
            ),
        ]
    )


def verdict(found: dict[str, float]) -> str:
    """Whether the counts bring the middle's mass back, in words."""
    exact, counted, without = found["whole"], found["counted"], found["uncounted"]
    nearer = abs(counted - exact) < abs(without - exact)
    return (
        f"The whole cache gives the middle {percent(exact)} of attention, {COUNTED} {percent(counted)} with counts in the"
        f" scores and {percent(without)} without. Counts bring the middle's share"
        f" {'nearer to' if nearer else 'no nearer to'} the whole cache's"
        f" (p = {found['p']:.2g} by sign flips over {found['samples']} sample(s), one comparison)."
    )


def figure(result: Result) -> Figure:
    """Mass by position; KL and the middle's mass by layer; the spectrum by layer."""
    from benchmarks import figures

    looked, dims = by_variant(result["samples"]), result["config"]["dims"]
    drawn, panes = figures.panes(2, 2, width=5.2, height=3.7)
    for name, records in looked.items():
        options: dict[str, Any] = {"ms": 4, "lw": 1, "label": name, **figures.look(name)}
        if name == UNCOUNTED:
            options |= {"ls": "--", "mfc": "white"}
        panes[0, 0].plot(np.mean([record["mass_by_position"] for record in records], axis=(0, 1)), **options)
        if name not in (baseline().name, UNCOUNTED):
            panes[0, 1].plot(np.mean([record["by_layer"]["kl"] for record in records], axis=0), **options)
        if name in (baseline().name, COUNTED, UNCOUNTED):
            mass = np.mean([record["mass_by_position"] for record in records], axis=0)
            panes[1, 0].plot(mass[:, REGIONS["middle"]].sum(axis=-1), **options)
    for kind, color in zip(("keys", "rotated keys", "values"), figures.COLORS):
        shares = np.mean([sample[kind] for sample in result["samples"] if sample["part"] == "spectrum"], axis=0)
        for column, line in zip(range(len(dims)), figures.STYLES):
            panes[1, 1].plot(shares[:, column], color=color, ls=line, label=f"{kind}, first {dims[column]}")
    bins = len(next(iter(looked.values()))[0]["mass_by_position"][0])
    panes[0, 0].set(yscale="log", ylim=(1e-4, 1), ylabel="share of attention", xlabel="position in the text")
    panes[0, 0].set_xticks([0, bins // 2, bins - 1], ["first 4", "middle", "next tokens"])
    panes[0, 1].set(yscale="log", xlabel="layer", ylabel="KL to the whole cache's attention (nats)")
    panes[1, 0].set(xlabel="layer", ylabel="the middle's share of attention")
    panes[1, 1].set(xlabel="layer", ylabel="share of a head's variance", ylim=(0, 1))
    for axes, place, columns in zip(panes.flat, ("upper center", "best", "best", "lower center"), (2, 1, 1, 3)):
        axes.legend(fontsize=7, loc=place, ncols=columns)
    return drawn
