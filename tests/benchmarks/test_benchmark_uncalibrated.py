"""Files without calibration, from samples made up."""

import pytest

from benchmarks.experiments import uncalibrated


def sample(text, variant, tokens, cache_bytes, kl, **seconds):
    return {
        "text": text, "variant": variant, "tokens": tokens, "cache_bytes": cache_bytes, "fp16_bytes": 10 * tokens, "kl": kl,
        "top1_agreement": 0.9, "predicted_tokens": 128, **seconds,
    }  # fmt: skip


def test_bytes_are_of_all_texts_together_and_divergence_is_their_mean():
    timed = {"compress_seconds": 2.0, "decompress_seconds": 1.0}
    samples = [
        sample("code", "direct 45", 2000, 5000, 0.002, **timed),
        sample("legal", "direct 45", 1000, 3100, 0.004, **timed),
        sample("code", "int4", 2000, 6000, 0.01),
    ]
    rows = uncalibrated.summarise(samples)
    assert [row["variant"] for row in rows] == ["direct 45", "int4"]
    assert rows[0]["share_of_fp16"] == pytest.approx(0.27)
    assert (rows[0]["longest_share"], rows[0]["kl"], rows[0]["worst_kl"]) == (0.25, 0.003, 0.004)
    assert rows[0]["compress_seconds_a_1000_tokens"] == 1.5
    assert "compress_seconds_a_1000_tokens" not in rows[1]
    config = {"model": "smollm2-135m", "held": 2048, "predict": 128, "live_texts": ["code"]}
    said = uncalibrated.section({"config": config, "summary": rows})
    assert "| direct 45 | 2 | 27.0 % | 25.0 % | 0.0030 | 0.0040 | 90.0 % | 1.50 | 0.75 |" in said
    assert "| int4 | 1 | 30.0 % | 30.0 % | 0.0100 | 0.0100 | 90.0 % | - | - |" in said
