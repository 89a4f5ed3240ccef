"""MP-KVM with parts taken out, for its ablation. Written as a live method is, so that the benchmarks make its caches."""

from __future__ import annotations

from dataclasses import dataclass
from unittest import mock

import mlx.core as mx

from mlxkv.live.clustering import ClusteringConfig, Clusters, merge_by_owner
from mlxkv.live.methods import mp_kvm

METHOD = "mp-kvm-variants"


@dataclass(frozen=True)
class Settings(mp_kvm.MPKVMConfig):
    """counted: whether counts are added to the scores. chance: the seed by which is drawn what is merged with what."""

    counted: bool = True
    chance: int | None = None


class Cache(mp_kvm.MPKVMCache):
    """MP-KVM but for that."""

    settings: Settings

    def bias(self) -> mx.array | None:
        bias = super().bias()
        return bias if bias is None or self.settings.counted else mx.where(bias > -mx.inf, 0.0, bias)

    def _flush(self, block: list[mx.array], first: int) -> None:
        if self.settings.chance is None:
            return super()._flush(block, first)
        draw = mx.random.key(self.settings.chance << 40 | first << 10 | self.layer)
        with mock.patch.object(mp_kvm, "inserted", lambda old, new, rules: by_chance(old, new, rules, draw)):
            return super()._flush(block, first)


def by_chance(old: Clusters | None, new: Clusters, rules: ClusteringConfig, draw: mx.array) -> Clusters:
    """As `inserted`, but slots drawn at random go into others drawn at random."""
    both = new if old is None else Clusters(*(mx.concatenate([*pair], axis=1) for pair in zip(old, new)))
    N, M = both.counts.shape
    excess = M - rules.centroids
    if excess <= 0:
        return both
    order = mx.argsort(mx.random.uniform(shape=(N, M - rules.preserve), key=draw), axis=1) + rules.preserve
    going, into = order[:, :excess], order[:, excess + mx.arange(excess) % (M - rules.preserve - excess)]
    stays = mx.put_along_axis(mx.ones((N, M), mx.bool_), going, mx.array(False), axis=1)
    place = mx.cumsum(stays.astype(mx.int32), axis=1) - 1
    owner = mx.put_along_axis(place, going, mx.take_along_axis(place, into, axis=1), axis=1)
    return merge_by_owner(both, owner, rules.centroids)
