"""The benchmarks of clustering and MP-KVM measure what they say they measure."""

import mlx.core as mx
import numpy as np
import pytest
from conftest import tiny_model, tiny_tokens

from benchmarks import aggregator_speed, clustering, mp_kvm_ablation, mp_kvm_variants
from mlxkv.live.base import cache_class_of
from mlxkv.live.clustering import ClusteringConfig, Clusters
from mlxkv.models import kv_slots
from mlxkv.spec import CacheSpec


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
    samples = clustering.measure(1, 130)
    rows = clustering.summarise(samples)
    energy = {row["name"]: row["energy"] for row in rows if row["part"] == "methods" and row["spread"] == 0.5}
    assert len(energy) == 5
    assert energy["online, euclidean"] < energy["random tokens"]
    assert [(row["name"], row["sorted"]) for row in rows if row["part"] == "sweep"] == [
        ("block", False), ("persistence", False), ("block", True), ("persistence", True),
    ]  # fmt: skip
    result = {"samples": samples, "summary": rows, "config": {"clusters": 32, "block": 32, "seeds": 1}}
    lost = {
        order: next(r["energy"] for r in rows if r["name"] == "block" and r["sorted"] == order)
        for order in (False, True)
    }
    text = clustering.section(result)
    assert f"loses {lost[True] / lost[False]:.2f} times what it loses in random order" in text
    assert f"| `block` | {lost[False]:.3f} (32) to {lost[False]:.3f} (32) |" in text
    assert len(clustering.figure(result).axes) == 2


def test_energy_is_a_mean_over_seeds_with_their_deviation():
    alike = {"part": "methods", "name": "k-means", "spread": 1.0, "centroids": 16, "purity": 1.0, "used": 16}
    (row,) = clustering.summarise([{**alike, "seed": seed, "energy": 0.1 * (seed + 1)} for seed in range(3)])
    assert (row["energy"], row["energy_deviation"]) == (pytest.approx(0.2), pytest.approx(0.1))


def test_the_loop_finds_what_blocks_find_where_clusters_lie_apart():
    centers = 10 * np.random.default_rng(0).normal(size=(2, 1, 4, 8)).astype(np.float32)
    loop = aggregator_speed.Loop(1, 4, 8)
    loop.insert(*np.tile(centers, (1, 1, 5, 1)))
    np.testing.assert_allclose(loop.keys, centers[0], rtol=1e-5)
    np.testing.assert_allclose(loop.values, centers[1], rtol=1e-5)
    np.testing.assert_array_equal(loop.counts, [[5] * 4])


def test_speeds_are_tokens_of_all_heads_a_second():
    samples = [*aggregator_speed.inserting(1, 8, 16, 64), aggregator_speed.streaming(16, 32)]
    rows = aggregator_speed.summarise(samples)
    assert [row["what"] for row in rows] == ["blocks", "loop", "stream"]
    blocks, loop = rows[:2]
    assert blocks["state_bytes"] - loop["state_bytes"] == 4 * 8 * 16 * 2  # positions and weights
    assert blocks["times_the_loop"] == pytest.approx(blocks["tokens_per_second"] / loop["tokens_per_second"], abs=0.01)
    faster = int(blocks["times_the_loop"] > 1)
    text = aggregator_speed.section({"samples": samples, "config": {"heads": 8, "rounds": 1, "stream": [1, 8, 16]}})
    assert f"faster than the loop at {faster} of 1 shapes" in text


def test_chance_merges_as_many_slots_and_loses_nothing():
    x = mx.random.normal((3, 20, 4), key=mx.random.key(0))
    ones, rules = mx.ones((3, 20)), ClusteringConfig(centroids=7, preserve=2)
    merged = mp_kvm_variants.by_chance(None, Clusters(x, x[..., :0], ones, ones, ones), rules, mx.random.key(1))
    np.testing.assert_array_equal(merged.counts.sum(axis=1), [20] * 3)
    np.testing.assert_array_equal(merged.counts[:, :2], np.ones((3, 2)))
    np.testing.assert_allclose((merged.keys * merged.counts[..., None]).sum(axis=1), x.sum(axis=1), atol=1e-4)


def test_every_variant_differs_from_the_preset_in_what_it_says_and_has_an_energy_loss():
    model, variants = tiny_model("llama", num_hidden_layers=1), mp_kvm_ablation.ours(mp_kvm_ablation.CHANGES)
    assert len({str(settings) for settings in variants.values()}) == len(variants)
    assert all(cache_class_of(settings) for settings in variants.values())
    records = mp_kvm_ablation.energies(model, np.array(tiny_tokens(200)), variants)
    assert {record["variant"] for record in records} == set(variants) - {"partition: shared by heads"}
    loss = {record["variant"]: record["misplaced"] for record in records}
    assert all(0 < misplaced < 1 for misplaced in loss.values())
    assert loss["weights: 1 for each token"] < loss["weights: 1, and no counts in the scores"]


def test_what_chance_merges_is_drawn_by_the_seed():
    def centroids(variant):
        settings = mp_kvm_ablation.ours([variant])[variant]
        cache = cache_class_of(settings)(settings, CacheSpec("flat", (kv_slots(1, 8, None),)), 0)
        keys = mx.random.normal((1, 1, 200, 8), key=mx.random.key(0))
        cache.attend(keys, *cache.update_and_fetch(keys, keys), 0.3, "causal")
        return np.array(cache.centroids[0])

    first = centroids("merged by chance, seed 0")
    np.testing.assert_array_equal(centroids("merged by chance, seed 0"), first)
    assert np.abs(centroids("merged by chance, seed 1") - first).max() > 0.1


def ablation_samples(texts):
    """KL of 0.1 on every text; half of it with cosine; four and one times it by two seeds of chance."""
    kls = {"full": 0, mp_kvm_ablation.BASE: 0.1, "metric: cosine": 0.05, "merged by chance, seed 0": 0.4, "merged by chance, seed 1": 0.1}  # fmt: skip
    energy = [{"measure": "energy", "variant": name, "layer": 0, "misplaced": 0.2, "diversity": 0.5} for name in kls]
    common = {"measure": "fidelity", "share_of_fp16": 0.1, "top1_agreement": 0.9, "perplexity_delta": 0.1}
    return [{**common, "variant": name, "text": f"t{i}", "kl": kl} for name, kl in kls.items() for i in range(texts)] + energy  # fmt: skip


def test_seeds_are_one_row_that_is_compared_by_each_texts_geometric_mean():
    rows = {row["variant"]: row for row in mp_kvm_ablation.summarise(ablation_samples(10))}
    assert list(rows) == [mp_kvm_ablation.BASE, "metric: cosine", "merged by chance"]
    assert rows["merged by chance"]["kl_ratio"] == pytest.approx(2)
    assert rows["merged by chance"]["kl_of_seeds"] == pytest.approx([0.4, 0.1])
    assert rows["metric: cosine"]["kl_ratio"] == pytest.approx(0.5)


@pytest.mark.parametrize(("texts", "sure", "least"), [(10, 2, 0.0039), (2, 0, 1)])
def test_the_ablation_calls_sure_what_enough_texts_show(texts, sure, least):
    samples = ablation_samples(texts)
    result = {"samples": samples, "summary": mp_kvm_ablation.summarise(samples)}
    text = mp_kvm_ablation.section(result)
    assert "these raise: `merged by chance`; lower: `metric: cosine`; do neither for sure: none." in text
    assert f"below 0.05 for {sure} of them; the least that it can be with {texts} texts is {least:g}" in text
    assert "| clustering: merged by chance | 10.0 % | 0.2000 ± 0.2121 | 2.00 |" in text
    assert len(mp_kvm_ablation.figure(result).axes[0].patches) == 3
