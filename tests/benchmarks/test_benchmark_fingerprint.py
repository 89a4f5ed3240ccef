"""Naming a model: the fastest round counts, and 8 GB follow from its rate."""

from benchmarks.experiments import fingerprint


def test_the_words_follow_from_the_fastest_rounds():
    rounds = {("made up", "bfloat16"): (2.0, 4.0), ("made up", "4-bit"): (0.5, 0.4), ("b", "4-bit"): (0.1, 0.2)}
    samples = [
        {"model": model, "weights": weights, "bytes": 2_000_000_000, "seconds": seconds}
        for (model, weights), each in rounds.items()
        for seconds in each
    ]
    rows = fingerprint.summarise(samples)
    assert [(row["seconds"], row["gb_per_second"], row["seconds_for_8_gb"]) for row in rows] == [
        (2.0, 1.0, 8.0),
        (0.4, 5.0, 1.6),
        (0.1, 20.0, 0.4),
    ]
    text = fingerprint.section({"summary": rows})
    assert text.startswith("Naming 8 GB of 4-bit weights takes 1.6 s, extrapolated from 2,000 MB; of bfloat16")
    assert "in every type, 8.0 s." in text
    assert "| made up | 4-bit | 2,000 | 0.400 | 5.0 |" in text
    assert fingerprint.brief({"summary": rows}) == text.splitlines()[0]
