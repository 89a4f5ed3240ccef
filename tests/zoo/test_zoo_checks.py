"""The zoo's checks see what they are for: each fault here is found by one of them."""

import mlx.core as mx
import numpy as np
import pytest

from mlxkv.errors import UnsupportedError
from zoo import checks
from zoo.build import build
from zoo.checks import Outcome, divergence, gap, outcome
from zoo.report import Row, counts, page


@pytest.fixture(scope="module")
def model():
    return build("qwen3")


def test_equal_bits_have_no_gap_and_other_values_one_relative_to_the_largest():
    logits = np.array([[1.0, -4.0, -np.inf]], np.float32)
    assert gap(logits, logits.copy()) == 0
    assert gap(logits + np.float32(1e-3), logits) == pytest.approx(2.5e-4, rel=1e-3)


@pytest.mark.parametrize("measure", [gap, divergence])
def test_a_value_that_is_no_number_is_infinitely_far(measure):
    logits = np.array([[1.0, -4.0, 2.0]], np.float32)
    assert measure(np.array([[1.0, np.nan, 2.0]], np.float32), logits) == float("inf")


def test_divergence_is_of_predictions_and_not_of_logits():
    logits = np.array([[0.0, 1.0, -np.inf]], np.float32)
    assert divergence(logits + np.float32(3), logits) == pytest.approx(0, abs=1e-6)
    assert divergence(np.array([[1.0, 0.0, -np.inf]], np.float32), logits) == pytest.approx(0.462, abs=1e-3)


def test_a_restored_cache_with_one_other_value_is_wrong(model, monkeypatch):
    true_restore = checks.restore

    def restore(model, dump):
        cache = true_restore(model, dump)
        cache[0].keys[0, 0, 0, 0] += 0.1
        return cache

    monkeypatch.setattr(checks, "restore", restore)
    assert outcome(checks.dumped_and_restored, "qwen3", model).state == "wrong"


def test_a_live_cache_that_predicts_otherwise_is_wrong(model, monkeypatch):
    true_make = checks.make_cache
    monkeypatch.setattr(checks, "make_cache", lambda model, method: true_make(model, "int8"))
    assert outcome(checks.live_full, "qwen3", model).state == "wrong"


def test_a_method_that_is_far_from_the_whole_cache_is_wrong(model, monkeypatch):
    true_make = checks.make_cache
    monkeypatch.setattr(checks, "make_cache", lambda model, *_, **__: true_make(model, "streaming-llm", recent=8))
    assert "int8" in outcome(checks.live_methods, "qwen3", model).note


def test_a_loaded_cache_that_goes_on_otherwise_is_wrong(model, monkeypatch):
    true_load = checks.load_cache

    def load_cache(path, model):
        cache = true_load(path, model)
        checks.run(model, cache, [1])
        return cache

    monkeypatch.setattr(checks, "load_cache", load_cache)
    assert outcome(checks.live_files, "qwen3", model).state == "wrong"


def test_a_refusal_is_told_with_its_reason_and_any_other_error_is_wrong(model):
    def refuses(name, model):
        raise UnsupportedError("it keeps no keys\nmore words")

    def breaks(name, model):
        mx.zeros((2, 3)) @ mx.zeros((2, 3))

    assert outcome(refuses, "qwen3", model) == Outcome("refused", "it keeps no keys")
    assert outcome(breaks, "qwen3", model).state == "wrong"


def test_the_page_counts_what_came_out_right_and_gives_every_reason():
    good = {key: Outcome("ok", "identical" if key in ("dump", "full") else "") for key in checks.CHECKS}
    refused = {key: Outcome("refused", "it has a ring | of its own") for key in checks.CHECKS}
    rows = [
        Row("a", ["KVCache"], good),
        Row("b", ["ArraysCache"], refused),
        Row("c", [], {}, "it needs Metal"),
        Row("d", [], {}, "took longer than 60 seconds"),
    ]
    assert counts(rows) == {"restored": 1, "live": 1, "coded": 1, "planned": 1}
    text = page(rows)
    assert "**1 of 4 types restore exactly, 1 run live, 1 are coded to files.**" in text
    assert "| `a` | KVCache | identical | identical | yes |  |" in text
    assert "| `b` | ArraysCache | refused | refused | no | it has a ring \\| of its own |" in text
    assert "- `b`: its caches are ArraysCache, and it has a ring \\| of its own." in text
    assert "- `c`: it needs Metal." in text
    assert [row.name for row in rows if row.wrong] == ["d"]
    assert [Row.from_json(row.to_json()) for row in rows] == rows
