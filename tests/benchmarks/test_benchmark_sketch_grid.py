"""The benchmark of sketches compares what it says, at equal tokens and bytes, and runs from end to end on a tiny model."""

import json
from dataclasses import asdict

import mlx.core as mx
import numpy as np
import pytest
from conftest import tiny_model, tiny_tokens
from live_checks import lone_cache

from benchmarks import sketch_grid
from mlxkv.models import kv_slots
from mlxkv.spec import CacheSpec

SPEC = CacheSpec("llama", (kv_slots(2, 8, None),))


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


def test_it_runs_from_end_to_end_and_is_shown_from_its_result_alone(monkeypatch):
    monkeypatch.setattr(sketch_grid.lm, "load", lambda name: (tiny_model("llama", num_hidden_layers=1), Tokenizer()))
    for name, value in {"CONTEXT": 200, "PREDICT": 17, "KEPT": (128,), "CURVE": (64, 128), "KEYS": (256,), "STREAM_WIDTHS": (64,)}.items():  # fmt: skip
        monkeypatch.setattr(sketch_grid, name, value)
    exact = {sketch_grid.EXACT: {"width": 8192}}
    monkeypatch.setattr(sketch_grid, "CHANGES", {"race": {"sketch": "race"}, **exact})
    result = json.loads(json.dumps(asdict(sketch_grid.run(quick=False))))
    assert {sample["measure"] for sample in result["samples"]} == {"stream", "fidelity"}
    assert set(result["summary"]) == {"streams", "fidelity"}
    text = sketch_grid.section(result)
    assert "| topk 128, 128 x 2 |" in text
    assert "| topk 256, exact |" not in text
    assert "topk 256, exact, with counters as good as exact ones" in text
    assert len(sketch_grid.figure(result).axes) == 2


def test_the_section_counts_what_is_sure_and_leaves_exact_counters_out():
    def row(variant, low, high, p):
        against = {"texts": 10, "kl_ratio": (low * high) ** 0.5, "kl_ratio_interval": [low, high], "p": p}
        return {"variant": variant, "share_of_fp16": 0.1, "kl_geometric": 0.2, "against h2o": against, "against streaming-llm": against}  # fmt: skip

    stream = {"of": "attention per head", "sketch": "count-min", "width": 64, "depth": 2, "keys": 1000, "recall": 0.25,
              "bytes": 2000, "exact_bytes": 4000, "bound": 0.1, "beyond_bound": 0.2, "may_be_beyond": 0.1}  # fmt: skip
    fidelity = [row("topk 1, 1 x 1", 0.5, 0.8, 0.002), row("topk 1, 2 x 2", 0.9, 1.4, 0.04), row("topk 1, exact", 4, 9, 0.001)]  # fmt: skip
    larger = {**stream, "bytes": 8000, "recall": 0.9, "beyond_bound": 0.0}
    result = {"summary": {"fidelity": fidelity, "streams": [stream, larger]}, "config": {"heaviest": 128}}
    text = sketch_grid.section(result)
    assert "0.63 to 1.12 times the KL of h2o; of 2 the 95 % interval is below 1 for 1, above 1 for 0" in text
    assert "corrected as Holm does, below 0.05 for 2" in text
    assert "finds 25.0 % of the 128" in text
    assert "kept in 1 of 2 streams" in text
