"""The rate-distortion experiment: rates at equal KL, and the Gaussian bound."""

import numpy as np
import pytest

from benchmarks.experiments import rate_distortion
from benchmarks.experiments.rate_distortion import water_filling
from benchmarks.paired import bd_rate


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
    shown = rate_distortion.section({"summary": summary, "config": config})
    assert f"{-rate['bd_rate']:.0%} fewer bytes" in shown
    assert rate_distortion.figure({"summary": summary}).axes[0].get_legend()


def test_curves_that_share_no_kl_have_no_rate():
    apart = [s for s in made_up() if s["variant"] != "kvtc"] + [sample("kvtc", 8, t, 9, 0.9) for t in "abc"]
    summary = rate_distortion.summarise(apart)
    assert summary["bd_rate"]["kvtc-rd"]["bd_rate"] is None
    shown = rate_distortion.section({"summary": summary, "config": {"basis_bytes": 1, "kl": [0, 1]}})
    assert "share no KL" in shown
