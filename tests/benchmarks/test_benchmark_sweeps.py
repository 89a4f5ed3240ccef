"""Sweeps and error analysis: sizes follow from measured bytes, choices from KL, and words from the numbers."""

import json

import mlx.core as mx
import numpy as np
import pytest
from conftest import tiny_model, tiny_tokens

from benchmarks import compression_sweep, equal_bytes, error_analysis, hyperparameters, watched
from benchmarks.live_runs import continued, followed, prefilled
from mlxkv.live import live_config
from mlxkv.models import cache_spec


def as_result(outcome_summary, **config):
    """What a section gets: it has been JSON."""
    return json.loads(json.dumps({"quick": True, "config": config, "summary": outcome_summary, "samples": []}))


@pytest.mark.parametrize("method", equal_bytes.RECIPES)
def test_a_sized_method_is_measured_to_hold_almost_its_share_and_no_more(method):
    model, rows = tiny_model("llama"), np.array([tiny_tokens(300 + 33)])
    settings = live_config(method, **equal_bytes.largest(method, 0.2, cache_spec(model), 300, 32))
    assert equal_bytes.share_held(settings, cache_spec(model), 300, 32) <= 0.2
    (_, record) = continued(model, rows, 300, {"full": live_config("full"), method: settings}, "")
    # This model is held in float16 whatever it computes in, as its yardstick is.
    assert 0.17 < record["share_of_fp16"] <= 0.2


def test_all_recipes_exist_from_the_least_size_on():
    for method, recipe in equal_bytes.RECIPES.items():
        for n in (*range(equal_bytes.LEAST, 20), 41, 82, 205):
            live_config(method, **recipe(n))


def sweep_samples(claimed_digits):
    """Two texts, two keys; mp-kvm has a third of streaming-llm's KL, random two seeds apart by a factor of 4."""
    kls = {"full": [0.0], "mp-kvm": [0.1], "streaming-llm": [0.3], "random": [0.1, 0.4]}
    kls |= {method: [0.3] for method in equal_bytes.RECIPES if method not in kls}
    samples = []
    for method, seeds in kls.items():
        for seed, kl in enumerate(seeds):
            same = {"method": method, "ratio": 1 if method == "full" else 25, "seed": seed, "share_of_fp16": 0.04}
            for text in "ab":
                growth = np.exp(kl)
                samples.append({"measure": "fidelity", **same, "text": text, "kl": kl, "perplexity": 5 * growth, "perplexity_reference": 5.0})  # fmt: skip
            for key in ("12345", "54321"):
                digits = {"full": 1.0, "mp-kvm": claimed_digits}.get(method, 0.2)
                samples.append({"measure": "recall", **same, "key": key, "digits_first": digits, "log_probability": -1.0})  # fmt: skip
    return samples


def test_seeds_are_averaged_before_texts_are_compared():
    summary = compression_sweep.summarise(sweep_samples(1.0))
    rows = {row["method"]: row for row in summary["rows"]}
    assert rows["random"]["seeds"] == 2
    assert rows["random"]["kl_geometric"] == pytest.approx(0.2)
    assert rows["random"]["seed_deviations"]["kl"] == pytest.approx(np.log(2))
    assert rows["random"]["text_deviation"] == pytest.approx(0)
    assert rows["mp-kvm"]["perplexity_growth"] == pytest.approx(np.exp(0.1))
    ratios = {row["method"]: row["kl_ratio"] for row in summary["comparisons"]}
    assert ratios["mp-kvm"] == pytest.approx(1 / 3)
    assert ratios["random"] == pytest.approx(2 / 3)
    assert "streaming-llm" not in ratios


@pytest.mark.parametrize(("digits", "verdict"), [(1.0, "the claim holds"), (0.8, "the claim does not hold")])
def test_the_claim_of_recall_is_judged_by_the_numbers(digits, verdict):
    result = as_result(compression_sweep.summarise(sweep_samples(digits)), context=2048)
    text = compression_sweep.section(result)
    assert verdict in text
    assert "At 25:1 mp-kvm has the lowest KL" in text
    assert "none has significantly lower KL" in text  # two texts can show nothing
    assert compression_sweep.figure(result).axes


def swept(preset, kls):
    return [
        {"preset": preset, "configuration": name, "kl_geometric": kl, "share_of_fp16": 0.3} for name, kl in kls.items()
    ]


def test_the_best_change_and_the_best_of_each_setting_are_chosen_but_never_more_bytes():
    changes = hyperparameters.single_changes(hyperparameters.AXES["mp-kvm-96"], None)
    kls = dict.fromkeys(changes, 0.5) | {"default": 0.4, "window 8": 0.3, "window 32": 0.35, "metric cosine": 0.36, "similarity -40.0": 0.37, "flush 16": 0.38}  # fmt: skip
    chosen = hyperparameters.choice("mp-kvm-96", changes, swept("mp-kvm-96", kls))
    # Squared distances mean nothing to the cosine, which was better.
    assert list(chosen.values()) == [{"window": 8}, {"window": 8, "metric": "cosine", "flush": 16}]
    changes = hyperparameters.single_changes(hyperparameters.AXES["smartkv-0.3"], 1)
    kls = dict.fromkeys(changes, 0.5) | {"default": 0.4, "budget 0.4": 0.1}
    assert hyperparameters.choice("smartkv-0.3", changes, swept("smartkv-0.3", kls)) == {}


def test_centroids_make_room_for_a_longer_tail():
    assert hyperparameters.configured("mp-kvm-96", {"window": 32}).centroids == 68 - 16
    assert hyperparameters.configured("mp-kvm-96", {"flush": 16, "window": 8}).centroids == 68 + 8 + 8
    assert hyperparameters.configured("mp-kvm-96", {"decay": 1.0}).centroids == 68
    for preset, axes in hyperparameters.AXES.items():
        for change in hyperparameters.single_changes(axes, None).values():
            assert hyperparameters.configured(preset, change) != live_config(preset)


@pytest.mark.parametrize(
    ("factor", "verdict"), [(0.5, "the gain survives"), (2.0, "turns into a loss"), (1.0, "no difference")]
)
def test_a_gain_survives_only_where_other_texts_show_it(factor, verdict):
    samples = [
        {"preset": preset, "configuration": name, "text": str(i), "kl": 0.1 * times, "share_of_fp16": 0.1, "top1_agreement": 0.9}
        for preset in hyperparameters.AXES
        for name, times in (("default", 1), ("best change (decay 1.0)", factor))
        for i in range(8)
    ]  # fmt: skip
    tuned = hyperparameters.sweep([s | {"configuration": s["configuration"].replace("best change (decay 1.0)", "decay 1.0")} for s in samples])  # fmt: skip
    other = hyperparameters.confirmed(samples, tuned)
    assert [row["tuning_ratio"] for row in other] == pytest.approx([factor] * 2)
    assert other[0]["p_holm"] == (1 if factor == 1 else 4 / 2**8)
    result = as_result({"sweep": tuned, "other": other}, other=list(range(8)))
    assert verdict in hyperparameters.section(result)
    assert hyperparameters.figure(result).axes


def test_watching_changes_nothing_and_sees_how_attention_is_spread():
    model, rows = tiny_model("llama"), np.array([tiny_tokens(50), tiny_tokens(50, seed=2)])
    caches = prefilled(model, mx.array(rows[:, :30]), {"full": live_config("full"), "watched": watched.Settings()})
    reference = []
    followed(model, caches["full"], rows[:, 30:], reference)
    _, scores = followed(model, caches["watched"], rows[:, 30:], reference)
    np.testing.assert_allclose(scores["kl"], 0, atol=1e-6)
    (first, second) = caches["watched"][0].entropies
    assert first.shape == (2, 16)
    assert second.shape == (2, 3)
    assert 0 < float(first.min()) < float(first.max()) < np.log(46)


def test_entropies_are_those_of_visible_tokens_alone():
    flat = watched.attention_entropy(mx.zeros((1, 4, 2, 8)), mx.ones((1, 2, 6, 8)), 1.0)
    np.testing.assert_allclose(flat, [[np.log(5), np.log(6)]], rtol=1e-5)
    assert float(watched.entropy(mx.array([0.0, -mx.inf]))) == 0


@pytest.mark.parametrize(
    ("tokens", "where"),
    [
        ([1, 2, 3, 1, 2], "window"),
        ([1, 2, 3, 2, 1], "nowhere"),
        ([1, 2, *range(10, 10 + error_analysis.WINDOW - 2), 1, 2], "window"),
        ([1, 2, *range(10, 10 + error_analysis.WINDOW - 1), 1, 2], "outside"),
    ],
)
def test_a_pair_repeats_where_it_last_stood(tokens, where):
    assert error_analysis.repeats(np.array(tokens)) == where


def token_samples():
    """Ten texts, two lengths: KL of all methods rises with entropy and not with the loss, int4's also with length."""
    draw = np.random.default_rng(0)
    samples = []
    for text in range(10):
        for length in (256, 1024):
            for place in range(20):
                entropy = float(draw.uniform(1, 2))
                kl = dict.fromkeys(error_analysis.METHODS, entropy) | {"int4": entropy * length}
                if (text, place) == (3, 7):
                    kl["h2o-96"] = 1e4 + length
                samples.append({
                    "text": f"documentation-{text}" if text < 2 else f"kind-{'abcdefghij'[text]}", "length": length, "place": place,
                    "entropy": entropy, "loss": float(draw.uniform(1, 2)), "attention_entropy": 1.0, "token": "*x|\n",
                    "repeats": ("nowhere", "window", "outside")[place % 3], "kl": kl,
                })  # fmt: skip
    return samples


def test_error_analysis_finds_what_kl_goes_with():
    summary = error_analysis.summarise(token_samples())
    rho = {(row["method"], row["with"]): row for row in summary["correlates"]}
    assert rho["kivi-2", "entropy of the prediction"]["rho"] == pytest.approx(1)
    assert rho["kivi-2", "entropy of the prediction"]["p_holm"] == pytest.approx(5 * 2 / 2**10)
    assert rho["kivi-2", "loss"]["p_holm"] > 0.05
    assert ("kivi-2", "entropy of attention") not in rho  # it never varies
    lengths = {row["method"]: row for row in summary["lengths"]}
    assert lengths["int4"]["kl_ratio"] > 3
    assert lengths["int4"]["p_holm"] < 0.05 < lengths["kivi-2"]["p_holm"]
    assert next(iter(summary["methods"][0]["kinds"])) == "documentation"
    deciles = [part["kl"] for part in summary["methods"][2]["entropy_deciles"]]
    assert deciles == sorted(deciles)


def test_the_worst_tokens_are_different_ones_each_at_its_worst():
    worst = error_analysis.worst(token_samples())
    assert len({(token["text"], token["place"]) for token in worst}) == error_analysis.WORST
    assert (worst[0]["method"], worst[0]["length"], worst[0]["place"]) == ("h2o-96", 1024, 7)


def test_the_written_report_says_what_the_numbers_say():
    summary = error_analysis.summarise(token_samples())
    for token in summary["worst"]:
        token["before"] = "a\n\n b"
    result = as_result(summary, lengths=[256, 1024])
    lines = error_analysis.section(result).splitlines()
    int4, h2o = (next(line for line in lines if line.startswith(f"- **{name}**")) for name in ("int4", "h2o-96"))
    assert "More after longer contexts" in int4
    assert "highest on kind-d" in h2o
    assert "no certain difference" in h2o
    assert "rises with: entropy of the prediction" in h2o
    assert any(line.startswith(r"| a b | \*x\| |") for line in lines)
    assert error_analysis.figure(result).axes


def test_text_is_shown_as_it_is():
    assert error_analysis.escaped("a_b\n*c* | [d](e) <f>") == r"a\_b \*c\* \| \[d\](e) \<f\>"
    assert error_analysis.escaped(" \n") == "(blank)"
