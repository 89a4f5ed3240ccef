"""What two commands take and give, from samples made up."""

from benchmarks.experiments import one_command


def sample(text, quality, kl):
    return {
        "text": text,
        "quality": quality,
        "kl": kl,
        "top1_agreement": 0.9,
        "ratio": 20.0,
        "ratio_middle": 25.0,
        "tokens": 2048,
    }


def test_the_report_has_the_means_and_the_text_that_diverges_most():
    samples = [
        sample("code", 25, 0.02),
        sample("legal", 25, 0.04),
        sample("code", 35, 0.004),
        sample("legal", 35, 0.008),
    ]
    summary = one_command.summarise(samples)
    assert [row["kl"] for row in summary["rows"]] == [0.03, 0.006]
    config = {
        "model": "smollm2-135m", "texts": ["code", "legal"], "length": 2048, "calibration_tokens": 20_000, "artifact_bytes": 10**7,
    }  # fmt: skip
    said = one_command.section(
        {"config": config, "summary": {**summary, "calibrate_seconds": 170.0, "compress_seconds": 40.0}}
    )
    assert "legal diverges most, by 0.0080 nats" in said
    assert "3.5 minutes in all" in said
    assert "| 35 | 20.0x | 25.0x | 0.0060 | 90.0 % |" in said
