"""Online clustering of vectors, with at most C centroids.

This module knows no RoPE, and positions only as numbers that are averaged along: it clusters the vectors that it is
given. Removing and restoring the rotation of keys is done by `mlxkv.live.methods.mp_kvm`.

Each new token becomes a centroid of its own, then the cheapest pairs are merged until C centroids are left. So a rare
token keeps a centroid of count 1, which is the token itself. N independent clusterings (batch x heads) run at once.

The cost of a merger is Ward's criterion (J. Am. Stat. Assoc. 58, 1963): merging centroids of weights a and b at
distance d adds a * b / (a + b) * d^2 to the weighted squared error. Many pairs are merged at once, as in ToMe
(https://arxiv.org/abs/2210.09461): each merged centroid joins one that stays. No call synchronises with the device: the
size of the arrays depends only on the number of tokens, and an empty centroid has count 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, get_args

import mlx.core as mx

from mlxkv.config import Config, choice, integer, number
from mlxkv.errors import InputError, MismatchError
from mlxkv.kernels.centroids import Metric, assign, sums
from mlxkv.live.arrays import safe_divide, unit_vectors

ROUNDS = 4  # rounds in which the excess centroids are merged; costs are computed anew in each
BLOCK = 64  # tokens that `OnlineClustering` inserts at a time
_FORBIDDEN, _FORBIDDEN_FROM = 1e30, 1e20  # cost of a forbidden merger; all others cost less than _FORBIDDEN_FROM


@dataclass(frozen=True, kw_only=True)
class ClusteringConfig(Config):
    """Settings of the clustering.

    Parameters
    ----------
    centroids
        Maximal number of centroids, more than `sinks`.
    metric
        Distance between vectors: "euclidean", or "cosine", which compares only directions.
    value_weight
        Factor of values in the distance, relative to keys; with 0 only keys are compared.
    similarity
        Similarity (cosine, or minus the squared distance) at or above which a new token joins its nearest centroid at
        once. If this and `quantile` are None, tokens are merged only when there are too many centroids.
    quantile
        In place of `similarity`: that quantile of the similarities of the tokens inserted together is the threshold.
    merge_similarity
        Similarity below which centroids are never merged; if there are too many, those with least weight are dropped.
    sinks
        Number of first tokens, which keep centroids of their own.
    ema
        Exponential moving average: weight of a centroid's old vector when a token joins it by similarity. With None the
        centroid is the mean of its tokens.
    persistence
        Factor of old counts and weights at each insertion; 1 keeps them.
    min_count
        Count below which a centroid is hidden from attention; it is kept, and may grow.
    """

    centroids: int = integer(256, least=1)
    metric: Metric = choice("euclidean", get_args(Metric))
    value_weight: float = number(0.0, least=0)
    similarity: float | None = number(None)
    quantile: float | None = number(None, least=0, most=1)
    merge_similarity: float | None = number(None)
    sinks: int = integer(0, key="preserve")
    ema: float | None = number(None, least=0, most=1)
    persistence: float = number(1.0, above=0, most=1)
    min_count: float = number(0.0, least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.centroids <= self.sinks:
            raise InputError(f"centroids must be more than sinks, not {self.centroids} and {self.sinks}")
        if self.similarity is not None and self.quantile is not None:
            raise InputError("similarity and quantile are two ways to say the same: set at most one")


class Clusters(NamedTuple):
    """M centroids in each of N clusterings, in the order of their first tokens; all arrays are float32.

    Parameters
    ----------
    keys, values
        Weighted means of each centroid's tokens, `[N, M, D]` and `[N, M, Dv]`.
    positions
        Weighted means of the tokens' positions, `[N, M]`.
    counts
        Number of tokens, `[N, M]`, 0 for an empty centroid.
    weights
        Sum of the tokens' weights, `[N, M]`.
    """

    keys: mx.array
    values: mx.array
    positions: mx.array
    counts: mx.array
    weights: mx.array


def insert(old: Clusters | None, new: Clusters, config: ClusteringConfig) -> Clusters:
    """Insert new tokens into a clustering.

    Parameters
    ----------
    old
        The centroids so far, None if there are none.
    new
        T new tokens, each a centroid of its own.
    config
        Settings.

    Returns
    -------
    Clusters
        As many centroids as `old` and `new` have together, at most `config.centroids`.

    Notes
    -----
    Compares all pairs of centroids, which takes N * M * M floats of memory.
    """
    if old is None:
        old = _slice_slots(new, 0, 0)
    if config.persistence < 1:
        old = old._replace(counts=old.counts * config.persistence, weights=old.weights * config.persistence)
    if old.counts.shape[1] > config.sinks and (config.similarity is not None or config.quantile is not None):
        old, new = _join_similar(old, new, config)
    both = Clusters(*(mx.concatenate([*pair], axis=1) for pair in zip(old, new)))
    rounds = ROUNDS
    while (slots := both.counts.shape[1]) > config.centroids:
        # At most half are merged per round, so that enough are left to merge into.
        most = (slots - config.sinks) // 2
        both = _merge_cheapest(both, min(most, -(-(slots - config.centroids) // max(1, rounds))), config)
        rounds -= 1
    return both


def visible_counts(counts: mx.array, config: ClusteringConfig) -> mx.array:
    """Set the counts of centroids that `min_count` hides to 0.

    Parameters
    ----------
    counts
        `[..., M]`.
    config
        Settings.

    Returns
    -------
    mx.array
        `[..., M]`.
    """
    return mx.where((counts >= config.min_count) | (mx.arange(counts.shape[-1]) < config.sinks), counts, 0)


def _join_similar(old: Clusters, new: Clusters, config: ClusteringConfig) -> tuple[Clusters, Clusters]:
    """Merge new tokens into their nearest centroids if similar enough; they become empty centroids in `new`."""
    M, T = old.counts.shape[1], new.counts.shape[1]
    open_to = mx.where(mx.arange(M) < config.sinks, 0, old.counts)
    nearest, similarity = assign(_features(new, config), _features(old, config), open_to, config.metric)
    if config.similarity is not None:
        least = mx.array(config.similarity)
    else:
        least = mx.sort(similarity, axis=1)[:, min(T - 1, int((config.quantile or 0) * T)), None]
    owner = mx.where((similarity >= least) & (new.counts > 0), nearest, -1)
    more = merge_by_owner(new, owner, M)
    weights = old.weights + more.weights
    share = safe_divide(more.weights, weights) if config.ema is None else 1 - config.ema**more.counts
    keys, values = (a + share[..., None] * (b - a) for a, b in zip(old[:2], more[:2]))
    positions = old.positions + share * (more.positions - old.positions)
    left = owner < 0
    emptied = new._replace(counts=mx.where(left, new.counts, 0), weights=mx.where(left, new.weights, 0))
    return Clusters(keys, values, positions, old.counts + more.counts, weights), emptied


def _merge_cheapest(slots: Clusters, excess: int, config: ClusteringConfig) -> Clusters:
    """Merge `excess` centroids into others; empty ones are removed first, at no cost.

    The merged centroids are those that are cheapest to merge into an earlier one. Each joins the centroid that is
    cheapest among those that stay.
    """
    M = slots.counts.shape[1]
    index = mx.arange(M)
    cost, fixed = _merge_costs(slots, config)
    earlier = mx.where(index[:, None] > index, cost, _FORBIDDEN).min(axis=-1)
    # If no merger is allowed, the centroids with least weight are dropped.
    lightest = _FORBIDDEN * (1 + slots.weights / (1 + slots.weights))
    key = mx.where(slots.counts <= 0, -mx.inf, mx.where(earlier < _FORBIDDEN_FROM, earlier, lightest))
    merged = mx.argpartition(mx.where(fixed, mx.inf, key), excess - 1, axis=-1)[:, :excess]
    stays = mx.put_along_axis(mx.ones(fixed.shape, mx.bool_), merged, mx.array(False), axis=1)
    new_index = mx.cumsum(stays.astype(mx.int32), axis=1) - 1
    choice = mx.where(stays[:, None], mx.take_along_axis(cost, merged[..., None], axis=1), _FORBIDDEN)
    target = mx.take_along_axis(new_index, choice.argmin(axis=-1), axis=1)
    target = mx.where(choice.min(axis=-1) < _FORBIDDEN_FROM, target, -1)
    return merge_by_owner(slots, mx.put_along_axis(new_index, merged, target, axis=1), M - excess)


def _merge_costs(slots: Clusters, config: ClusteringConfig) -> tuple[mx.array, mx.array]:
    """Return Ward's cost of merging centroid i into j, `[N, M, M]`, and a mask of those never merged, `[N, M]`.

    Sinks and centroids that hold NaN are never merged. Merging into them, or centroids that are too dissimilar, costs
    more than _FORBIDDEN_FROM. A single matrix product gives all distances, because passes over all pairs take most of
    the time. The distance of two equal vectors may differ from 0 by the rounding of their squared norms.
    """
    x = _features(slots, config)
    broken = mx.isnan(x).any(axis=-1)
    x = mx.where(broken[..., None], 0, x)
    if config.metric == "cosine":
        x = unit_vectors(x)
    squares = mx.square(x).sum(axis=-1, keepdims=True)
    fixed = broken | (mx.arange(x.shape[1]) < config.sinks)
    barred = mx.where(fixed[..., None], _FORBIDDEN, squares)
    ones = mx.ones(squares.shape)
    distance = mx.concatenate([x, squares, ones], -1) @ mx.concatenate([-2 * x, ones, barred], -1).swapaxes(1, 2)
    weights = slots.weights / mx.maximum(slots.weights.mean(axis=1, keepdims=True), 1e-30)
    inverse = 1 / mx.maximum(weights, 1e-6)
    cost = distance / (inverse[:, :, None] + inverse[:, None])
    if config.merge_similarity is not None:
        similarity = 1 - distance / 2 if config.metric == "cosine" else -distance
        cost = mx.where(similarity >= config.merge_similarity, cost, _FORBIDDEN)
    return cost, fixed


def _features(slots: Clusters, config: ClusteringConfig) -> mx.array:
    """Return the vectors that are compared: keys, or keys and scaled values, `[N, M, D or D + Dv]`."""
    if not config.value_weight:
        return slots.keys
    return mx.concatenate([slots.keys, config.value_weight * slots.values], axis=-1)


def merge_by_owner(slots: Clusters, owner: mx.array, size: int) -> Clusters:
    """Merge all centroids with the same owner into one.

    Parameters
    ----------
    slots
        M centroids.
    owner
        Index of the new centroid that each becomes part of, int32 `[N, M]`; -1 drops it.
    size
        Number of centroids to return.

    Returns
    -------
    Clusters
        `size` centroids; those that own nothing are empty.
    """
    D, Dv = slots.keys.shape[-1], slots.values.shape[-1]
    joint = mx.concatenate([slots.keys, slots.values, slots.positions[..., None]], axis=-1)
    totals, weights = sums(joint, owner, size, slots.weights)
    counts, _ = sums(slots.counts[..., None], owner, size)
    keys, values, positions = mx.split(safe_divide(totals, weights[..., None]), [D, D + Dv], axis=-1)
    return Clusters(keys, values, positions[..., 0], counts[..., 0], weights)


def _slice_slots(slots: Clusters, start: int, stop: int) -> Clusters:
    """Return centroids start..stop."""
    return Clusters(*(x[:, start:stop] for x in slots))


class OnlineClustering:
    """Online clusterings of plain arrays, without a model: for streams and experiments.

    Memory for C centroids per clustering is allocated once.

    Parameters
    ----------
    config
        Settings; C is `config.centroids`.
    batch
        N, the number of independent clusterings.
    dim
        D, the dimension of the vectors that are clustered.
    value_dim
        Dv, the dimension of values that are averaged along; 0 for no values.

    Examples
    --------
    Three tokens, two of which are equal, and room for two centroids:

    >>> clustering = OnlineClustering(ClusteringConfig(centroids=2), batch=1, dim=2)
    >>> clustering.insert(mx.array([[[1.0, 0.0], [0.0, 5.0], [1.0, 0.0]]]))
    >>> clustering.keys.tolist(), clustering.counts.tolist()
    ([[[1.0, 0.0], [0.0, 5.0]]], [[2.0, 1.0]])
    """

    def __init__(self, config: ClusteringConfig, batch: int, dim: int, value_dim: int = 0) -> None:
        shape = batch, config.centroids
        self.config, self.tokens, self.used = config, 0, 0
        self.state = Clusters(
            mx.zeros((*shape, dim)), mx.zeros((*shape, value_dim)), mx.zeros(shape), mx.zeros(shape), mx.zeros(shape)
        )

    def insert(self, x: mx.array, values: mx.array | None = None, weights: mx.array | None = None) -> None:
        """Insert tokens, BLOCK at a time.

        Parameters
        ----------
        x
            `[N, T, D]`.
        values
            `[N, T, Dv]`; None only where Dv is 0.
        weights
            `[N, T]`, above 0; 1 for all where None.

        Raises
        ------
        MismatchError
            For arrays of other shapes.
        """
        (N, _, D), Dv = self.state.keys.shape, self.state.values.shape[-1]
        shape = x.shape[:2]
        values = mx.zeros((*shape, 0)) if values is None else values
        weights = mx.ones(shape) if weights is None else weights
        if x.shape != (N, shape[1], D) or values.shape != (*shape, Dv) or weights.shape != shape:
            raise MismatchError(
                f"tokens {x.shape}, values {values.shape} and weights {weights.shape} are not [{N}, T, {D}], "
                f"[{N}, T, {Dv}] and [{N}, T]"
            )
        positions = mx.broadcast_to(mx.arange(self.tokens, self.tokens + shape[1]), shape)
        new = Clusters(*(part.astype(mx.float32) for part in (x, values, positions, mx.ones(shape), weights)))
        for start in range(0, shape[1], BLOCK):
            block = _slice_slots(new, start, start + BLOCK)
            grown = insert(_slice_slots(self.state, 0, self.used), block, self.config)
            self.used = grown.counts.shape[1]
            for memory, part in zip(self.state, grown):
                memory[:, : self.used] = part
        self.tokens += shape[1]

    @property
    def keys(self) -> mx.array:
        """Means of each centroid's vectors, `[N, C, D]`."""
        return self.state.keys

    @property
    def values(self) -> mx.array:
        """Means of each centroid's values, `[N, C, Dv]`."""
        return self.state.values

    @property
    def positions(self) -> mx.array:
        """Means of each centroid's positions, `[N, C]`."""
        return self.state.positions

    @property
    def counts(self) -> mx.array:
        """Number of tokens that each centroid stands for, `[N, C]`; 0 if it is empty or hidden by `min_count`."""
        return visible_counts(self.state.counts, self.config)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays held."""
        return sum(part.nbytes for part in self.state)
