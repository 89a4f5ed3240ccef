"""The live methods' benchmark: a shared prefill changes nothing, and it computes what it says."""

import json
from math import exp, log

import mlx.core as mx
import numpy as np
import pytest
from conftest import save_model, tiny_config, tiny_model, tiny_tokens

from benchmarks import live_methods, paired, schema, uniform
from benchmarks.live_runs import caches_of, continued, fp16_bytes, held_bytes, possible, prefilled, timed
from mlxkv import lm, metrics
from mlxkv.models import cache_spec
from mlxkv.presets import live_settings

VARIANTS = {
    "full": live_settings("full"),
    "int4": live_settings("int4"),
    "kivi": live_settings("kivi", residual=16),
    "random": live_settings("random", tokens=80),
    "h2o": live_settings("h2o", heavy=30, recent=30),
    "smartkv": live_settings("smartkv", budget=0.7),
    "uniform-16": uniform.Settings(16),
}


def rows(length, batch=2):
    return np.array([tiny_tokens(length, seed=seed) for seed in range(batch)])


@pytest.mark.parametrize("name", ["llama", "lfm2", "glm4_moe_lite", "gpt2"])
def test_a_shared_prefill_leaves_every_cache_as_its_own_would(name):
    model, tokens = tiny_model(name), mx.array(rows(150))
    shared = prefilled(model, tokens, VARIANTS)
    for variant, settings in VARIANTS.items():
        alone = caches_of(model, settings)
        model(tokens, cache=alone)
        pairs = [pair for entries in zip(alone, shared[variant]) for pair in zip(*(entry.state for entry in entries))]
        assert len(pairs) >= 2 * len(cache_spec(model).attention_layers)
        for ours, theirs in pairs:
            if isinstance(ours, mx.array):
                same = (
                    mx.allclose(ours, theirs, atol=1e-6) if ours.dtype == mx.float32 else mx.array_equal(ours, theirs)
                )
                assert same, variant
        after = [model(tokens[:, :1], cache=caches) for caches in (alone, shared[variant])]
        assert mx.allclose(*after, atol=1e-4), variant


def test_records_say_what_decoding_each_text_alone_says():
    model, texts = tiny_model("llama"), rows(149)
    records = continued(model, texts, 128, VARIANTS, "tiny")
    (record,) = [one for one in records if (one["variant"], one["text"]) == ("int4", 1)]
    logits = []
    for settings in (VARIANTS["full"], VARIANTS["int4"]):
        caches = caches_of(model, settings)
        model(mx.array(texts[1:, :128]), cache=caches)
        chunks = (texts[1:, 128:144], texts[1:, 144:-1])
        logits.append(mx.concatenate([model(mx.array(chunk), cache=caches)[0] for chunk in chunks]))
    targets = mx.array(texts[1, 129:])
    assert record["kl"] == pytest.approx(float(metrics.kl_divergence(*logits).mean()), rel=1e-3)
    assert record["top1_agreement"] == pytest.approx(metrics.top1_agreement(*logits))
    assert record["perplexity"] == pytest.approx(metrics.perplexity(logits[1], targets), rel=1e-4)
    assert record["perplexity_reference"] == pytest.approx(metrics.perplexity(logits[0], targets), rel=1e-4)


def test_full_differs_from_itself_by_nothing_and_float16_takes_what_the_yardstick_says():
    records = continued(tiny_model("llama"), rows(149), 128, VARIANTS, "tiny")
    for record in records:
        if record["variant"] == "full":
            assert record["kl"] == 0
            assert record["top1_agreement"] == 1
            assert record["perplexity_delta"] == 0
        if record["variant"] == "uniform-16":
            assert record["share_of_fp16"] == pytest.approx(1)
            assert 0 < record["kl"] < 1e-3


def test_bytes_are_a_texts_own_and_a_mean_over_what_the_chunks_find():
    model, texts = tiny_model("llama"), rows(128 + 32 + 1, batch=3)
    record = continued(model, texts, 128, VARIANTS, "tiny")[3]
    caches = prefilled(model, mx.array(texts[:1, :128]), VARIANTS)["int4"]
    assert record["variant"] == "int4"
    assert (
        record["cache_bytes"] == held_bytes(caches) + fp16_bytes(model, 16) / 2
    )  # two chunks find 0 and 16 in the tail
    assert fp16_bytes(model, 1) == 2 * 2 * 2 * 2 * 8  # bytes x layers x (K, V) x heads x dims


def test_every_variant_is_timed_in_each_round():
    records = timed(tiny_model("llama"), tiny_tokens(134), 128, VARIANTS, rounds=2)
    assert [record["variant"] for record in records] == [*VARIANTS] * 3
    assert [record["tokens"] for record in records if record["step"] == "decode"] == [3] * 2 * len(VARIANTS)
    assert all(record["peak_bytes"] > 0 for record in records if record["step"] == "decode")


def test_a_curve_is_read_between_its_points_in_logarithms():
    curve = [(400, 1e-4), (100, 1e-2)]
    assert paired.at_bytes(200, curve) == pytest.approx(1e-3)
    assert paired.at_bytes(50, curve) == pytest.approx(1e-2)
    assert paired.at_bytes(800, curve) == pytest.approx(1e-4)


def test_what_fits_is_a_point_of_the_curve():
    curve = [(400, 1e-4), (100, 1e-2), (200, 1e-3)]
    assert [paired.within_bytes(size, curve) for size in (50, 100, 399, 400)] == [1e-2, 1e-2, 1e-3, 1e-4]


def test_p_counts_the_flips_that_go_as_far():
    assert paired.sign_flip(np.array([-1.0, -2, -3, -4])) == 2 / 16
    assert paired.sign_flip(np.array([1.0, 1, 1, -1])) == 10 / 16  # sums of +-2 or +-4
    assert paired.sign_flip(np.zeros(3)) == 1


def test_a_comparison_is_of_geometric_means():
    result = paired.compare([1e-3, 4e-3, 1e-2], [2e-3, 8e-3, 5e-3])
    assert result["kl_ratio"] == pytest.approx(0.5 ** (1 / 3))
    assert result["better_on"] == 2
    low, high = result["kl_ratio_interval"]
    assert 0.499 < low < result["kl_ratio"] < high < 2.001
    assert paired.compare([1e-3] * 4, [2e-3] * 4)["kl_ratio_interval"] == pytest.approx([0.5, 0.5])


def test_too_many_texts_for_all_flips_are_refused():
    with pytest.raises(ValueError, match="21 texts"):
        paired.compare([1.0] * 21, [2.0] * 21)


def test_a_preset_is_compared_at_its_own_bytes_of_each_text():
    def sample(variant, text, size, kl):
        return {"model": "m", "variant": variant, "text": text, "cache_bytes": size, "kl": kl}

    curve = [
        sample(f"uniform-{bits}", text, size, kl)
        for text in "ab"
        for bits, size, kl in ((2, 100, 1e-2), (16, 400, 1e-4))
    ]
    kivi = [sample("kivi-2", text, 200, 2e-3) for text in "ab"]
    between = (2e-3 * 1e-4) ** 0.5  # at the geometric mean of KIVI's and float16's bytes
    ours = [sample("smartkv-0.5", text, 200 * 2**0.5, 2 * between) for text in "ab"]
    rows = live_methods.comparisons([*curve, *kivi, *ours])
    result = {(row["variant"], row["against"]): row for row in rows if row["read"] == "between points"}
    assert list(result) == [("kivi-2", "uniform"), ("smartkv-0.5", "uniform"), ("smartkv-0.5", "kivi")]
    assert result["smartkv-0.5", "kivi"]["kl_ratio"] == pytest.approx(2)
    assert result["kivi-2", "uniform"]["kl_ratio"] == pytest.approx(2)
    assert [row["texts"] for row in rows] == [2] * 6
    (fitting,) = [row for row in rows if (row["against"], row["read"]) == ("kivi", "largest that fits")]
    assert fitting["kl_ratio"] == pytest.approx(2 * between / 2e-3)


def test_speed_is_relative_to_full_in_the_same_round():
    def sample(variant, step, seconds):
        return {"variant": variant, "step": step, "tokens": 10, "seconds": seconds, "peak_bytes": int(seconds)}

    samples = [sample("full", "prefill", 2), sample("int8", "prefill", 4)]
    for full, int8 in ((1, 2), (10, 40), (1, 4)):
        samples += [sample("full", "decode", full), sample("int8", "decode", int8)]
    full, int8 = live_methods.speeds(samples)
    assert (full["prefill_relative"], full["decode_relative"]) == (1, 1)
    assert (int8["prefill_relative"], int8["decode_relative"]) == (0.5, 0.25)
    assert int8["decode_tokens_per_second"] == 2.5
    assert int8["decode_peak_bytes"] == 40


def test_a_key_is_found_when_all_its_digits_come_first():
    hits = [(5, -0.1), (4, -0.3)]
    (row,) = live_methods.passkeys(
        [{"variant": "h2o", "key": "12345", "digits_first": n, "log_probability": p} for n, p in hits]
    )
    assert row == {"variant": "h2o", "found": 0.5, "digits_first": 0.9, "log_probability": pytest.approx(-0.2)}


def test_means_over_texts_are_also_geometric():
    base = {"model": "m", "variant": "int4", "cache_bytes": 1, "share_of_fp16": 1, "top1_agreement": 1,
            "perplexity_reference": 9, "perplexity_delta": 0}  # fmt: skip
    (row,) = live_methods.fidelity([{**base, "kl": 1e-2}, {**base, "kl": 1e-4}])
    assert row["kl"] == pytest.approx(5.05e-3)
    assert row["kl_geometric"] == pytest.approx(exp((log(1e-2) + log(1e-4)) / 2))
    assert (row["method"], row["texts"]) == ("uniform", 2)


def test_a_method_that_a_model_cannot_have_is_left_out_and_named(capsys):
    variants = {**VARIANTS, "smartkv-0.05": live_settings("smartkv", budget=0.05)}
    assert list(possible(tiny_model("llama"), variants)) == list(VARIANTS)
    assert "left out: smartkv-0.05: layer 0" in capsys.readouterr().out


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory):
    """A random llama with heads of 64 dims, in which every preset is possible, and a tokenizer of bytes."""
    settings = {"vocab_size": 264, "head_dim": 64}
    path = save_model(
        tiny_model("llama", **settings), tiny_config("llama", **settings), tmp_path_factory.mktemp("wide")
    )
    return lm.load(str(path))


@pytest.mark.parametrize("quick", [True, False])
def test_a_run_prints_its_summary_and_writes_unless_quick(quick, wide_model, tmp_path, monkeypatch, capsys):
    model = wide_model
    monkeypatch.setattr(live_methods.lm, "load", lambda name: model)
    monkeypatch.setattr(live_methods.miniatures, "names", list)
    for name, value in {
        "CONTEXT": 70,
        "PREDICT": 2,
        "SPEED_TOKENS": 1,
        "PASSKEY_CONTEXT": 70,
        "RESULTS": tmp_path,
    }.items():
        monkeypatch.setattr(live_methods, name, value)
    monkeypatch.setattr(schema, "RESULTS", tmp_path)
    monkeypatch.setattr("sys.argv", ["live_methods", *["--quick"] * quick])
    live_methods.main()
    assert "'variant': 'int8'" in capsys.readouterr().out
    written = sorted(path.name for path in tmp_path.iterdir())
    assert written == ([] if quick else ["live_methods.json", "live_methods.png"])
    if not quick:
        result = json.loads((tmp_path / "live_methods.json").read_text())
        assert {sample["measure"] for sample in result["samples"]} == {"fidelity", "ablation", "passkey", "speed"}
        assert len({sample["text"] for sample in result["samples"] if sample["measure"] == "fidelity"}) == 10


def test_a_change_is_compared_with_the_original_text_by_text():
    def sample(variant, text, kl):
        return {"model": live_methods.MODEL, "variant": variant, "text": text, "kl": kl, "share_of_fp16": 0.3}

    originals = [sample(live_methods.ABLATED, text, kl) for text, kl in (("a", 1e-3), ("b", 1e-2))]
    changed = [
        sample(f"order random, seed {seed}", text, kl)
        for seed, times in enumerate((1, 4))
        for text, kl in (("b", times * 1e-2), ("a", times * 1e-3))
    ]
    changed += [sample("order late", text, 1e-2) for text in "ab"]
    random, late = live_methods.ablated(changed, originals)
    assert random["kl_ratio"] == pytest.approx(2)
    assert random["kl_of_seeds"] == pytest.approx([10**-2.5, 4 * 10**-2.5])
    assert late["kl_ratio"] == pytest.approx(10**0.5)
    assert (late["change"], late["texts"], len(late["kl_of_seeds"])) == ("order late", 2, 1)
