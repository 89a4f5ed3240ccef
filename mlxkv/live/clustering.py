"""Online clustering that never holds more than C centroids.

New tokens become centroids of their own, then the cheapest pairs of all are merged until C are left. So a rare token
keeps a centroid of count 1, which is the token itself. N independent clusterings (batch x heads) are done at once.

Ward's criterion (J. Am. Stat. Assoc. 58, 1963) says which pairs are cheap: merging centroids of weights a and b at a
distance d adds a * b / (a + b) * d^2 to the weighted squared error. Many pairs are merged at once, as ToMe does
(https://arxiv.org/abs/2210.09461), each centroid into an earlier one or into one that stays. Nothing waits for a value:
how many slots there are follows from the number of tokens, and a slot without tokens has count 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, get_args

import mlx.core as mx

from mlxkv.config import Config, choice, integer, number
from mlxkv.errors import InputError, MismatchError
from mlxkv.kernels.centroids import Metric, assign, sums
from mlxkv.live.arrays import safe_divide, unit_vectors

ROUNDS = 4  # in which the excess is merged: after each, costs are those of what has become of the pairs
BLOCK = 64  # tokens that `OnlineClustering` takes at a time
_FORBIDDEN, _FORBIDDEN_FROM = 1e30, 1e20  # cost of a merger that must not be; others cost less than the second


@dataclass(frozen=True, kw_only=True)
class ClusteringConfig(Config):
    """Settings of the clustering.

    Parameters
    ----------
    centroids
        Maximal number of centroids, more than `sinks`.
    metric
        Distance of vectors: "euclidean", or "cosine" for their directions only.
    value_weight
        Factor of differences between values beside those between keys; 0 leaves values out of the distance.
    similarity
        Similarity (cosine, or minus the squared distance) from which on a token joins its nearest centroid at once.
        With None and no `quantile` tokens are merged only for lack of room.
    quantile
        In place of `similarity`: the quantile of the similarities of tokens that come together above which they join.
    merge_similarity
        Similarity below which centroids are never merged; for lack of room the lightest ones are dropped then.
    sinks
        First tokens, which keep centroids of their own.
    ema
        Factor of a centroid's old place for each token that joins it, however many tokens it stands for; with None it
        is the mean of all its tokens.
    persistence
        Factor by which counts and weights fade whenever tokens come; 1 keeps them.
    min_count
        Count below which a centroid is hidden from attention; it stays, and may grow.
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
    """M slots in each of N clusterings, in the order of their first tokens; float32.

    Parameters
    ----------
    keys, values
        Weighted means of a slot's tokens, `[N, M, D]` and `[N, M, Dv]`.
    positions
        Weighted means of their positions, `[N, M]`.
    counts
        Number of those tokens, `[N, M]`, 0 for an empty slot.
    weights
        The sum of the tokens' weights, `[N, M]`.
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
        The clusters so far, None for none.
    new
        T new tokens, each in a slot of its own.
    config
        Settings.

    Returns
    -------
    Clusters
        As many slots as there are in both, at most `config.centroids`.

    Notes
    -----
    Compares all pairs of slots, which takes `[N, M, M]` floats.
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
        # At most half of them, so that enough are left to merge into.
        most = (slots - config.sinks) // 2
        both = _merge_cheapest(both, min(most, -(-(slots - config.centroids) // max(1, rounds))), config)
        rounds -= 1
    return both


def visible_counts(counts: mx.array, config: ClusteringConfig) -> mx.array:
    """Return counts with zeros where `min_count` hides a centroid.

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
    """Let tokens that are similar enough to their nearest centroid join it; they leave empty slots behind."""
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
    """Merge as many slots into others as there are in excess; empty slots go first and cost nothing.

    Those go that cost least to merge into an earlier slot, each into the slot of those that stay that costs least.
    """
    M = slots.counts.shape[1]
    index = mx.arange(M)
    cost, fixed = _merge_costs(slots, config)
    earlier = mx.where(index[:, None] > index, cost, _FORBIDDEN).min(axis=-1)
    # Without another to merge into, the lightest are dropped.
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
    """Return Ward's cost of merging slot i into slot j, `[N, M, M]`, and which slots are never merged, `[N, M]`.

    Never merged are the first tokens and slots that hold NaN. Merging into those, or what is too unlike, costs more than
    _FORBIDDEN_FROM. One product gives all distances, with as few passes over all pairs as possible, since they take most
    of the time. Two equal vectors may differ by the rounding of their squared norms.
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
    """Return the vectors that are compared, `[N, M, D or D + Dv]`."""
    if not config.value_weight:
        return slots.keys
    return mx.concatenate([slots.keys, config.value_weight * slots.values], axis=-1)


def merge_by_owner(slots: Clusters, owner: mx.array, size: int) -> Clusters:
    """Merge all slots of the same owner into one.

    Parameters
    ----------
    slots
        M slots.
    owner
        Index of the new slot of each, int32 `[N, M]`; -1 drops it.
    size
        Number of slots to return.

    Returns
    -------
    Clusters
        `size` slots, empty where no slot has this owner.
    """
    D, Dv = slots.keys.shape[-1], slots.values.shape[-1]
    joint = mx.concatenate([slots.keys, slots.values, slots.positions[..., None]], axis=-1)
    totals, weights = sums(joint, owner, size, slots.weights)
    counts, _ = sums(slots.counts[..., None], owner, size)
    keys, values, positions = mx.split(safe_divide(totals, weights[..., None]), [D, D + Dv], axis=-1)
    return Clusters(keys, values, positions[..., 0], counts[..., 0], weights)


def _slice_slots(slots: Clusters, start: int, stop: int) -> Clusters:
    """Return slots start..stop."""
    return Clusters(*(x[:, start:stop] for x in slots))


class OnlineClustering:
    """Clusterings of plain arrays, filled as tokens come: without a model, for streams and experiments.

    Memory is taken once, for C centroids each.

    Parameters
    ----------
    config
        Settings; C is `config.centroids`.
    batch
        N, the number of independent clusterings.
    dim
        D, of the vectors that are clustered.
    value_dim
        Dv, of values that are carried along, 0 for none.

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
        """Insert tokens, in blocks of BLOCK.

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
            For other shapes.
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
        """Number of tokens that each centroid stands for, `[N, C]`; 0 where there is none, or `min_count` hides it."""
        return visible_counts(self.state.counts, self.config)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays held."""
        return sum(part.nbytes for part in self.state)
