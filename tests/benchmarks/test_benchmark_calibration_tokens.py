"""The curve of fidelity over calibration tokens, from samples made up."""

import pytest

from benchmarks.experiments import calibration_tokens


def sample(tokens, quality, kl, size, text="code"):
    found = {"text": text, "tokens": tokens, "kl": kl, "cache_bytes": 3 * size, "top1_agreement": 0.9, "ratio": 2.0}
    if not tokens:
        return found
    learnt = {"artifact_bytes": 10_000 + tokens, "learn_seconds": 1.5, "ratio_middle": 90_000 / size}
    return {**found, **learnt, "quality": quality, "coded_bytes": size}


@pytest.fixture
def samples():
    points = ((20, 0.08, 1000), (30, 0.02, 2000), (40, 0.005, 4000))
    many = [sample(4096, *point, text=text) for point in points for text in ("code", "legal")]
    few = [sample(512, quality, kl, 1.5 * size) for quality, kl, size in points]
    return [sample(0, None, 0.2, 5000), *few, *many]


def test_bytes_at_equal_divergence_are_over_those_from_most_tokens(samples):
    summary = calibration_tokens.summarise(samples)
    assert [(row["tokens"], row["bytes_over_most"]) for row in summary["rows"]] == [(512, 1.5), (4096, 1.0)]
    assert summary["live"] == {"kl": 0.2, "cache_bytes": 15_000}
    assert summary["rows"][0]["kl_30"] == 0.02


def test_the_report_sets_files_from_fewest_tokens_against_the_live_cache(samples):
    config = {"model": "smollm2-135m", "qualities": [20, 30, 40], "live": "int4", "kl": [0.002, 0.1]}
    said = calibration_tokens.section({"summary": calibration_tokens.summarise(samples), "config": config})
    assert "`int4` diverges by 0.2000 nats" in said
    assert "learnt from 512 tokens by 0.0050 at quality 40" in said
    assert "| 512 | 0.0800, 60.0x | 0.0200, 30.0x | 0.0050, 15.0x | 1.50 | 1.50 |" in said
