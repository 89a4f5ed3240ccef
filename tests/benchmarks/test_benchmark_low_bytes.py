"""The experiment on a tenth to three tenths of the bytes: what is replayed is what the model does, and the section says what was found."""

import mlx.core as mx
import numpy as np
import pytest
from conftest import tiny_model, tiny_tokens
from zoo.build import build

from benchmarks import held, klt_parts
from benchmarks.experiments import low_bytes
from benchmarks.variants import LloydCache, LloydConfig, lloyd_codes, lloyd_levels, lloyd_values, sizes_of_live
from mlxkv.live import live_config, make_cache
from mlxkv.live.arrays import iter_arrays
from mlxkv.live.base import cache_class_of
from mlxkv.live.seam import assemble_cache
from mlxkv.models import cache_spec

TEXT = tiny_tokens(600)


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
@pytest.mark.parametrize("method", ["smartkv", "klt"])
def test_a_replayed_context_is_what_the_model_itself_leaves(name, method, monkeypatch):
    model = build(name)
    monkeypatch.setattr(held, "READ", 200)  # several chunks
    config = live_config(method, budget=0.5)
    ((_, exact),) = held.read(model, TEXT, [len(TEXT)])
    found = held.replayed(method, cache_class_of(config), config, exact).build(model, TEXT)
    alone = assemble_cache(model, dict.fromkeys(cache_spec(model).attention_layers, (cache_class_of(config), config)))
    model(mx.array([TEXT]), cache=alone)
    pairs = [(ours, theirs) for ours, theirs in zip(found.cache, alone) if hasattr(theirs, "state_fields")]
    assert pairs
    for ours, theirs in pairs:
        for first, second in zip(iter_arrays(ours.state), iter_arrays(theirs.state), strict=True):
            assert first.shape == second.shape
            if first.dtype == mx.float16:
                assert mx.allclose(first, second, atol=2e-3)
    logits = [model(mx.array([TEXT[:5]]), cache=cache)[0] for cache in (found.cache, alone)]
    assert mx.allclose(*logits, atol=2e-2)


def test_bytes_are_those_of_live_layers():
    model = build("gemma3_text")
    cache = make_cache(model, "full")
    model(mx.array([TEXT]), cache=cache)
    live = [entry for entry in cache if hasattr(entry, "state_fields")]
    assert 0 < len(live) < len(cache)
    sizes = sizes_of_live(model, cache)
    assert sizes["cache_bytes"] == sum(entry.nbytes for entry in live)
    assert sizes["fp16_bytes"] == len(TEXT) * sum(2 * slot.heads * slot.dim for entry in live for slot in entry.slots)


@pytest.mark.parametrize(("bits", "error"), [(2, 0.1175), (3, 0.03454), (4, 0.009497)])
def test_codes_of_the_baseline_have_the_error_that_is_known_of_lloyd_max(bits, error):
    """Max, Quantizing for minimum distortion, 1960, table I; of rows that are Gaussian."""
    assert lloyd_levels(bits) == pytest.approx([-level for level in reversed(lloyd_levels(bits))], abs=1e-3)
    x = mx.array(np.random.default_rng(0).standard_normal((200, 64)).astype(np.float32)) * 5
    codes, norms = lloyd_codes(x, bits)
    assert codes.shape == (200, 8 * bits)
    lost = mx.square(lloyd_values(codes, norms, bits) - x).sum() / mx.square(x).sum()
    assert float(lost) == pytest.approx(error, rel=0.06)  # of rows of one length, a little less


def test_the_baseline_leaves_sinks_and_newest_tokens_as_they_are():
    model = tiny_model("llama")
    ((_, exact),) = held.read(model, TEXT, [len(TEXT)])
    held_cache = held.replayed("turbo", LloydCache, LloydConfig(bits=3), exact).build(model, TEXT).cache
    keys = exact.calls[0].keys.astype(mx.float16)
    stored, _ = held_cache[0].keys_and_values()
    same = (stored == keys).all(axis=(0, 1, 3)).tolist()
    assert stored.shape == keys.shape
    assert all(same[:4])
    assert all(same[-32:])
    assert not any(same[4 : 4 + (len(TEXT) - 36) // 16 * 16])


@pytest.mark.parametrize("part", klt_parts.WITHOUT)
def test_klt_without_a_part_stores_something_else_in_no_more_bytes(part):
    """Without calibration nothing differs here, as there are no artifacts of a tiny model."""
    model = tiny_model("llama", num_hidden_layers=2, head_dim=64)
    ((_, exact),) = held.read(model, TEXT, [len(TEXT)])
    config = live_config("klt", budget=0.2)
    kinds = (cache_class_of(config), klt_parts.WITHOUT[part])
    whole, changed = (held.replayed("", kind, config, exact).build(model, TEXT).cache for kind in kinds)
    values = [mx.concatenate([layer.keys_and_values()[0] for layer in cache]) for cache in (whole, changed)]
    assert not mx.isnan(values[1]).any()
    assert bool(mx.array_equal(*values)) == (part == "calibration")
    assert sum(e.nbytes for e in changed) <= 1.02 * sum(e.nbytes for e in whole)


@pytest.fixture(scope="module")
def result():
    """klt has a quarter of the rival's KL at its bytes, on each of ten texts; uncalibrated the same as the rival."""
    samples = []
    for text in range(10):
        for variant, share, kl in (
            ("klt-0.1", 0.1, 0.04), ("klt-0.165", 0.165, 0.02), ("klt-0.3", 0.3, 0.0025), ("klt-0.1 uncalibrated", 0.1, 0.16),
            ("klt-0.3 uncalibrated", 0.3, 0.01 * (1.1 if text % 2 else 1 / 1.1)), ("int4", 0.3, 0.01), ("klt without buckets", 0.165, 0.06),
        ):  # fmt: skip
            samples.append({"model": "smollm2-135m", "context": 1024, "text": str(text), "variant": variant, "cache_bytes": 1e6 * share,
                            "share_of_fp16": share, "kl": kl, "top1_agreement": 0.9, "perplexity_reference": 9, "perplexity_delta": 0.1})  # fmt: skip
    config = {
        "model": "smollm2-135m",
        "contexts": [1024],
        "predict": 64,
        "texts": list("0123456789"),
        "calibration": "none",
        "ablated": 0.165,
    }
    return {"config": config, "summary": low_bytes.summarise(samples), "quick": False}


def test_the_section_says_what_is_beyond_chance_at_equal_bytes(result):
    said = low_bytes.section(result)
    assert "KL is of `klt` lower than that of `int4`, and of `klt uncalibrated` not surely different from any." in said
    (line,) = [line for line in said.splitlines() if line.startswith("| `int4` | 0.300 | **")]
    assert "**0.25 (0.25 to 0.25)**, 10 of 10 |" in line
    assert "| klt without buckets | 0.165 | 0.06 | **3 (3 to 3)**, 0 of 10 |" in said
    assert low_bytes.brief(result) in low_bytes.section(result) or low_bytes.setting(result, 1024) in low_bytes.brief(
        result
    )


def test_bytes_at_equal_kl_are_read_between_budgets(result):
    rows = {row["curve"]: row for row in result["summary"]["paired"]}
    assert rows["klt"]["share_at_equal_kl"] == pytest.approx((0.165 * 0.3 * (0.165 / 0.3) ** (1 / 3)) ** 0.5, rel=0.02)
    assert low_bytes.share_at(0.5, [row for row in result["summary"]["caches"] if row["method"] == "klt"]) is None


def test_the_figure_has_a_line_for_each_method(result):
    assert [line.get_label() for line in low_bytes.figure(result).axes[0].lines] == ["klt", "klt uncalibrated", "int"]


def test_texts_are_of_five_kinds_and_none_is_short():
    class Words:
        def encode(self, text):
            return text.split()

    with pytest.raises(ValueError, match="fewer than 100000 tokens"):
        low_bytes.held_out(_tokenizer(Words), 100_000)
    assert len(low_bytes.held_out(_tokenizer(Words), 500)) == 10


def _tokenizer(kind):
    tokenizer = kind()
    tokenizer.bos_token = None
    return tokenizer
