"""Online clustering that never holds more than C centroids: new tokens found centroids of their own, and the cheapest
pairs of all are merged until C are left. So a rare token keeps a centroid of count 1, which is the token itself.

Of N independent clusterings (batch x heads) at once, in one pass, with no loop over tokens. Which pairs are cheap says
Ward's criterion (J. Am. Stat. Assoc. 58, 1963): merging centroids of weights a and b at a distance d adds
a * b / (a + b) * d^2 to the weighted squared error. Many pairs are merged at once, as ToMe does
(https://arxiv.org/abs/2210.09461), each centroid into an earlier one or into one that stays.

Nothing waits for a value: how many slots there are follows from the number of tokens, and a slot without tokens has
count 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, get_args

import mlx.core as mx

from mlxkv.config import Config, choice, integer, is_int, number
from mlxkv.errors import InputError, MismatchError
from mlxkv.kernels.centroids import Metric, assign, sums

ROUNDS = 4  # in which the excess is merged: after each, costs are those of what has become of the pairs
BLOCK = 64  # tokens that `OnlineClustering` takes at a time
_BARRED, _FAR = 1e30, 1e20  # what must not be merged costs the one, and nothing else as much as the other


@dataclass(frozen=True, kw_only=True)
class ClusteringConfig(Config):
    """How to cluster.

    Parameters
    ----------
    centroids
        Most there are.
    metric
        Of vectors; "cosine" looks at their directions only.
    value_weight
        How much a difference of carried values counts beside one of vectors, 0 for not at all.
    similarity
        A token at least so similar to its nearest centroid joins it at once (cosine, or minus the squared distance).
    quantile
        Instead, those above this quantile of the similarities of the tokens that come together. With neither, tokens are
        only ever merged for want of room.
    merge_similarity
        What is less similar is never merged; for want of room the lightest centroids are given up then.
    sinks
        First tokens that keep centroids of their own.
    ema
        A centroid that tokens join moves towards them by 1 - ema for each, however many it stands for; None: it is the
        mean of all its tokens.
    persistence
        By how much counts and weights fade whenever tokens come, 1 for not at all.
    min_count
        Centroids of less than this are not given out; they stay, and may grow.
    """

    centroids: int = 256
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
        if not is_int(self.centroids, least=self.sinks + 1):
            raise InputError(
                f"centroids must be 1 or more beside sinks >= 0, not {self.centroids!r} and {self.sinks!r}"
            )
        if self.similarity is not None and self.quantile is not None:
            raise InputError("similarity and quantile are two ways to say the same: set at most one")


class Clusters(NamedTuple):
    """M slots in each of N clusterings, in the order of their first tokens; float32.

    keys `[N, M, D]`, values `[N, M, Dv]` and positions `[N, M]`: means of a slot's tokens, by weight. counts `[N, M]`: how
    many they are, 0 for an empty slot. weights `[N, M]`: the sum of theirs.
    """

    keys: mx.array
    values: mx.array
    positions: mx.array
    counts: mx.array
    weights: mx.array


def insert(old: Clusters | None, new: Clusters, config: ClusteringConfig) -> Clusters:
    """`new` tokens, each in a slot of its own, taken into `old`: as many slots as there are of both, at most C.

    All pairs of them are compared: `[N, M, M]` floats for as long as it takes.
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
    """Counts `[..., M]`, 0 where `min_count` hides a centroid."""
    return mx.where((counts >= config.min_count) | (mx.arange(counts.shape[-1]) < config.sinks), counts, 0)


def _join_similar(old: Clusters, new: Clusters, config: ClusteringConfig) -> tuple[Clusters, Clusters]:
    """Tokens that are similar enough to their nearest centroid go into it, and leave empty slots behind."""
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
    share = _ratio(more.weights, weights) if config.ema is None else 1 - config.ema**more.counts
    keys, values = (a + share[..., None] * (b - a) for a, b in zip(old[:2], more[:2]))
    positions = old.positions + share * (more.positions - old.positions)
    left = owner < 0
    emptied = new._replace(counts=mx.where(left, new.counts, 0), weights=mx.where(left, new.weights, 0))
    return Clusters(keys, values, positions, old.counts + more.counts, weights), emptied


def _merge_cheapest(slots: Clusters, excess: int, config: ClusteringConfig) -> Clusters:
    """With `excess` slots less: those that cost least to merge into an earlier one go into the one of the others, of
    those that stay, that costs least. Empty slots go first and cost nothing."""
    M = slots.counts.shape[1]
    index = mx.arange(M)
    cost, fixed = _costs(slots, config)
    earlier = mx.where(index[:, None] > index, cost, _BARRED).min(axis=-1)
    # Without another to merge into, the lightest are given up.
    lightest = _BARRED * (1 + slots.weights / (1 + slots.weights))
    key = mx.where(slots.counts <= 0, -mx.inf, mx.where(earlier < _FAR, earlier, lightest))
    going = mx.argpartition(mx.where(fixed, mx.inf, key), excess - 1, axis=-1)[:, :excess]
    stays = mx.put_along_axis(mx.ones(fixed.shape, mx.bool_), going, mx.array(False), axis=1)
    place = mx.cumsum(stays.astype(mx.int32), axis=1) - 1
    choice = mx.where(stays[:, None], mx.take_along_axis(cost, going[..., None], axis=1), _BARRED)
    target = mx.take_along_axis(place, choice.argmin(axis=-1), axis=1)
    target = mx.where(choice.min(axis=-1) < _FAR, target, -1)
    return merge_by_owner(slots, mx.put_along_axis(place, going, target, axis=1), M - excess)


def _costs(slots: Clusters, config: ClusteringConfig) -> tuple[mx.array, mx.array]:
    """What merging slot i into slot j costs, `[N, M, M]`, and which slots stay as they are, `[N, M]`: first tokens and
    those that hold NaN. Beyond _FAR it costs to merge into those, and pairs too unlike.

    One product gives all distances, and as few passes as can be over so many pairs: they are what takes the time.
    Float32's rounding of the squared norms is what can be between two equal vectors.
    """
    x = _features(slots, config)
    broken = mx.isnan(x).any(axis=-1)
    x = mx.where(broken[..., None], 0, x)
    if config.metric == "cosine":
        x = _units(x)
    squares = mx.square(x).sum(axis=-1, keepdims=True)
    fixed = broken | (mx.arange(x.shape[1]) < config.sinks)
    barred = mx.where(fixed[..., None], _BARRED, squares)
    ones = mx.ones(squares.shape)
    distance = mx.concatenate([x, squares, ones], -1) @ mx.concatenate([-2 * x, ones, barred], -1).swapaxes(1, 2)
    weights = slots.weights / mx.maximum(slots.weights.mean(axis=1, keepdims=True), 1e-30)
    inverse = 1 / mx.maximum(weights, 1e-6)
    cost = distance / (inverse[:, :, None] + inverse[:, None])
    if config.merge_similarity is not None:
        similarity = 1 - distance / 2 if config.metric == "cosine" else -distance
        cost = mx.where(similarity >= config.merge_similarity, cost, _BARRED)
    return cost, fixed


def _features(slots: Clusters, config: ClusteringConfig) -> mx.array:
    """What is compared, `[N, M, D or D + Dv]`."""
    if not config.value_weight:
        return slots.keys
    return mx.concatenate([slots.keys, config.value_weight * slots.values], axis=-1)


def merge_by_owner(slots: Clusters, owner: mx.array, size: int) -> Clusters:
    """The slots of each owner `[N, M]` as one slot; those of owner -1 are given up."""
    D, Dv = slots.keys.shape[-1], slots.values.shape[-1]
    joint = mx.concatenate([slots.keys, slots.values, slots.positions[..., None]], axis=-1)
    totals, weights = sums(joint, owner, size, slots.weights)
    counts, _ = sums(slots.counts[..., None], owner, size)
    keys, values, positions = mx.split(_ratio(totals, weights[..., None]), [D, D + Dv], axis=-1)
    return Clusters(keys, values, positions[..., 0], counts[..., 0], weights)


def _slice_slots(slots: Clusters, start: int, stop: int) -> Clusters:
    return Clusters(*(x[:, start:stop] for x in slots))


def _units(x: mx.array) -> mx.array:
    return _ratio(x, mx.linalg.norm(x, axis=-1, keepdims=True))


def _ratio(a: mx.array, b: mx.array) -> mx.array:
    return mx.where(b > 0, a / b, 0)


class OnlineClustering:
    """N clusterings of plain arrays, filled as tokens come: without a model, for streams and experiments.

    Memory is taken once, for C centroids. `keys` `[N, C, D]`, `values` `[N, C, Dv]` and `positions` `[N, C]` are means
    of a centroid's tokens, `counts` `[N, C]` how many they are; where that is 0 there is no centroid.
    """

    def __init__(self, config: ClusteringConfig, clusterings: int, dim: int, value_dim: int = 0) -> None:
        shape = clusterings, config.centroids
        self.config, self.tokens, self.used = config, 0, 0
        self.state = Clusters(
            mx.zeros((*shape, dim)), mx.zeros((*shape, value_dim)), mx.zeros(shape), mx.zeros(shape), mx.zeros(shape)
        )

    def insert(self, x: mx.array, values: mx.array | None = None, weights: mx.array | None = None) -> None:
        """Take in tokens x `[N, T, D]`, with values `[N, T, Dv]` and weights `[N, T]` > 0, 1 where None, in blocks of BLOCK.

        Raises MismatchError for other shapes.
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
            for whole, part in zip(self.state, grown):
                whole[:, : self.used] = part
        self.tokens += shape[1]

    @property
    def keys(self) -> mx.array:
        return self.state.keys

    @property
    def values(self) -> mx.array:
        return self.state.values

    @property
    def positions(self) -> mx.array:
        return self.state.positions

    @property
    def counts(self) -> mx.array:
        return visible_counts(self.state.counts, self.config)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays held."""
        return sum(part.nbytes for part in self.state)


def energy_loss(
    queries: mx.array, keys: mx.array, owner: mx.array, centroids: mx.array, bias: mx.array, diversity: float = 0.0
) -> mx.array:
    """Attention mass that centroids misplace, `[N]` float32: half of the sum, over centroids, of how far the mass each
    gets is from what its tokens get, a mean over queries. 0 where none is misplaced, 1 where all is.

    queries `[N, Q, D]`, already scaled. keys `[N, T, D]`, the tokens; owner `[N, T]` their centroids, -1 for none: that
    mass counts as misplaced. centroids `[N, C, D]` with bias `[N, C]`: the logarithm of their counts. diversity: what a
    mean cosine of 1 between different centroids adds, since centroids that say the same waste slots.
    """
    exact = mx.softmax(queries.astype(mx.float32) @ keys.astype(mx.float32).swapaxes(1, 2), axis=-1)
    scores = queries.astype(mx.float32) @ centroids.astype(mx.float32).swapaxes(1, 2) + bias[:, None]
    due, _ = sums(exact.swapaxes(1, 2), owner, centroids.shape[1])
    orphaned = mx.where(owner < 0, exact.mean(axis=1), 0).sum(axis=-1)
    misplaced = (mx.abs(mx.softmax(scores, axis=-1) - due.swapaxes(1, 2)).sum(axis=-1).mean(axis=-1) + orphaned) / 2
    if not diversity:
        return misplaced
    there = bias > -mx.inf
    units = mx.where(there[..., None], _units(centroids), 0)
    number = there.sum(axis=-1).astype(mx.float32)
    alike = mx.square(units.sum(axis=1)).sum(axis=-1) - mx.square(units).sum(axis=(1, 2))
    return misplaced + diversity * _ratio(alike, number * (number - 1))
