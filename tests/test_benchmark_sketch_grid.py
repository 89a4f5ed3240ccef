"""The benchmark of sketches compares what it says, at equal tokens and bytes, and runs from end to end on a tiny model."""

import json

import mlx.core as mx
import numpy as np
import pytest
from conftest import tiny_model, tiny_tokens
from live_checks import lone_cache

from benchmarks import schema, sketch_grid
from mlxkv.cache import CacheSpec
from mlxkv.models import keys_and_values

SPEC = CacheSpec("llama", (keys_and_values(2, 8, None),))


class Tokenizer:
    def encode(self, text):
        return tiny_tokens(400, seed=len(text) % 100)


def test_variants_of_a_size_keep_as_many_tokens_on_average():
    for name, settings in sketch_grid.variants([64]).items():
        strategy, _, rest = name.partition(" ")
        if rest.startswith("64, ") or (strategy in ("h2o", "streaming-llm") and rest == "64"):
            method = f"sketch-{strategy}" if rest.startswith("64, ") else strategy
            cache = lone_cache(method, SPEC, **vars(settings))
            for length in (160, 16, 16):  # where half of an interval waits to leave the window
                keys = mx.random.normal((1, 2, length, 8), key=mx.random.key(length))
                cache.attend(keys, *cache.update_and_fetch(keys, keys), 0.3, "causal")
                assert cache.kept == 64, name


def test_a_stream_is_compared_with_exact_counters():
    amounts = np.zeros((2, 1000), np.float32)
    amounts[:, 100:228] = 1
    wide = sketch_grid.sketched("count-min", 1 << 15, 3, 0, mx.arange(1000), mx.array(amounts))
    assert (wide["recall"], wide["error"], wide["beyond_bound"]) == (1, 0, 0)
    assert (wide["bytes"], wide["exact_bytes"]) == (4 * 3 << 15, 4000)
    narrow = sketch_grid.sketched("count-min", 1, 1, 0, mx.arange(1000), mx.array(amounts))
    assert narrow["recall"] < 0.3
    # One counter says 128 of every key: 0 of 872 keys, 1 of 128.
    assert narrow["error"] == pytest.approx((872 * 1 + 128 * 127 / 128) / 1000, rel=1e-5)
    assert narrow["lowest_error"] == pytest.approx(127 / 128)


def test_attention_streams_hold_all_attention():
    rows = np.array([tiny_tokens(140, seed=seed) for seed in range(2)])
    records = list(sketch_grid.streams(tiny_model("llama", num_hidden_layers=2), rows))
    assert {(r["of"], r["sketch"], r["keys"]) for r in records} == {
        (f"attention per {per}", kind, 140) for per in ("head", "layer") for kind in sketch_grid.SKETCHES
    }
    widest = [r for r in records if r["sketch"] == "count-min" and r["width"] == 1024]
    assert all(r["recall"] > 0.98 and 0 <= r["error"] < 1e-4 for r in widest)


def test_kl_is_compared_with_the_curves_at_equal_bytes_text_by_text():
    def sample(variant, text, size, kl):
        return {"variant": variant, "text": text, "cache_bytes": size, "share_of_fp16": size / 100, "kl": kl, "top1_agreement": 1.0}  # fmt: skip

    samples = []
    for text, factor in (("a", 1), ("b", 10)):
        samples += [sample("h2o 64", text, 10, factor * 0.4), sample("h2o 128", text, 40, factor * 0.1)]
        samples += [sample("streaming-llm 64", text, 20, factor * 0.8), sample("topk 64, 128 x 2", text, 20, factor * 0.1)]  # fmt: skip
    (row,) = [row for row in sketch_grid.fidelity(samples) if row["variant"].startswith("topk")]
    assert row["against h2o"]["kl_ratio"] == pytest.approx(0.5)  # halfway between 0.4 and 0.1 in logarithms
    assert row["against streaming-llm"]["kl_ratio"] == pytest.approx(1 / 8)
    assert row["kl_geometric"] == pytest.approx(0.1 * 10**0.5)


def test_speed_is_relative_to_full_in_the_same_round():
    samples = [
        {"variant": variant, "step": step, "tokens": 10, "seconds": seconds}
        for variant, times in (("full", (2, 4)), ("sketch", (1, 2)))
        for step in ("prefill", "decode")
        for seconds in times
    ]
    rows = {(row["variant"], row["step"]): row for row in sketch_grid.speeds(samples)}
    assert rows["sketch", "decode"]["relative"] == 2
    assert rows["full", "decode"]["tokens_per_second"] == pytest.approx(3.75)


def test_it_runs_from_end_to_end(monkeypatch, tmp_path, capsys):
    for module in (schema, sketch_grid):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    monkeypatch.setattr(sketch_grid.lm, "load", lambda name: (tiny_model("llama", num_hidden_layers=1), Tokenizer()))
    for name, value in {"CONTEXT": 200, "PREDICT": 17, "LONG": 300, "ROUNDS": 2, "STEPS": 2}.items():
        monkeypatch.setattr(sketch_grid, name, value)
    for name, value in {"KEPT": (128,), "CURVE": (64, 128), "KEYS": (256,), "STREAM_WIDTHS": (64,), "CHANGES": {"race": {"sketch": "race"}}}.items():  # fmt: skip
        monkeypatch.setattr(sketch_grid, name, value)
    sketch_grid.main([])
    result = json.loads((tmp_path / "sketch_grid.json").read_text())
    assert {sample["measure"] for sample in result["samples"]} == {"stream", "fidelity", "speed"}
    assert set(result["summary"]) == {"streams", "fidelity", "speed"}
    assert (tmp_path / "sketch_grid.png").stat().st_size > 10_000
    assert "topk 128, 128 x 2" in capsys.readouterr().out
