"""SmartKV's ablation: what is changed, and what is said about it."""

import mlx.core as mx
import pytest
from conftest import tiny_model, tiny_tokens

from benchmarks import smartkv_ablation as ablation
from benchmarks.live_runs import caches_of
from mlxkv.live import live_config

BASE = "smartkv-0.3"
CHANGES = [change for changes in ablation.PARTS.values() for change in changes]
LOSSES = dict.fromkeys(CHANGES, 0.02)  # of top-1 agreement


def result(kls, losses=LOSSES, texts=10):
    """Every change with KL that many times the preset's on every text (a list: one for each seed), and top-1 lost."""
    samples = []
    for variant, times in {BASE: 1.0, **kls}.items():
        for seed, factor in enumerate(times if isinstance(times, list) else [times]):
            name = f"{variant}, seed {seed}" if isinstance(times, list) else variant
            for text in range(texts):
                sample = {"text": str(text), "kl": factor * 10.0**-text, "top1_agreement": 0.9 - losses.get(variant, 0)}
                samples.append({"base": BASE, "variant": name, "perplexity_delta": 0.1, "share_of_fp16": 0.3, **sample})
    config = {"context": 768, "predict": 256, "seeds": 3}
    return {"config": config, "summary": ablation.summarise(samples), "samples": samples, "quick": False}


def test_seeds_are_merged_by_text_and_their_deviation_kept():
    rows = {
        row["change"]: row for row in result({"random order": [1.0, 2.0, 4.0], "early tokens first": 3.0})["summary"]
    }
    assert list(rows) == [BASE, "random order", "early tokens first"]
    assert rows["random order"]["kl_ratio"] == pytest.approx(2)
    assert rows["random order"]["texts"] == 10
    mean = sum(10.0**-text for text in range(10)) / 10
    assert rows["random order"]["kl_of_seeds"] == pytest.approx([mean, 2 * mean, 4 * mean])
    assert rows["random order"]["kl_deviation"] == pytest.approx(mean * (7 / 3) ** 0.5)
    assert rows["early tokens first"]["kl_deviation"] is None


def test_a_part_is_worth_something_only_if_all_that_replaces_it_is_worse():
    worse = dict.fromkeys(CHANGES, 1.1)
    text = ablation.section(result(worse))
    assert (
        "KL rises by more than 1 % beyond chance without attention tracking, dynamic allocation, moving average" in text
    )
    assert "is worth more than 1 % holds where KL rises and top-1 agreement falls." in text
    text = ablation.section(result({**worse, "greedy allocator": 1.0}, {**LOSSES, "decay 0.5": 0.005}))
    assert "without attention tracking, dynamic allocation, moving average, equal layers;" in text
    assert "without attention tracking, dynamic allocation, exact allocator, equal layers." in text
    assert "is worth more than 1 % does not hold." in text


def test_two_texts_are_too_few_to_say_anything():
    text = ablation.section(result(dict.fromkeys(CHANGES, 9.0), texts=2))
    assert "in no case KL rises by more than 1 % beyond chance; in no case top-1" in text


def test_p_is_corrected_for_all_changes_at_one_budget():
    rows = ablation.corrected(result(dict.fromkeys(CHANGES, 1.1))["summary"])
    assert [row["p_holm"] for row in rows[1:]] == pytest.approx([len(CHANGES) * 2 / 2**10] * len(CHANGES))


def test_static_importance_is_what_a_token_had_after_its_chunk():
    model, tokens = tiny_model("llama", head_dim=64), mx.array([tiny_tokens(90)])
    cached = {}
    for static in (False, True):
        settings = ablation.Settings(budget=0.7, static=static, recent=80)
        cache = caches_of(model, settings)
        cached[static] = []
        for start, stop in ((0, 64), (64, 70), (70, 90)):
            model(tokens[:, start:stop], cache=cache)
            cached[static].append(mx.array(cache[0].importance))
    first, second, third = cached[True]
    assert mx.array_equal(second[..., :64], first)
    assert mx.array_equal(third[..., :70], second)
    assert not mx.allclose(cached[False][1][..., 4:64], first[..., 4:64])


def test_a_variant_differs_from_the_preset_in_what_its_name_says():
    variants = ablation.changed(BASE, quick=False)
    assert len(variants) == 1 + len(CHANGES) - 1 + ablation.SEEDS
    assert variants[BASE] == live_config(BASE)
    assert variants["random order, seed 2"] == ablation.Settings(budget=0.3, order="random", seed=2)
    assert variants["decay 0.5"] == ablation.Settings(budget=0.3, decay=0.5)


def test_a_bar_stands_for_every_change():
    axes = ablation.figure(result(dict.fromkeys(CHANGES, 1.1))).axes[0]
    assert [label.get_text().split(": ")[1] for label in axes.get_yticklabels()] == CHANGES
    assert [bar.get_width() for bar in axes.patches] == pytest.approx([0.1] * len(CHANGES))
