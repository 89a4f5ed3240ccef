"""Online clustering of synthetic streams whose clusters are known, against k-means and chance.

Tokens come from 32 Gaussian clusters in 64 dims, some clusters often and some rarely, in random order, or cluster after
cluster. Purity is the share of tokens whose centroid holds mostly their own cluster; energy is the squared distance to
the nearest centroid, as a share of the tokens' variance. k-means (scikit-learn) sees all tokens at once; its
mini-batch kind and ours see each block of tokens once. Chance is as many tokens drawn at random.

    python -m benchmarks.clustering [--quick]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import mlx.core as mx
import numpy as np

from benchmarks.schema import RESULTS, write_result
from mlxkv.clustering import BLOCK, Clusters, Rules, inserted
from mlxkv.kernels.centroids import assign

CLUSTERS, DIM, TOKENS = 32, 64, 4096
SPREADS = (0.5, 1.0, 1.5)  # of a cluster, in each dim, where centers spread by 1
BUDGETS = (16, 32, 64, 128)
SEEDS = 3
KMEANS_STARTS = 4  # of which scikit-learn keeps the best
BASE = Rules(centroids=64)
SWEEPS: dict[str, dict[str, dict[str, Any]]] = {
    "block": {str(n): {} for n in (32, 64, 128, 256, 512)},
    "similarity": {str(s): {"metric": "cosine", "similarity": s} for s in (0.3, 0.5, 0.7, 0.8, 0.9)},
    "quantile": {str(q): {"metric": "cosine", "quantile": q} for q in (0.1, 0.3, 0.5, 0.7, 0.9)},
    "merge_similarity": {str(s): {"metric": "cosine", "merge_similarity": s} for s in (0.0, 0.3, 0.5, 0.7)},
    "persistence": {str(p): {"persistence": p} for p in (0.5, 0.8, 0.95, 1.0)},
    "ema": {str(e): {"metric": "cosine", "similarity": 0.5, "ema": e} for e in (0.9, 0.99, 0.999)},
    "min_count": {str(n): {"min_count": n} for n in (1, 2, 4, 8)},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed and 512 tokens; writes nothing")
    quick = parser.parse_args().quick
    samples = measure(1 if quick else SEEDS, 512 if quick else TOKENS)
    summary = summarise(samples)
    for row in summary:
        print(row)
    if not quick:
        config = {
            "clusters": CLUSTERS, "dim": DIM, "tokens": TOKENS, "seeds": SEEDS, "block": BLOCK,
            "k_means_starts": KMEANS_STARTS, "base": str(BASE),
        }  # fmt: skip
        print(write_result("clustering", config, samples, summary), plot(summary))


def measure(seeds: int, tokens: int) -> list[dict[str, Any]]:
    """All records: of every way to find centroids at every budget, then of every sweep."""
    samples = []
    for seed, spread, budget in product(range(seeds), SPREADS, BUDGETS):
        x, truth = stream(seed, spread, tokens, sorted_by_cluster=False)
        for name, centroids in finders(budget, seed).items():
            where = {"part": "methods", "name": name, "spread": spread, "centroids": budget, "seed": seed}
            samples.append({**where, **scores(x, truth, *centroids(x))})
    for seed, sorted_by_cluster in product(range(seeds), (False, True)):
        x, truth = stream(seed, SPREADS[1], tokens, sorted_by_cluster)
        for sweep, settings in SWEEPS.items():
            for value, changed in settings.items():
                rules = Rules(**{"centroids": BASE.centroids, **changed})
                block = int(value) if sweep == "block" else BLOCK
                where = {"part": "sweep", "name": sweep, "value": value, "sorted": sorted_by_cluster, "seed": seed}
                samples.append({**where, **scores(x, truth, *online(x, rules, block))})
    return samples


def stream(seed: int, spread: float, tokens: int, sorted_by_cluster: bool) -> tuple[np.ndarray, np.ndarray]:
    """Tokens `[T, D]` and the cluster `[T]` of each; the n-th cluster is 1 / n as frequent as the first."""
    random = np.random.default_rng(seed)
    frequency = 1 / np.arange(1, CLUSTERS + 1)
    truth = random.choice(CLUSTERS, tokens, p=frequency / frequency.sum())
    if sorted_by_cluster:
        truth = random.permutation(CLUSTERS)[np.sort(truth)]
    centers = random.normal(size=(CLUSTERS, DIM))
    return (centers[truth] + spread * random.normal(size=(tokens, DIM))).astype(np.float32), truth


def finders(budget: int, seed: int) -> dict[str, Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]]:
    """Ways to turn tokens `[T, D]` into centroids and their counts."""
    from sklearn.cluster import KMeans, MiniBatchKMeans  # type: ignore[import-untyped]

    def whole(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return KMeans(budget, n_init=KMEANS_STARTS, random_state=seed).fit(x).cluster_centers_, np.ones(budget)

    def batches(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        found = MiniBatchKMeans(budget, n_init=KMEANS_STARTS, random_state=seed)
        first = max(BLOCK, 2 * budget)  # it needs some to start with
        for start in (0, *range(first, len(x), BLOCK)):
            found.partial_fit(x[start : start + (BLOCK if start else first)])
        return found.cluster_centers_, np.ones(budget)

    def chance(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return x[np.random.default_rng(seed).choice(len(x), budget, replace=False)], np.ones(budget)

    return {
        "online, euclidean": lambda x: online(x, Rules(centroids=budget)),
        "online, cosine": lambda x: online(x, Rules(centroids=budget, metric="cosine")),
        "k-means": whole,
        "mini-batch k-means": batches,
        "random tokens": chance,
    }


def online(x: np.ndarray, rules: Rules, block: int = BLOCK) -> tuple[np.ndarray, np.ndarray]:
    """Ours, in one pass over blocks of this many tokens."""
    state = None
    for start in range(0, len(x), block):
        keys = mx.array(x[None, start : start + block])
        ones = mx.ones(keys.shape[:2])
        state = inserted(state, Clusters(keys, keys[..., :0], ones, ones, ones), rules)
    assert state is not None
    mx.eval(state)
    return np.array(state.keys[0]), np.array((state.counts * (state.counts >= rules.min_count))[0])


def scores(x: np.ndarray, truth: np.ndarray, centroids: np.ndarray, counts: np.ndarray) -> dict[str, float]:
    """Purity and energy, each token at its nearest centroid, and how many centroids there are."""
    tokens, means, numbers = (mx.array(part, mx.float32)[None] for part in (x, centroids, counts))
    owner, similarity = (np.array(part[0]) for part in assign(tokens, means, numbers, "euclidean"))
    table = np.zeros((len(centroids), CLUSTERS), int)
    np.add.at(table, (owner, truth), 1)
    energy = -similarity.mean() / np.square(x - x.mean(axis=0)).sum(axis=1).mean()
    used = int((counts > 0).sum())
    return {"purity": table.max(axis=1).sum() / len(x), "energy": float(energy), "used": used}


def summarise(samples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over seeds."""
    rows: dict[tuple, list[dict[str, Any]]] = {}
    for sample in samples:
        key = tuple((k, v) for k, v in sample.items() if k not in ("seed", "purity", "energy", "used"))
        rows.setdefault(key, []).append(sample)
    return [
        {**dict(key), **{k: round(fmean(s[k] for s in group), 4) for k in ("purity", "energy", "used")}}
        for key, group in rows.items()
    ]


def plot(rows: Sequence[dict[str, Any]]) -> Path:
    """Energy against the number of centroids, a pane for each spread."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    found = [row for row in rows if row["part"] == "methods"]
    figure, panes = plt.subplots(1, len(SPREADS), figsize=(11, 3.8), layout="constrained", sharey=True)
    colors = ("#0072B2", "#56B4E9", "#000000", "#8C8C8C", "#D55E00")
    for axes, spread in zip(panes, SPREADS):
        for name, color, marker in zip(dict.fromkeys(row["name"] for row in found), colors, "osDv^"):
            line = [row for row in found if (row["name"], row["spread"]) == (name, spread)]
            x, y = [row["centroids"] for row in line], [row["energy"] for row in line]
            axes.plot(x, y, color=color, marker=marker, ms=5, label=name)
        axes.axvline(CLUSTERS, color="#000000", lw=0.6, ls=":")
        axes.set(xscale="log", xlabel="centroids (dotted: clusters)")
        axes.set_xticks(BUDGETS, [str(n) for n in BUDGETS])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.set_title(f"clusters spread by {spread:g}", loc="left", fontsize=10)
    panes[0].set(ylabel="energy lost (share of variance)", ylim=(0, None))
    panes[-1].legend(frameon=False)
    path = RESULTS / "clustering.png"
    figure.savefig(path, dpi=160, metadata={"Software": None})
    return path


if __name__ == "__main__":
    main()
