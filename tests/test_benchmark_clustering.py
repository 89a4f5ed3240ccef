"""The benchmarks of clustering and MP-KVM measure what they say they measure."""

import mlx.core as mx
import numpy as np
import pytest
from conftest import tiny_model, tiny_tokens

from benchmarks import aggregator_speed, clustering, mp_kvm_ablation, mp_kvm_variants
from mlxkv.clustering import Clusters, Rules
from mlxkv.live import cache_of


def test_scores_know_perfect_centroids_and_useless_ones():
    x, truth = clustering.stream(0, 0.0, 300, sorted_by_cluster=False)
    centers = np.stack([x[truth == c][0] if (truth == c).any() else x[0] for c in range(clustering.CLUSTERS)])
    perfect = clustering.scores(x, truth, centers, np.ones(len(centers)))
    assert (perfect["purity"], perfect["energy"], perfect["used"]) == (1, pytest.approx(0, abs=1e-9), 32)
    useless = clustering.scores(x, truth, x.mean(axis=0, keepdims=True), np.ones(1))
    assert useless["energy"] == pytest.approx(1, rel=1e-4)
    assert useless["purity"] == pytest.approx(np.bincount(truth).max() / 300)


def test_a_sorted_stream_brings_cluster_after_cluster():
    truth = clustering.stream(0, 1.0, 200, sorted_by_cluster=True)[1]
    assert (np.diff(truth) != 0).sum() == len(set(truth)) - 1


def test_clustering_measures_every_finder_and_every_sweep(monkeypatch):
    monkeypatch.setattr(clustering, "BUDGETS", (16,))
    monkeypatch.setattr(clustering, "SWEEPS", {"block": {"32": {}}, "persistence": {"0.5": {"persistence": 0.5}}})
    monkeypatch.setattr(clustering, "SPREADS", (0.5, 1.0))
    rows = clustering.summarise(clustering.measure(1, 130))
    energy = {row["name"]: row["energy"] for row in rows if row["part"] == "methods" and row["spread"] == 0.5}
    assert len(energy) == 5
    assert energy["online, euclidean"] < energy["random tokens"]
    assert [(row["name"], row["sorted"]) for row in rows if row["part"] == "sweep"] == [
        ("block", False), ("persistence", False), ("block", True), ("persistence", True),
    ]  # fmt: skip


def test_the_loop_finds_what_blocks_find_where_clusters_lie_apart():
    centers = 10 * np.random.default_rng(0).normal(size=(2, 1, 4, 8)).astype(np.float32)
    loop = aggregator_speed.Loop(1, 4, 8)
    loop.insert(*np.tile(centers, (1, 1, 5, 1)))
    np.testing.assert_allclose(loop.keys, centers[0], rtol=1e-5)
    np.testing.assert_allclose(loop.values, centers[1], rtol=1e-5)
    np.testing.assert_array_equal(loop.counts, [[5] * 4])


def test_speeds_are_tokens_of_all_heads_a_second():
    rows = aggregator_speed.summarise([*aggregator_speed.inserting(1, 8, 16, 64), aggregator_speed.streaming(16, 32)])
    assert [row["what"] for row in rows] == ["blocks", "loop", "stream"]
    blocks, loop = rows[:2]
    assert blocks["state_bytes"] - loop["state_bytes"] == 4 * 8 * 16 * 2  # positions and weights
    assert blocks["times_the_loop"] == pytest.approx(blocks["tokens_per_second"] / loop["tokens_per_second"], abs=0.01)


def test_chance_merges_as_many_slots_and_loses_nothing():
    x = mx.random.normal((3, 20, 4), key=mx.random.key(0))
    ones, rules = mx.ones((3, 20)), Rules(centroids=7, preserve=2)
    merged = mp_kvm_variants.by_chance(None, Clusters(x, x[..., :0], ones, ones, ones), rules, mx.random.key(1))
    np.testing.assert_array_equal(merged.counts.sum(axis=1), [20] * 3)
    np.testing.assert_array_equal(merged.counts[:, :2], np.ones((3, 2)))
    np.testing.assert_allclose((merged.keys * merged.counts[..., None]).sum(axis=1), x.sum(axis=1), atol=1e-4)


def test_every_variant_differs_from_the_preset_in_what_it_says_and_has_an_energy_loss():
    model, variants = tiny_model("llama", num_hidden_layers=1), mp_kvm_ablation.ours()
    assert len({str(settings) for settings in variants.values()}) == len(variants)
    assert all(cache_of(settings) for settings in variants.values())
    records = mp_kvm_ablation.energies(model, np.array(tiny_tokens(200)), variants)
    assert {record["variant"] for record in records} == set(variants) - {"partition: shared by heads"}
    loss = {record["variant"]: record["misplaced"] for record in records}
    assert all(0 < misplaced < 1 for misplaced in loss.values())
    assert loss["weights: 1 for each token"] < loss["weights: 1, and no counts in the scores"]
