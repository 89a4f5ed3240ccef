"""The rate-distortion benchmarks: rates at equal KL, the Gaussian bound, and ideas that are left out and put back."""

import numpy as np
import pytest
from synthetic import PLAIN, rd_artifacts, toy_dump

from benchmarks import rate_ablation, rate_distortion, rate_miniatures, rate_window
from benchmarks.paired import bd_rate
from benchmarks.rate_ablation import CHANGES, changed_variant
from benchmarks.rate_variants import water_filling
from mlxkv.codec.methods import kvtc_rd
from mlxkv.codec.session import CacheCodec
from mlxkv.evaluate.variants import Variant


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    monkeypatch.setattr(rate_distortion, "RESAMPLES", 100)


CURVE = [(1000.0, 0.05), (2000.0, 0.01), (8000.0, 0.001)]


def scaled(curve, factor):
    return [(factor * size, kl) for size, kl in curve]


def test_half_the_bytes_at_every_kl_is_a_rate_of_minus_a_half():
    assert bd_rate(scaled(CURVE, 0.5), CURVE, 0, 1) == pytest.approx(-0.5)
    assert bd_rate(CURVE, CURVE[::-1], 0, 1) == pytest.approx(0)
    assert bd_rate(CURVE, scaled(CURVE, 0.5), 0, 1) == pytest.approx(1)


def test_only_the_shared_range_within_the_limits_counts():
    ours = [(500.0, 0.2), (500.0, 0.011), (2000.0, 0.01), (8000.0, 0.001)]
    assert bd_rate(ours, CURVE, 0.001, 0.01) == pytest.approx(0, abs=1e-9)
    assert bd_rate(ours, CURVE, 0.02, 0.05) < -0.4
    assert bd_rate([CURVE[0], (1500.0, 0.02)], CURVE[1:], 0, 1) is None
    assert bd_rate(CURVE, CURVE, 0.06, 1) is None


def test_water_filling_is_the_rate_of_gaussians():
    variances = np.array([4.0, 4.0, 4.0, 4.0])
    assert water_filling(variances, 4.0) == pytest.approx(4 * 0.5 * np.log2(4.0))
    assert water_filling(np.array([4.0, 0.25]), 0.5) == pytest.approx(0.5 * np.log2(16), rel=1e-6)
    assert water_filling(variances, 16.0) == pytest.approx(0, abs=1e-6)


def sample(variant, at, text, size, kl, **more):
    facts = {"coded_bytes": size, "cache_bytes": size + 100, "ratio": 2.0, "ratio_middle": 10_000 / size, "kl": kl}
    facts |= {"top1_agreement": 0.9, "perplexity_delta": 0.1, "artifact_bytes": 5, "predicted_tokens": 64}
    return {
        "variant": variant,
        "at": float(at),
        "text": text,
        "kind": "prose",
        "sink_and_window_bytes": 100,
        **facts,
        **more,
    }


def made_up():
    samples = []
    for i, text in enumerate(("a", "b", "c")):
        for at, size, kl in ((8, 2000, 0.01), (16, 1000, 0.02), (32, 500, 0.04)):
            samples.append(sample("kvtc", at, text, size * (1 + i / 10), kl))
        for at, size, kl in ((22, 300, 0.04), (38, 1200, 0.01)):
            samples.append(sample("kvtc-rd", at, text, size * (1 + i / 20), kl))
            samples.append(
                {"variant": "Gaussian R(D)", "at": float(at), "text": text, "kind": "theory", "coded_bytes": size / 2}
            )
        samples.append(sample("kvtc", 16, text, 1000, 0.02, kind="long"))
    return samples


def test_a_summary_says_what_was_saved():
    summary = rate_distortion.summarise(made_up())
    rate = summary["bd_rate"]["kvtc-rd"]
    assert -0.5 < rate["interval"][0] <= rate["bd_rate"] <= rate["interval"][1] < -0.3
    assert summary["predicted_tokens"] == 3 * 64
    assert summary["theory"][0]["bytes_over_gaussian"] == pytest.approx(2.1, abs=0.01)
    config = {"basis_bytes": 40_000_000, "kl": [0.003, 0.05]}
    shown = rate_distortion.section({"summary": summary, "config": config, "samples": made_up()})
    assert f"{-rate['bd_rate']:.0%} fewer bytes" in shown
    assert rate_distortion.figure({"summary": summary}).axes[0].get_legend()


def test_curves_that_share_no_kl_have_no_rate():
    apart = [s for s in made_up() if s["variant"] != "kvtc"] + [sample("kvtc", 8, t, 9, 0.9) for t in "abc"]
    summary = rate_distortion.summarise(apart)
    assert summary["bd_rate"]["kvtc-rd"]["bd_rate"] is None
    shown = rate_distortion.section({"summary": summary, "config": {"basis_bytes": 1, "kl": [0, 1]}, "samples": apart})
    assert "share no KL" in shown


def test_an_ablation_says_what_each_idea_earned():
    points = ((22, 300, 0.04), (38, 1200, 0.01))
    samples = [
        sample(name, at, text, size * (1.1 if name == "no shift a token" else 1), kl)
        for name in ("kvtc-rd", *CHANGES) for text in "abc" for at, size, kl in points
    ]  # fmt: skip
    summary = rate_ablation.summarise(samples, list(CHANGES))
    assert summary["bd_rate"]["no shift a token"]["bd_rate"] == pytest.approx(0.1, abs=1e-3)
    shown = rate_ablation.section({"summary": summary, "config": {"basis_bytes": 40_000_000}})
    assert shown.startswith("The dearest to leave out: no shift a token, +10% bytes")
    assert "+10% (+10% to +10%)" in shown


def test_a_window_is_compared_by_whole_files():
    points = ((22, 3000, 0.04), (38, 12_000, 0.01))
    samples = [
        sample(name, at, text, 1, kl, cache_bytes=size * (2 if name == rate_window.RAW else 1))
        for name in rate_window.WINDOWS for text in "ab" for at, size, kl in points
    ]  # fmt: skip
    summary = rate_window.summarise(samples)
    assert {rate["bd_rate"] for rate in summary["bd_rate"].values()} == {-0.5}
    shown = rate_window.section({"summary": summary, "config": {"held": 2048}, "samples": samples})
    assert "Against a raw window that is -50% bytes at equal KL. 2 held-out texts" in shown
    assert "| the last 128 raw | 22 | 0.0 MB | 2.0x | 0.0 MB | 0.0400 | - |" in shown


def test_windows_of_the_benchmark_are_the_codecs(tmp_path):
    codec = CacheCodec(rd_artifacts(tmp_path), recent=8)
    assert rate_window.WINDOWS[next(iter(rate_window.WINDOWS))] == (128, codec.coder.window_quality_bonus)
    for name, (tokens, finer) in rate_window.WINDOWS.items():
        made = rate_window.variant(codec, name, 40).settings
        assert (made["w"], made["quality"]) == (tokens, 40), name
        assert made["window_quality"] == (None if finer is None else 40 + finer), name


def test_the_miniatures_table_counts_those_that_agree():
    samples = [
        {**each, "model": model}
        for model in ("miniature/x", "miniature/y")
        for each in made_up()
        if each["kind"] == "prose"
    ]
    samples += [
        {**sample("kvtc-weighted", 8, t, 900, 0.02), "model": m} for t in "abc" for m in ("miniature/x", "miniature/y")
    ]
    shown = rate_miniatures.section({"summary": rate_miniatures.summarise(samples)})
    assert shown.startswith("On 2 of 2 miniatures")


@pytest.mark.parametrize("name", [name for name, constants in CHANGES.items() if constants])
def test_an_idea_left_out_changes_the_file_and_is_there_again_afterwards(tmp_path, monkeypatch, name):
    codec, dump = CacheCodec(rd_artifacts(tmp_path), recent=8), toy_dump(PLAIN, length=200, seed=9)
    before = codec.compress_dump(dump), codec.decompress_dump(codec.compress_dump(dump)).k
    found = []

    def hold(model, tokens, exact=None):
        blob = codec.compress_dump(dump)
        found.append((blob, codec.decompress_dump(blob).k))

    monkeypatch.setattr("benchmarks.rate_ablation.coded", lambda codec, name, dtype: Variant(name, {}, hold))
    changed_variant(name, 35, codec, CHANGES[name]).build(None, [])
    assert found[0][0] != before[0] or not np.array_equal(found[0][1], before[1])
    assert codec.compress_dump(dump) == before[0]
    assert kvtc_rd.KEY_STEP_FACTOR == 1.5
