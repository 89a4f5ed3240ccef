"""The pictures of the manifold show what they say: topics, centroids, and the same by chance."""

import json
from dataclasses import asdict
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from conftest import tiny_model, tiny_tokens

from benchmarks import manifold
from mlxkv.models import kv_slots
from mlxkv.spec import Rope


@pytest.fixture(autouse=True)
def _short_embeddings(monkeypatch):
    monkeypatch.setattr(manifold, "ITERATIONS", 250)


class Tokenizer:
    def encode(self, text):
        return tiny_tokens(400, seed=len(text) % 100)


def test_a_text_is_one_stretch_of_each_topic_in_an_order_of_its_own():
    stretches = {name: list(range(1000 * i, 1000 * i + 100)) for i, name in enumerate("abcd")}
    texts = [manifold.composed(stretches, 30, seed) for seed in range(5)]
    assert texts[0] == manifold.composed(stretches, 30, 0)
    assert len({tuple(order) for _, order in texts}) > 1
    for tokens, order in texts:
        assert [list("abcd")[token // 1000] for token in tokens[::30]] == order
        assert all(np.diff(tokens[30 * i : 30 * i + 30]).tolist() == [1] * 29 for i in range(4))


def test_centroids_that_follow_topics_agree_and_shuffled_ones_do_not():
    topics = np.repeat(np.arange(4), 50)
    owner = 3 * topics + np.arange(200) % 3
    exact = manifold.agreement(owner, topics)
    assert (exact["purity"], exact["changes"], exact["stays"]) == (1, 1, pytest.approx(196 / 199))
    assert 0.6 < exact["nmi"] < 1  # three centroids a topic
    assert manifold.agreement(topics, topics)["nmi"] == pytest.approx(1)
    shuffled = manifold.agreement(np.random.default_rng(0).permutation(owner), topics)
    assert shuffled["purity"] < 0.5
    assert shuffled["nmi"] < 0.2
    assert shuffled["stays"] < 0.5


def test_variance_and_silhouettes_are_those_of_the_vectors():
    random, topics = np.random.default_rng(0), np.repeat(np.arange(2), 50)
    plane = random.normal(size=(100, 2)) @ random.normal(size=(2, 40)) + 5 * random.normal(size=40)
    assert manifold.shape(plane, topics)["variance_2"] == pytest.approx(1)
    apart = manifold.shape(random.normal(size=(100, 40)) + 100 * topics[:, None], topics)
    assert apart["silhouette"] > 0.95
    assert apart["variance_2"] < apart["variance_32"] < 1


def test_keys_are_compared_as_before_rotation_as_cached_and_anywhere(monkeypatch):
    """Topics that lie apart before rotation; fast rotation by the place mixes them, and the records say so."""
    rope, T = Rope(8, base=1.5), 160
    random, topics = np.random.default_rng(0), np.repeat(np.arange(4), 40)
    plain = mx.array(3 * np.eye(8)[topics] + 0.1 * random.normal(size=(1, 1, T, 8)), mx.float32)
    keys = mx.pad(rope.rotate(plain), [(0, 0), (0, 0), (0, 96), (0, 0)])  # room that holds nothing yet
    full = SimpleNamespace(keys=keys, values=keys, offset=T, slots=kv_slots(1, 8, rope), layer=1)
    held = SimpleNamespace(settings=SimpleNamespace(preserve=4))
    monkeypatch.setattr(manifold, "owners", lambda cache, keys, values: mx.array(topics[None, : keys.shape[2] - 10]))
    head, embedding, points = manifold.measured(full, held, [list("abcd")], 40)
    assert head["before_silhouette"] > 0.8
    assert head["after_silhouette"] < 0.3
    assert head["anywhere_silhouette"] < 0.3
    assert head["purity"] == 1 > 0.5 > head["purity_by_chance"]
    assert min(embedding["pca_trustworthiness"], embedding["tsne_trustworthiness"]) > 0.5
    assert points["topics"] == topics[4 : T - 10].tolist()
    assert len(points["tsne"]) == len(points["pca"]) == len(points["centroids"]) == T - 14


def test_it_runs_from_end_to_end_and_is_shown_from_its_result_alone(monkeypatch):
    monkeypatch.setattr(manifold.lm, "load", lambda name: (tiny_model("llama"), Tokenizer()))
    monkeypatch.setattr(manifold, "QUICK_LENGTH", 50)
    monkeypatch.setattr(manifold, "PICTURED", (0, 1))
    result = json.loads(json.dumps(asdict(manifold.run(quick=True))))
    assert [row["layer"] for row in result["summary"]] == [None, 0, 1]
    heads = [sample for sample in result["samples"] if sample["measure"] == "head"]
    assert len(heads) == 2 * 2
    purity = np.mean([sample["purity"] for sample in heads])
    assert result["summary"][0]["purity"] == [pytest.approx(purity, abs=1e-4), 0]
    text = manifold.section(result)
    assert f"{100 * result['summary'][0]['purity'][0]:.1f} % (by chance" in text
    assert text.count("| ") > 3 * 8
    assert len(manifold.figure(result).axes) == 2 * 4
