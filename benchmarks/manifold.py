"""The manifold in pictures: do keys lie by topic before rotation, and do MP-KVM's centroids follow topics?

SmolLM2 reads texts of four topics, one after the other in one chunk; order and stretches are drawn anew for each
seed. Of each layer and kv head the keys that centroids stand for (neither sinks nor window): how many directions they
spread over, and how far topics lie apart (silhouette), before rotation, as they are cached, and rotated to places drawn
at random, since the true places go with the topics. A token's centroid is the nearest of those that the live cache
holds. Purity is the share of tokens that are of their centroid's main topic; NMI is the mutual information of both,
normalized; a step from a token to the next stays when the main topics of both centroids are the same. Chance is the
same with the centroids given to the tokens in random order. Pictures are a PCA and a t-SNE of the first kv head of
three layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np
from rich.progress import track

from benchmarks import texts
from benchmarks.held_out import MODEL
from benchmarks.live_runs import prefilled
from benchmarks.mp_kvm_ablation import BASE, owners
from benchmarks.schema import Outcome, Result
from benchmarks.tables import percent, table
from mlxkv import lm
from mlxkv.live import live_config
from mlxkv.spec import Rope

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PHASE = 2
TOPICS = ("legal", "story", "code", "chat-travel")
LENGTH, QUICK_LENGTH = 300, 150  # tokens of each topic
SEEDS = 3
PICTURED = (1, 15, 28)  # layers: early, middle, late
COMPONENTS = (2, 8, 16, 32)
PERMUTATIONS = 20
PERPLEXITY, ITERATIONS = 30.0, 500  # of t-SNE
SHOWN = 9  # centroids with a colour of their own in the picture


def run(quick: bool) -> Outcome:
    model, tokenizer = lm.load(MODEL)
    seeds, length = (1, QUICK_LENGTH) if quick else (SEEDS, LENGTH)
    stretches = {topic: tokenizer.encode(texts.OTHER_KINDS[topic]()) for topic in TOPICS}
    drawn = [composed(stretches, length, seed) for seed in range(seeds)]
    variants = {"full": live_config("full"), BASE: live_config(BASE)}
    caches = prefilled(model, mx.array([tokens for tokens, _ in drawn]), variants)
    layers = PICTURED if quick else range(len(caches["full"]))
    samples = []
    for layer in track(layers, "layers"):
        samples += measured(caches["full"][layer], caches[BASE][layer], [order for _, order in drawn], length)
    config = {
        "model": MODEL, "settings": str(variants[BASE]), "topics": [order for _, order in drawn], "tokens_a_topic": length,
        "seeds": seeds, "layers": list(layers), "pictured": PICTURED, "components": COMPONENTS,
        "permutations": PERMUTATIONS, "perplexity": PERPLEXITY, "iterations": ITERATIONS,
    }  # fmt: skip
    return Outcome(config, samples, summarise(samples))


def composed(stretches: dict[str, list[int]], length: int, seed: int) -> tuple[list[int], list[str]]:
    """Tokens of one stretch of each topic, one after the other, and the topics in their order."""
    random = np.random.default_rng(seed)
    order = [str(topic) for topic in random.permutation(list(stretches))]
    starts = [int(random.integers(len(stretches[topic]) - length + 1)) for topic in order]
    return [token for topic, at in zip(order, starts) for token in stretches[topic][at : at + length]], order


def measured(full: Any, held: Any, orders: Sequence[Sequence[str]], length: int) -> list[dict[str, Any]]:
    """Records of one layer, from its whole cache and MP-KVM's: of every text and head, and points of the first head of
    pictured layers; the first text's are kept."""
    T = full.offset
    keys, values = full.keys[:, :, :T], full.values[:, :, :T]
    rope, heads = full.slots[0].rope, keys.shape[1]
    plain = rope.unrotate(keys.astype(mx.float32))
    centroids = np.array(owners(held, keys, values)).reshape(len(orders), heads, -1)
    first, gone = held.settings.preserve, centroids.shape[-1]
    topics = np.repeat(np.arange(len(orders[0])), length)[first:gone]
    records = []
    for seed, head in product(range(len(orders)), range(heads)):
        before, after = (np.array(x[seed, head, first:gone].astype(mx.float32)) for x in (plain, keys))
        owner, random = centroids[seed, head, first:], np.random.default_rng(seed)
        where = {"layer": full.layer, "head": head, "seed": seed}
        forms = {"before": before, "after": after, "anywhere": displaced(before, rope, random)}
        spread = {f"{form}_{name}": value for form, x in forms.items() for name, value in shape(x, topics).items()}
        by_chance = [agreement(random.permutation(owner), topics) for _ in range(PERMUTATIONS)]
        chance = {f"{name}_by_chance": float(np.mean([c[name] for c in by_chance])) for name in by_chance[0]}
        records.append({"measure": "head", **where, **spread, **agreement(owner, topics), **chance})
        if head == 0 and full.layer in PICTURED:
            points, trust = embedded(before, seed)
            records.append({"measure": "embedding", **where, **trust})
            if seed == 0:
                named = {"first": first, "topics": topics.tolist(), "centroids": owner.tolist()}
                records.append({"measure": "points", **where, **named, **points})
    return records


def displaced(x: np.ndarray, rope: Rope, random: np.random.Generator) -> np.ndarray:
    """Keys `[T, D]` rotated to each other's places, drawn at random."""
    places = mx.array(random.permutation(len(x)).astype(np.int32))
    return np.array(rope.rotate(mx.array(x)[:, None, None], places)[:, 0, 0])


def shape(x: np.ndarray, topics: np.ndarray) -> dict[str, float]:
    """Of vectors `[T, D]` the share of their variance in the first principal components, and the topics' silhouette."""
    from sklearn.metrics import silhouette_score  # type: ignore[import-untyped]

    variance = np.square(np.linalg.svd(x - x.mean(axis=0), compute_uv=False))
    shares = np.cumsum(variance) / variance.sum()
    found = {f"variance_{n}": float(shares[min(n, len(shares)) - 1]) for n in COMPONENTS}
    return {**found, "silhouette": float(silhouette_score(x, topics))}


def agreement(owner: np.ndarray, topics: np.ndarray) -> dict[str, float]:
    """How well centroids `[T]` tell the topics `[T]`, and how often the next token has another centroid and one of the
    same main topic."""
    from sklearn.metrics import normalized_mutual_info_score

    counts = np.zeros((owner.max() + 1, topics.max() + 1), int)
    np.add.at(counts, (owner, topics), 1)
    main = counts.argmax(axis=1)[owner]
    return {
        "purity": float((main == topics).mean()),
        "nmi": float(normalized_mutual_info_score(topics, owner)),
        "changes": float((owner[1:] != owner[:-1]).mean()),
        "stays": float((main[1:] == main[:-1]).mean()),
    }


def embedded(x: np.ndarray, seed: int) -> tuple[dict[str, Any], dict[str, float]]:
    """Points `[T, 2]` of a PCA and a t-SNE, rounded; and of each the trustworthiness: whether a point's neighbours are
    its neighbours in `[T, D]`, 1 if all are."""
    from sklearn.decomposition import PCA  # type: ignore[import-untyped]
    from sklearn.manifold import TSNE, trustworthiness  # type: ignore[import-untyped]
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    perplexity = min(PERPLEXITY, (len(x) - 1) / 3)
    tsne = TSNE(2, perplexity=perplexity, max_iter=ITERATIONS, init="pca", learning_rate="auto", random_state=seed)
    with threadpool_limits(1):  # several add up in an order that differs, and wait for each other
        points = {"pca": PCA(2, random_state=seed).fit_transform(x), "tsne": tsne.fit_transform(x)}
    trust = {f"{name}_trustworthiness": float(trustworthiness(x, found)) for name, found in points.items()}
    return {name: np.round(found.astype(float), 3).tolist() for name, found in points.items()}, trust


def summarise(samples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """By layer, and over all of them (layer None): means over heads, of those mean and standard deviation over texts."""
    rows = []
    heads = [sample for sample in samples if sample["measure"] == "head"]
    for layer in [None, *dict.fromkeys(sample["layer"] for sample in heads)]:
        row: dict[str, Any] = {"layer": layer}
        for measure in ("head", "embedding"):
            group = [s for s in samples if s["measure"] == measure and layer in (None, s["layer"])]
            names = [name for name in (group[0] if group else {}) if name not in ("measure", "layer", "head", "seed")]
            for name in names:
                seeds = dict.fromkeys(s["seed"] for s in group)
                means = [np.mean([s[name] for s in group if s["seed"] == seed]) for seed in seeds]
                row[name] = [round(float(v), 4) for v in (np.mean(means), np.std(means, ddof=len(means) > 1))]
        rows.append(row)
    return rows


def section(result: Result) -> str:
    rows, config = result["summary"], result["config"]
    whole, texts_read = rows[0], range(config["seeds"])
    heads = [s for s in result["samples"] if s["measure"] == "head"]
    before, after, anywhere = (
        [np.mean([s[f"{form}_silhouette"] for s in heads if s["seed"] == seed]) for seed in texts_read]
        for form in ("before", "after", "anywhere")
    )
    variance = ", ".join(f"{n} hold {percent(whole[f'before_variance_{n}'][0])}" for n in config["components"])
    said = [
        f"Topics' silhouette (1: apart, 0: none nearer than another) is {_mean(whole['before_silhouette'])} before rotation,"
        f" {_mean(whole['after_silhouette'])} as cached and {_mean(whole['anywhere_silhouette'])} rotated to random places."
        f" Random places lower it in {sum(x < b for x, b in zip(anywhere, before))} of {len(before)} text(s); the true ones,"
        f" which go with the topics, raise it in {sum(a > b for a, b in zip(after, before))}.",
        f"{_against(whole, 'purity')} of the tokens are of their centroid's main topic. The centroid changes at"
        f" {_against(whole, 'changes')} of the steps from a token to the next, and {_against(whole, 'stays')} of the steps stay"
        " with a main topic.",
        f"Of the variance before rotation the first {variance} (the first 2, as cached: {percent(whole['after_variance_2'][0])})."
        f" Neighbours are kept by t-SNE with a trustworthiness of {whole['tsne_trustworthiness'][0]:.2f}, by PCA in two dims with"
        f" {whole['pca_trustworthiness'][0]:.2f}.",
    ]
    cells = [
        [
            "all" if row["layer"] is None else str(row["layer"]), percent(row["before_variance_8"][0]), percent(row["after_variance_8"][0]),
            *(_mean(row[f"{form}_silhouette"]) for form in ("before", "after", "anywhere")),
            *(f"{_mean(row[name])} ({row[f'{name}_by_chance'][0]:.2f})" for name in ("purity", "nmi", "stays")),
        ]
        for row in rows
    ]  # fmt: skip
    top = [
        "layer",
        "variance in 8",
        "as cached",
        "silhouette",
        "as cached",
        "at random places",
        "purity",
        "NMI",
        "stays",
    ]
    note = f"Means over heads and {len(before)} text(s), of several ± their standard deviation; in brackets by chance."
    return "\n\n".join([" ".join(said), table(top, cells), note])


def _mean(numbers: Sequence[float]) -> str:
    return f"{numbers[0]:.3f}" + (f" ± {numbers[1]:.3f}" if numbers[1] else "")


def _against(row: dict[str, Any], name: str) -> str:
    return f"{percent(row[name][0])} (by chance {percent(row[f'{name}_by_chance'][0])})"


def figure(result: Result) -> Figure:
    """Of each pictured layer PCA and t-SNE by topic, t-SNE by centroid, and which centroid each token of the text has."""
    from benchmarks import figures

    found = [sample for sample in result["samples"] if sample["measure"] == "points"]
    names = result["config"]["topics"][0]
    drawn, panes = figures.panes(4, len(found), width=3.6, height=3.2)
    for row, sample in zip(panes, found):
        topics, owner = np.array(sample["topics"]), np.array(sample["centroids"])
        used = np.bincount(owner)
        common = [int(c) for c in np.argsort(-used, kind="stable")[:SHOWN]]
        rank = np.array([common.index(c) if c in common else -1 for c in owner])
        for axes, key, groups in zip(row, ("pca", "tsne", "tsne"), (topics, topics, rank)):
            for group in np.unique(groups):
                x, y = np.array(sample[key])[groups == group].T
                color = "#D9D9D9" if group < 0 else figures.COLORS[group]
                label = names[group] if groups is topics else None
                axes.scatter(x, y, s=7, color=color, marker=figures.MARKERS[group], linewidths=0, label=label)
            axes.set(xticks=[], yticks=[])
        moments = np.bincount(owner, np.arange(len(owner))) / np.maximum(used, 1)
        places = np.argsort(np.argsort(np.where(used, moments, np.inf)))[owner]
        for topic in np.unique(topics):
            at = np.flatnonzero(topics == topic)
            row[3].scatter(sample["first"] + at, places[at], s=5, color=figures.COLORS[topic], marker=figures.MARKERS[topic], linewidths=0)  # fmt: skip
        row[3].set(xlabel="position in the text", ylabel="centroid, by mean position")
        row[0].set_ylabel(f"layer {sample['layer']}, head {sample['head']}")
    for axes, title in zip(panes[0], ("PCA, by topic", "t-SNE, by topic", f"t-SNE, the {SHOWN} largest centroids", "transitions, by topic")):  # fmt: skip
        axes.set_title(title, loc="left", fontsize=10)
    drawn.legend(*panes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=len(names), markerscale=2)
    return drawn
