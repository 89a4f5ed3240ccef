"""Online clustering of synthetic streams whose clusters are known, against k-means and chance.

Tokens come from 32 Gaussian clusters in 64 dims, some clusters often and some rarely, in random order, or cluster after
cluster. Purity is the share of tokens whose centroid holds mostly their own cluster; energy is the squared distance to
the nearest centroid, as a share of the tokens' variance. k-means (scikit-learn) sees all tokens at once; its
mini-batch kind and ours see each block of tokens once. Chance is as many tokens drawn at random.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from benchmarks.schema import Outcome, Result
from benchmarks.tables import percent, table
from mlxkv.kernels.centroids import assign
from mlxkv.live.clustering import BLOCK, ClusteringConfig, Clusters, insert

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PHASE = 2

CLUSTERS, DIM, TOKENS = 32, 64, 4096
SPREADS = (0.5, 1.0, 1.5)  # of a cluster, in each dim, where centers spread by 1
BUDGETS = (16, 32, 64, 128)
SEEDS = 3
KMEANS_STARTS = 4  # of which scikit-learn keeps the best
BASE = ClusteringConfig(centroids=64)
SWEEPS: dict[str, dict[str, dict[str, Any]]] = {
    "block": {str(n): {} for n in (32, 64, 128, 256, 512)},
    "similarity": {str(s): {"metric": "cosine", "similarity": s} for s in (0.3, 0.5, 0.7, 0.8, 0.9)},
    "quantile": {str(q): {"metric": "cosine", "quantile": q} for q in (0.1, 0.3, 0.5, 0.7, 0.9)},
    "merge_similarity": {str(s): {"metric": "cosine", "merge_similarity": s} for s in (0.0, 0.3, 0.5, 0.7)},
    "persistence": {str(p): {"persistence": p} for p in (0.5, 0.8, 0.95, 1.0)},
    "ema": {str(e): {"metric": "cosine", "similarity": 0.5, "ema": e} for e in (0.9, 0.99, 0.999)},
    "min_count": {str(n): {"min_count": n} for n in (1, 2, 4, 8)},
}


def run(quick: bool) -> Outcome:
    seeds, tokens = (1, 512) if quick else (SEEDS, TOKENS)
    samples = measure(seeds, tokens)
    config = {
        "clusters": CLUSTERS, "dim": DIM, "tokens": tokens, "seeds": seeds, "block": BLOCK,
        "k_means_starts": KMEANS_STARTS, "base": str(BASE),
    }  # fmt: skip
    return Outcome(config, samples, summarise(samples))


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
                rules = ClusteringConfig(**{"centroids": BASE.centroids, **changed})
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
        "online, euclidean": lambda x: online(x, ClusteringConfig(centroids=budget)),
        "online, cosine": lambda x: online(x, ClusteringConfig(centroids=budget, metric="cosine")),
        "k-means": whole,
        "mini-batch k-means": batches,
        "random tokens": chance,
    }


def online(x: np.ndarray, rules: ClusteringConfig, block: int = BLOCK) -> tuple[np.ndarray, np.ndarray]:
    """Ours, in one pass over blocks of this many tokens."""
    state = None
    for start in range(0, len(x), block):
        keys = mx.array(x[None, start : start + block])
        ones = mx.ones(keys.shape[:2])
        state = insert(state, Clusters(keys, keys[..., :0], ones, ones, ones), rules)
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
    """Means over seeds; of energy their standard deviation, too, 0 where there is one."""
    rows: dict[tuple, list[dict[str, Any]]] = {}
    for sample in samples:
        key = tuple((k, v) for k, v in sample.items() if k not in ("seed", "purity", "energy", "used"))
        rows.setdefault(key, []).append(sample)
    return [
        {
            **dict(key),
            **{k: round(float(np.mean([s[k] for s in group])), 4) for k in ("purity", "energy", "used")},
            "energy_deviation": round(float(np.std([s["energy"] for s in group], ddof=len(group) > 1)), 4),
        }
        for key, group in rows.items()
    ]


def section(result: Result) -> str:
    rows, config = summarise(result["samples"]), result["config"]
    found = {(r["spread"], r["centroids"], r["name"]): r for r in rows if r["part"] == "methods"}
    names = list(dict.fromkeys(name for _, _, name in found))
    ours, *others = (name for name in names if name != "online, cosine")
    ratios = {
        other: [r["energy"] / found[*where, other]["energy"] for (*where, name), r in found.items() if name == ours]
        for other in others
    }
    against = ", ".join(f"{min(r):.2f} to {max(r):.2f} times {other}'s" for other, r in ratios.items())
    base = [
        next(
            r["energy"] for r in rows if r["part"] == "sweep" and _setting(r) == ("block", str(config["block"]), order)
        )
        for order in (False, True)
    ]
    heads = ["spread, centroids", *names]
    cells = [
        [f"{spread:g}, {n}", *(_score(found[spread, n, name]) for name in names)]
        for spread, n in dict.fromkeys((spread, n) for spread, n, _ in found)
    ]
    return "\n\n".join(
        [
            f"Over all spreads and numbers of centroids the energy that online clustering (euclidean) loses is {against}."
            f" Where one cluster comes after the other it loses {base[1] / base[0]:.2f} times what it loses in random order.",
            f"Energy lost, a share of the variance: means of {config['seeds']} seed(s) ± their standard deviation; and purity.",
            table(heads, cells),
            "The same with one rule changed, from the best of its values to the worst:",
            _sweeps([row for row in rows if row["part"] == "sweep"]),
        ]
    )


def _setting(row: dict[str, Any]) -> tuple[str, str, bool]:
    return row["name"], row["value"], row["sorted"]


def _score(row: dict[str, Any]) -> str:
    return f"{row['energy']:.3f} ± {row['energy_deviation']:.3f}, {percent(row['purity'])}"


def _sweeps(rows: Sequence[dict[str, Any]]) -> str:
    """A row for each rule: energies of its best and its worst value, in random order and sorted."""
    lines = []
    for sweep in dict.fromkeys(row["name"] for row in rows):
        cells = []
        for order in (False, True):
            of_it = sorted(
                (r for r in rows if (r["name"], r["sorted"]) == (sweep, order)), key=lambda row: row["energy"]
            )
            cells.append(" to ".join(f"{row['energy']:.3f} ({row['value']})" for row in (of_it[0], of_it[-1])))
        lines.append([f"`{sweep}`", *cells])
    return table(["rule", "random order", "cluster after cluster"], lines)


def figure(result: Result) -> Figure:
    """Energy against the number of centroids, a pane for each spread."""
    from benchmarks import figures

    found = [row for row in result["summary"] if row["part"] == "methods"]
    spreads, names, budgets = (
        list(dict.fromkeys(row[key] for row in found)) for key in ("spread", "name", "centroids")
    )
    drawn, panes = figures.panes(len(spreads), width=3.7, sharey=True)
    for axes, spread in zip(panes[0], spreads):
        for name, color, marker in zip(names, figures.COLORS, figures.MARKERS):
            line = [row for row in found if (row["name"], row["spread"]) == (name, spread)]
            x, y = [row["centroids"] for row in line], [row["energy"] for row in line]
            axes.plot(x, y, color=color, marker=marker, ms=5, label=name)
        axes.axvline(result["config"]["clusters"], color="#000000", lw=0.6, ls=":")
        axes.set(xscale="log", xlabel="centroids (dotted: clusters)")
        axes.set_xticks(budgets, [str(n) for n in budgets])
        axes.minorticks_off()
        axes.set_title(f"clusters spread by {spread:g}", loc="left", fontsize=10)
    panes[0, 0].set(ylabel="energy lost (share of variance)", ylim=(0, None))
    panes[0, -1].legend()
    return drawn
